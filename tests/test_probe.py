"""What every loaded model is asked with a few tokens, be it a teacher, a student or the model of eval, predict and Predictor."""

import pytest
import torch
import transformers

from muka_fast import Predictor
from muka_fast.errors import UserError
from muka_fast.evaluate import load_model
from muka_fast.export import Card, save_student
from muka_fast.probe import check_padding, trace_inputs
from muka_fast.student import load_student
from muka_fast.teachers import load_teacher
from muka_fast.tokenizer import check_tokenizer, position_limit

ROLES = {
    "teacher": lambda folder: load_teacher(folder, run_seed=0),
    "student": lambda folder: load_student(folder, ["a", "b"], 0, {"zero_optimization": {"stage": 0}}),
    "--model": load_model,
    "exported student": lambda folder: load_model(folder, role="exported student"),
}
SIZES = {"num_labels": 2, "pad_token_id": 0, "vocab_size": 500}
XLNET = {"d_model": 16, "n_layer": 1, "n_head": 4, "d_inner": 32, **SIZES}
COMMON = {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 32, **SIZES}


def saved(folder, name, tokenizer, **options):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(initializer_range=0.3, **options)
    model = getattr(transformers, f"{name}ForSequenceClassification")(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer(make_tokenizer):
    return make_tokenizer("bert")


@pytest.mark.parametrize("role", ROLES)
def test_a_head_that_reads_the_last_column_is_refused(tmp_path, tokenizer, role):
    folder = saved(tmp_path / "xlnet", "XLNet", tokenizer, **XLNET)
    with pytest.raises(UserError, match=f"{role} .*XLNetForSequenceClassification reads the last column of a batch"):
        ROLES[role](folder)


def test_such_an_architecture_that_reads_the_first_one_is_not(tmp_path, tokenizer):
    ROLES["student"](saved(tmp_path / "xlnet", "XLNet", tokenizer, summary_type="first", **XLNET))


@pytest.mark.parametrize("role", ROLES)
def test_that_padding_changes_the_logits_is_told(tmp_path, tokenizer, role, caplog):
    folder = saved(tmp_path / "fnet", "FNet", tokenizer, tpu_short_seq_length=8, **COMMON)
    ROLES[role](folder)
    assert f"{role} {folder}: padding changes the logits of FNetForSequenceClassification" in caplog.text


def test_of_other_models_nothing_is_told(make_teacher, product_log):
    Predictor(make_teacher())
    assert "padding" not in product_log.text


def test_tokens_drawn_together_in_twos_and_fours_do_not_hide_it(caplog):
    config = transformers.CanineConfig(
        **COMMON, num_hash_buckets=64, local_transformer_stride=32, downsampling_rate=4, initializer_range=0.3
    )
    check_padding(transformers.CanineForSequenceClassification(config).eval(), "model x")
    assert "padding changes the logits of Canine" in caplog.text


def test_a_model_that_cannot_run_is_one_line(tmp_path, tokenizer):
    folder = saved(tmp_path / "xmod", "Xmod", tokenizer, languages=["en_XX", "de_DE"], **COMMON)  # without a default language
    with pytest.raises(UserError, match=r"--model .* fails on a text of 9 and one of 5 tokens \(ValueError: Input language unknown"):
        load_model(folder)


def test_a_tokenizer_that_tells_more_than_ids_is_refused(make_model, tokenizer):
    class Segments:
        def __init__(self, **more):
            self.more = more

        def __call__(self, text):
            return tokenizer(text) | self.more

        def __getattr__(self, name):
            return getattr(tokenizer, name)

    model = make_model("bert")
    check_tokenizer(model, Segments(token_type_ids=[0, 0, 0], xpath_tags_seq=[1, 2, 3]), "teacher x")  # all zero; not asked for
    with pytest.raises(UserError, match="teacher x: its tokenizer gives BertForSequenceClassification token_type_ids beside"):
        check_tokenizer(model, Segments(token_type_ids=[2, 0, 0]), "teacher x")
    with pytest.raises(UserError, match="position_ids beside token ids"):
        check_tokenizer(model, Segments(position_ids=[0, 1, 2]), "teacher x")


def test_token_types_of_0_are_refused_where_they_change_the_answer(tmp_path, make_tokenizer):
    """GPT-2 takes them for words; its Chinese models have BERT's tokenizer. A student is trained without them, and says so."""
    tokenizer = make_tokenizer("bert")
    saved(tmp_path, "GPT2", tokenizer, **SIZES, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2)
    assert "token_type_ids" in tokenizer("a")
    for role in ("teacher", "--model"):
        with pytest.raises(UserError, match="its tokenizer gives GPT2ForSequenceClassification token_type_ids beside token ids"):
            ROLES[role](tmp_path)
    model, student = ROLES["student"](tmp_path)
    save_student(model, student, tmp_path / "out", ["a", "b"], Card("merged"))
    assert list(transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("a")) == ["input_ids", "attention_mask"]
    ROLES["teacher"](tmp_path / "out")


def test_a_tokenizer_of_something_else_than_plain_text_is_refused(make_model):
    def boxes(text):
        raise ValueError("Words must be of type list")

    with pytest.raises(UserError, match=r"teacher x: its tokenizer does not take plain text \(Words must be of type list\)"):
        check_tokenizer(make_model("bert"), boxes, "teacher x")


@pytest.mark.parametrize("original", [16, 64])
def test_no_text_is_so_long_that_longrope_turns_the_others(original):
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 2, "long_factor": [2.0] * 2, "rope_theta": 10000.0}
    rope |= {"original_max_position_embeddings": original}
    config = transformers.LlamaConfig(num_key_value_heads=4, max_position_embeddings=32, rope_parameters=rope, **COMMON)
    limit = position_limit(transformers.LlamaForSequenceClassification(config))
    assert limit == min(original, 32)


def test_a_text_ends_with_the_first_of_several_end_tokens():
    sizes = {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_layers": 1, "decoder_layers": 1}
    config = transformers.BartConfig(d_model=16, encoder_attention_heads=4, decoder_attention_heads=4, **sizes, **SIZES)
    model = transformers.BartForSequenceClassification(config)
    model.config.eos_token_id = [7, 9]
    ids, _ = trace_inputs(model, 2, 4)
    assert ids[:, -1].tolist() == [7, 7] and not (ids[:, :-1] == 7).any()
