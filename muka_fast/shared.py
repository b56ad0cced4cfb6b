"""Teachers whose lowest layers have identical weights: the tree of common trunks, every part of which runs once per text."""

import hashlib
import itertools
import json
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from muka_fast.intercept import layer_modules
from muka_fast.placement import is_split
from muka_fast.trunk import StochasticTeacher, TeacherScores, Trunk

# Entries of a configuration that do not change what embeddings and layers compute in the deterministic pass.
IRRELEVANT = {
    "architectures", "id2label", "label2id", "problem_type", "transformers_version", "_name_or_path", "dtype", "torch_dtype",
    "finetuning_task", "task_specific_params", "classifier_pooling", "classifier_bias", "classifier_activation", "summary_type",
    "summary_activation", "summary_use_proj", "summary_last_dropout", "use_cache", "output_hidden_states", "output_attentions",
    "return_dict",
}  # fmt: skip
TOP = ("pooler", "final_norm", "norm")  # children of the base model that follow the last layer

# Of each model: the entries of its `Prefixes` that were asked for, and the hash of all below the next one.
_found: "weakref.WeakKeyDictionary[nn.Module, tuple[list[str], hashlib._Hash]]" = weakref.WeakKeyDictionary()


def _update(digest: "hashlib._Hash", name: str, tensor: Tensor) -> None:
    values = tensor.detach().cpu().contiguous()
    digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
    digest.update(values.view(torch.uint8).numpy() if values.numel() and values.dim() else np.asarray(values.tolist()).tobytes())


def _base_digest(model: nn.Module, layers: set[int]) -> "hashlib._Hash":
    """Configuration and every tensor of the base model that is neither in a layer nor above the last one."""
    digest = hashlib.blake2b(digest_size=16)
    config = {k: v for k, v in model.config.to_dict().items() if k not in IRRELEVANT and "drop" not in k}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    inside = {id(t) for m in model.base_model.modules() if id(m) in layers for t in (*m.parameters(), *m.buffers())}
    for name, tensor in (*model.base_model.named_parameters(), *model.base_model.named_buffers()):
        if id(tensor) not in inside and name.partition(".")[0] not in TOP:
            _update(digest, name, tensor)
    return digest


class Prefixes(Sequence[str]):
    """Content hashes of the deterministic part: entry i covers the tokenizer, the embeddings and the layers below i.

    Two teachers with the same entry i compute the same hidden states at the input of layer i. One entry only (layer 0) for a
    model that cannot be split. An entry's weights are read when it is asked for, once per model: from a GPU that takes a while.
    """

    def __init__(self, teacher: StochasticTeacher) -> None:
        self._teacher = teacher

    def __len__(self) -> int:
        return self._teacher.encoder.depth + 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        model = self._teacher.model
        if is_split(model):  # weights that are not here cannot be compared
            return f"{self._teacher.teacher.fingerprint} {index}"
        layers = layer_modules(model) or []
        if model not in _found:
            digest = _base_digest(model, {id(layer) for layer in layers})
            # A packed and a padded form of one trunk cannot be exchanged.
            form = self._teacher.fast is not None, self._teacher.reads == "last"  # the latter leaves padding at the end of a text out
            digest.update(f"{self._teacher.teacher.tokenizer_key} {form} {model.device}".encode())
            _found[model] = [digest.hexdigest()], digest
        found, digest = _found[model]
        while len(found) <= index:
            layer = layers[(len(found) - 1) * len(layers) // (len(self) - 1)]  # ALBERT: fewer than its depth
            for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
                _update(digest, name, tensor)
            found.append(digest.hexdigest())
        return found[index]


@dataclass(frozen=True)
class TrunkNode:
    """Layers start..stop that run once for `teachers` (indices); then come the children, and the tails of `finished`."""

    start: int
    stop: int
    teachers: tuple[int, ...]
    finished: tuple[int, ...]
    children: tuple["TrunkNode", ...] = field(default=())


def trunk_tree(teachers: Sequence[StochasticTeacher]) -> tuple[TrunkNode, ...]:
    """The forest of common trunks: teachers that share at least one layer below their first active site hang together."""
    return grow_trunks([teacher.layer for teacher in teachers], [Prefixes(teacher) for teacher in teachers])


def grow_trunks(
    layers: Sequence[int], hashes: Sequence[Sequence[str]], indices: Sequence[int] | None = None, start: int = 0
) -> tuple[TrunkNode, ...]:
    """`trunk_tree` of teachers of which only `layers`, the layer where each one's trunk ends, and `hashes`, its `Prefixes`, are
    known. indices: teachers that have the same trunk up to layer `start` and reach beyond it (or start at 0); None: all."""
    groups: dict[object, list[int]] = {}
    for i in range(len(layers)) if indices is None else indices:
        alone = layers[i] <= start
        groups.setdefault(i if alone else hashes[i][start + 1], []).append(i)
    nodes = []
    for group in groups.values():
        most, stop = min(layers[i] for i in group), start
        while stop < most and (len(group) == 1 or len({hashes[i][stop + 1] for i in group}) == 1):
            stop += 1
        finished = tuple(i for i in group if layers[i] <= stop)
        rest = [i for i in group if layers[i] > stop]
        nodes.append(TrunkNode(start, stop, tuple(group), finished, grow_trunks(layers, hashes, rest, stop) if rest else ()))
    return tuple(nodes)


def tie_shared_weights(teachers: Sequence[StochasticTeacher]) -> int:
    """Let teachers keep one copy of the layers they share; returns the bytes freed."""
    freed = 0
    found = [(Prefixes(teacher), layer_modules(teacher.model) or []) for teacher in teachers]
    found = [(prefixes, layers) for prefixes, layers in found if len(layers) == len(prefixes) - 1]  # ALBERT's few serve all depths
    for (theirs, owners), (ours, layers) in itertools.combinations(found, 2):
        for index, (layer, owner) in enumerate(zip(layers, owners, strict=False), start=1):
            if ours[index] != theirs[index]:
                break
            for mine, kept in zip(layer.parameters(), owner.parameters(), strict=True):
                if mine.data_ptr() != kept.data_ptr():
                    freed += mine.numel() * mine.element_size()
                    mine.data = kept.data
    return freed


def score_together(
    teachers: Sequence[StochasticTeacher],
    input_ids: Tensor,
    attention_mask: Tensor,
    example_ids: Tensor | np.ndarray,
    tree: tuple[TrunkNode, ...] | None = None,
) -> list[TeacherScores]:
    """Scores of several teachers of one tokenizer over one batch; layers with the same weights run once.

    Arguments and scores as of `StochasticTeacher.launch`: on the device, where nothing has looked for NaN, so that nothing waits.
    tree: `trunk_tree(teachers)`, which a loop over batches computes once.
    """
    if len(teachers) == 1:
        return [teachers[0].launch(input_ids, attention_mask, example_ids)]
    scores: dict[int, TeacherScores] = {}

    def visit(node: TrunkNode, below: Trunk | None) -> None:
        leader = teachers[node.teachers[0]]
        texts = leader.texts(input_ids, attention_mask, example_ids) if below is None else below.texts
        trunk = leader.trunk(texts, start=below, stop=node.stop)
        for i in node.finished:
            scores[i] = teachers[i].finish(trunk)
        for child in node.children:
            visit(child, trunk)

    for node in trunk_tree(teachers) if tree is None else tree:
        visit(node, None)
    return [scores[i] for i in range(len(teachers))]
