"""A model's tokenizer: loaded, made to fit the model, and how many tokens a text may have."""

import inspect
import logging
from pathlib import Path

import torch
import transformers

from muka_fast import checkpoint, probe
from muka_fast.errors import UserError, first_line

log = logging.getLogger("muka_fast")
NO_LIMIT = 10**6  # a tokenizer without a length limit says 1e30


def load_tokenizer(folder: Path, what: str) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer of a folder, padding on the right."""
    checkpoint.check_tokenizer_files(folder, what)
    with checkpoint.loading(f"{what}: its tokenizer cannot be loaded"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, padding_side="right"
        )
    tokenizer.init_kwargs.pop("auto_map", None)  # transformers' own class it is, and what is saved says so
    return tokenizer


def settle_tokenizer(
    model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase, what: str
) -> None:
    """Give tokenizer and configuration the same padding token, save where positions count from the configuration's (RoBERTa), and keep
    texts from spelling an end token that the head looks for.

    Order of choice for padding: the tokenizer's, the one that config.pad_token_id names, the end-of-text token (usual for decoders;
    said aloud), and where the tokenizer ends every text with that one, which a head that reads the last token would then take for
    padding, the unknown token.
    """
    config = model.config.get_text_config()
    has_id = isinstance(config.pad_token_id, int) and config.pad_token_id >= 0
    if tokenizer.pad_token_id is None:
        named = tokenizer.convert_ids_to_tokens(config.pad_token_id) if has_id else None
        if named is None:
            ends = tokenizer("a").input_ids[-1:] == [tokenizer.eos_token_id]
            named = tokenizer.unk_token if ends else tokenizer.eos_token
            if named is None or (ends and named == tokenizer.eos_token):
                raise UserError(f"{what}: its tokenizer has no padding token; set tokenizer.pad_token and save it again")
            log.warning("%s: no padding token; %r takes the place", what, named)
        tokenizer.pad_token = named
    counted = has_id and any(table.padding_idx is not None for table in position_tables(model))
    if not counted:  # else a position depends on the id that the model was built with
        config.pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id
    # An encoder with a decoder (BART, T5) refuses a batch whose texts hold "</s>" in different numbers, as HTML does.
    tokenizer.split_special_tokens |= model.config.is_encoder_decoder
    if tokenizer.split_special_tokens:
        tokenizer.init_kwargs["split_special_tokens"] = True  # what save_pretrained writes


def forget_token_types(model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    """Have the tokenizer of a model that is to be trained here, without token types, give none, where they would be words (GPT-2)."""
    if "token_type_ids" in tokenizer.model_input_names and not hasattr(model.config.get_text_config(), "type_vocab_size"):
        tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
        tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names  # what save_pretrained writes


def fit_tokenizer(
    model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase, what: str
) -> None:
    """`settle_tokenizer`, then `check_tokenizer`: for every model that is loaded."""
    settle_tokenizer(model, tokenizer, what)
    check_tokenizer(model, tokenizer, what)


def check_tokenizer(
    model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase, what: str
) -> None:
    """Refuse a tokenizer that tells its model more than token ids, or whose ids the model cannot embed: it belongs to another one."""
    _check_inputs(model, tokenizer, what)
    table = token_table(model)
    if table is None:
        log.info("%s: has no table of tokens that its tokenizer could be compared with", what)
        return
    rows = num_rows(table)
    beyond = sorted((id_, token) for token, id_ in tokenizer.get_vocab().items() if id_ >= rows)
    if not beyond:
        return
    special = set(tokenizer.all_special_ids) - {tokenizer.pad_token_id}
    if all(id_ in special for id_, _ in beyond):
        log.warning("%s: its model has no row for the special token %r; texts must not hold it", what, beyond[0][1])
        return
    raise UserError(
        f"{what}: its tokenizer has token {beyond[0][1]!r} with id {beyond[0][0]}, but the model embeds only {rows} tokens; "
        "copy the tokenizer that the model was trained with"
    )


def _check_inputs(
    model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase, what: str
) -> None:
    """Token ids are all that is kept of a text here: RoCBert's also has shapes and pronunciations, Funnel's segments."""
    try:
        told = tokenizer("a text")
    except Exception as error:  # of the tokenizer's own kind: LayoutLMv2's asks for boxes
        raise UserError(f"{what}: its tokenizer does not take plain text ({first_line(error)}); leave it out") from error
    taken = inspect.signature(model.forward).parameters
    more = [name for name in told if name in taken and name not in ("input_ids", "attention_mask")]
    more = [name for name in more if name != "token_type_ids" or any(told[name]) or probe.reads_token_types(model)]
    if more:
        raise UserError(
            f"{what}: its tokenizer gives {type(model).__name__} {' and '.join(more)} beside token ids, which this version does not "
            "pass on; use another architecture"
        )


def token_table(model: transformers.PreTrainedModel) -> torch.nn.Module | None:
    """The module with a row for every token; None where none has: CANINE hashes characters, Perceiver begins with a projection."""
    try:
        table = model.get_input_embeddings()
    except NotImplementedError:  # how transformers says that a model has none: no fault, and callers do without
        return None
    return table if hasattr(table, "weight") else None


def num_rows(table: torch.nn.Module) -> int:
    """Entries of a table of embeddings, of I-BERT a class of its own; ZeRO-3 leaves none in an ordinary one's weight."""
    return table.num_embeddings if isinstance(table, torch.nn.Embedding) else len(table.weight)


def token_limit(model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase) -> int:
    """Most tokens of a text: the least of what position table (or configuration) and tokenizer allow."""
    return int(min(position_limit(model), tokenizer_limit(tokenizer)))


def tokenizer_limit(tokenizer: transformers.PreTrainedTokenizerBase) -> int:
    """Most tokens of a text that it says its model takes, be that none that it knows (-1)."""
    return tokenizer.model_max_length if tokenizer.model_max_length > 0 else NO_LIMIT


def position_tables(model: transformers.PreTrainedModel) -> list[torch.nn.Module]:
    """The tables of learned positions."""
    named = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
    return [module for module in named if hasattr(module, "padding_idx")]


def position_limit(model: transformers.PreTrainedModel) -> int:
    """Most tokens that a model's position table, or else its configuration, allows; its weights may be on the meta device."""
    config = model.config.get_text_config()
    told = max(getattr(config, "max_position_embeddings", None) or 0, 0) or NO_LIMIT  # XLNet's -1: none
    # Beyond it longrope (Phi-3) turns all texts of a batch by other angles, the short ones as well.
    rope = getattr(config, "rope_parameters", None) or {}
    ropes = [part for part in (rope, *rope.values()) if isinstance(part, dict) and part.get("rope_type") == "longrope"]
    told = min(told, *(part["original_max_position_embeddings"] for part in ropes), NO_LIMIT)
    # RoBERTa's kin count positions from padding_idx + 1; others' tables may begin with rows for other things (Nystromformer).
    tables = position_tables(model)
    limits = [min(told, num_rows(table)) if table.padding_idx is None else num_rows(table) - table.padding_idx - 1 for table in tables]
    return min(limit for limit in (*(limits or [told]), NO_LIMIT) if limit > 0)
