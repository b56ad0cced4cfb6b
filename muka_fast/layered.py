"""An encoder run layer by layer on packed texts: only what follows a mask is repeated, only the row that is read is computed.

The modules are the model's own; what differs between families is in postln.py and preln.py.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

from torch import Tensor, nn
from transformers import PreTrainedModel

from muka_fast.packed import Packed, Replicas
from muka_fast.sites import Site

# (first query position, queries, length) -> what is added to the attention scores [H | 1, queries, length], or None
Bias = Callable[[int, int, int], Tensor | None]


def sited_layers(
    model: PreTrainedModel,
    modules: Iterable[nn.Module],
    parts_of: Callable[[nn.Module], tuple[tuple, tuple[str, ...]]],
    sites: list[Site],
    layer: type,
) -> list | None:
    """A `layer` of each module, from its parts and the numbers of its sites; None where a module has other sites than these.

    parts_of: a module's parts, and the paths of its sites inside it ("" = no such site), that of attention among them.
    """
    place, layers = {module: path for path, module in model.named_modules()}, []
    for index, module in enumerate(modules):
        parts, paths = parts_of(module)
        inside = {site.path: site.index for site in sites if site.layer == index}
        layers.append(layer(*parts, *(inside.get(f"{place[module]}.{path}") for path in paths)))
        if len(inside) != sum(bool(path) for path in paths) or layers[-1].attention_site is None:
            return None
    return layers


class LayeredEncoder(ABC):
    """`trunk`: hidden states that enter a layer, once per text. `tail`: the read token's row of the last layer, R replicas."""

    def __init__(self, model: PreTrainedModel, layers: list, embeddings_site: int | None, reads_last: bool):
        """reads_last: the head reads the last token, else the first."""
        self.base, self.config = model.base_model, model.config
        self.layers, self.depth = layers, len(layers)
        self.embeddings_site, self.reads_last = embeddings_site, reads_last
        self.head_dim = getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads

    @abstractmethod
    def embeddings(self, input_ids: Tensor) -> Tensor:
        """[B, L] -> [B, L, E], up to and without the dropout that is their last step."""

    def project(self, x: Tensor) -> Tensor:
        """Embeddings behind their dropout [(R,) T, E] -> hidden states [(R,) T, D]."""
        return x

    @abstractmethod
    def context(self, packed: Packed) -> object:
        """What all layers share for one batch: position biases, rotary tables."""

    @abstractmethod
    def layer(self, index: int, x: Tensor, replicas: Replicas, context: object, one_row: bool) -> Tensor:
        """One layer: [(R,) T, D] -> [(R,) T, D], or with one_row [(R,) B, D]."""

    def embed(self, input_ids: Tensor, packed: Packed) -> Tensor:
        """[T, E]: the embeddings before their dropout."""
        return packed.pack(self.embeddings(input_ids))

    def enter(self, embedded: Tensor, replicas: Replicas) -> Tensor:
        """Embeddings -> what enters layer 0, [T, D], or [R, T, D] where the embeddings' site is active."""
        return self.project(replicas.dropout(embedded, self.embeddings_site))

    def trunk(self, input_ids: Tensor, packed: Packed, stop: int, start: int = 0, hidden: Tensor | None = None) -> Tensor:
        """Deterministic hidden states [T, D] that enter layer `stop`; stop = depth: the read tokens' last rows [B, D]."""
        replicas = Replicas(packed, {}, 0, 0)
        if hidden is None:
            hidden = self.enter(self.embed(input_ids, packed), replicas)
        return self._run(hidden, start, stop, replicas)

    def tail(self, x: Tensor, start: int, replicas: Replicas) -> Tensor:
        """Layers from `start` on: [(R,) T, D] -> the read tokens' last rows [R, B, D]."""
        x = self._run(x, start, self.depth, replicas)
        return x if x.dim() == 3 else x.expand(int(replicas.plain) + replicas.count, -1, -1)

    def _run(self, x: Tensor, start: int, stop: int, replicas: Replicas) -> Tensor:
        context = self.context(replicas.packed)
        for index in range(start, stop):
            x = self.layer(index, x, replicas, context, one_row=index == self.depth - 1)
        return x
