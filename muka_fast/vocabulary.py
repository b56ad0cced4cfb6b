"""Word vectors in training: only those of words that the texts have.

The others get no gradient, but would get moments, decay and a place in every checkpoint and every exchange between processes: half of
the weights of a MiniLM, two thirds of those of a multilingual base model. They stay as they are.
"""

import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from muka_fast.data import Tokens, collate
from muka_fast.engine import whole_parameters
from muka_fast.tokenizer import num_rows, token_table

log = logging.getLogger("muka_fast")
WORTHWHILE = 0.8  # of the vocabulary at most
AT_ONCE = 1 << 20  # tokens


class SomeVectors(nn.Embedding):
    """An embedding that holds some rows of another, found by their ids there."""

    def __init__(self, weight: Tensor, rows: Tensor, vocabulary: int, padding: int | None):
        """weight [R, D]: of the ids `rows` int64 [R], ascending, `padding` among them, out of [0, vocabulary)."""
        place = torch.full((vocabulary,), len(rows))  # an id without a vector is an index out of range
        place[rows] = torch.arange(len(rows))
        super().__init__(*weight.shape, padding_idx=None if padding is None else int(place[padding]), _weight=weight)
        self.register_buffer("place", place.to(weight.device), persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(self.place[input_ids])


class TextVocabulary:
    """The word vectors that a model trains on some texts, beside those of all words, which stay on the host."""

    def __init__(self, model: PreTrainedModel, tokens: Tokens) -> None:
        """Cut the model's embedding to the ids in `tokens` and its special ones, where that makes it smaller and changes no logit.

        For a model that ZeRO-3 shards it is collective, the logits are not looked at, and all words' vectors are process 0's alone.
        """
        self.names: list[str] = []  # of the weight that was cut, if any
        table = _word_table(model)
        if table is None:
            return
        sharded, size = hasattr(table.weight, "ds_id"), num_rows(table)
        self.table, self.rows = table, _used(model, table, tokens, size)
        if len(self.rows) > WORTHWHILE * size:
            return
        before = None if sharded else _logits(model, tokens)
        with whole_parameters([table.weight]):
            self.vectors = table.weight.detach()
            self.some = SomeVectors(self.vectors[self.rows.to(self.vectors.device)], self.rows, size, table.padding_idx)
            if sharded:
                self.vectors = self.vectors.to("cpu", copy=True) if torch.distributed.get_rank() == 0 else None
        places = _replace(model, table, self.some)
        if before is not None and not _same(before, model, self.some, tokens):
            log.info("%s reads its word vectors by another way than its embedding: all of them are trained", type(model).__name__)
            _replace(model, self.some, table)
            return
        self.names = [f"{place}.weight" for place in places]
        log.info("word vectors: %d of %d, those of the texts, are trained; the others stay as they are", len(self.rows), size)

    def complete(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dictionary of the model with the vectors of all words. On process 0."""
        return {name: self._complete(value) if name in self.names else value for name, value in state.items()}

    def _complete(self, trained: Tensor) -> Tensor:
        vectors = self.vectors.to(trained.device, trained.dtype)
        return vectors.index_copy(0, self.rows.to(trained.device), trained)

    def restore(self, model: PreTrainedModel) -> None:
        """Give the model, which is not sharded, its whole embedding back, with what was learnt."""
        if self.names:
            with torch.no_grad():
                self.table.weight[self.rows] = self.some.weight
            _replace(model, self.some, self.table)


def _word_table(model: PreTrainedModel) -> nn.Embedding | None:
    """Its input embedding, if it is trained and a plain one that shares its weight with no other module."""
    table = token_table(model)
    if type(table) is not nn.Embedding or not table.weight.requires_grad or table.max_norm is not None or table.scale_grad_by_freq:
        return None
    holders = [module for module in model.modules() if any(p is table.weight for p in module.parameters(recurse=False))]
    return table if holders == [table] else None


def _used(model: PreTrainedModel, table: nn.Embedding, tokens: Tokens, size: int) -> Tensor:
    """Ids of the texts, of padding and of whatever else a forward may put in, int64, ascending."""
    parts = (model.config, model.config.get_text_config())
    special = [value for part in parts for name, value in part.to_dict().items() if name.endswith("token_id")]
    used = torch.zeros(size, dtype=torch.bool)
    for start in range(0, len(tokens.ids), AT_ONCE):
        used[torch.from_numpy(tokens.ids[start : start + AT_ONCE])] = True
    for value in [table.padding_idx, *special]:
        for token in value if isinstance(value, list) else [value]:
            if isinstance(token, int) and 0 <= token < size:
                used[token] = True
    return used.nonzero()[:, 0]


def _same(before: Tensor, model: PreTrainedModel, some: SomeVectors, tokens: Tokens) -> bool:
    try:
        with some.register_forward_pre_hook(_check_ids):
            return torch.equal(before, _logits(model, tokens))
    except (IndexError, RuntimeError):  # an id that is none of the texts'
        return False


def _check_ids(some: SomeVectors, inputs: tuple[Tensor, ...]) -> None:
    """An index out of range leaves a GPU of no further use."""
    if (some.place[inputs[0]] == len(some.weight)).any():
        raise IndexError


@torch.no_grad()
def _logits(model: PreTrainedModel, tokens: Tokens) -> Tensor:
    """Of the shortest text."""
    training = model.training
    model.eval()
    try:
        batch = collate(tokens, tokens.lengths.argmin()[None], model.config.get_text_config().pad_token_id)
        return model(**{name: value.to(model.device) for name, value in batch.items()}).logits
    finally:
        model.train(training)


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> list[str]:
    """Put `new` wherever `old` stands; returns these places."""
    places = []
    for path, parent in list(model.named_modules()):
        for name in [name for name, child in parent.named_children() if child is old]:
            setattr(parent, name, new)
            places.append(f"{path}.{name}" if path else name)
    return places
