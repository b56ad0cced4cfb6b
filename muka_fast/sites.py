"""The dropout sites of a classifier: found by a traced forward, chosen by scope, masked by counter-based numbers."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from muka_fast.errors import UserError, first_line
from muka_fast.intercept import intercept, layer_modules, patched
from muka_fast.ops.reference import ATTENTION_STRIDE
from muka_fast.ops.repeat_dropout import repeat_dropout
from muka_fast.probe import trace_inputs

SHARED_EXAMPLE = 0xFFFFFFFF  # example id of sites that every text shares (DeBERTa's table of relative positions)
TRACE_TEXTS, TRACE_TOKENS = 3, 5


@dataclass(frozen=True)
class Site:
    """One call of one dropout in a forward pass.

    index: the site id of the mask contract, in order of execution.
    path, occurrence: the module, and which of its calls (0, 1, ...).
    kind: "activation" [B, L, D] or [B, D], "tokens" [B * L, D], "attention" [B, H, L, L], "shared" [R, D] without a text dimension.
    p: the model's own dropout probability. layer: None = embeddings, int, or "head". rank: dimensions of the value.
    """

    index: int
    path: str
    occurrence: int
    kind: str
    p: float
    layer: int | str | None
    rank: int

    @property
    def per_text(self) -> bool:
        """Whether the value has one row per text, which does not depend on the tokens around it."""
        return self.kind == "activation" and self.rank == 2

    def record(self, p: float) -> dict:
        """For manifests: the fields, and the probability `p` in use (0 = not active)."""
        return {**asdict(self), "active_p": p}


class _Trace:
    """SiteHandler that changes nothing and writes down every call."""

    def __init__(self, paths: dict[nn.Module, str], what: str):
        self.paths, self.what = paths, what
        self.calls: Counter[nn.Module] = Counter()
        self.layer: int | str | None = None
        self.attention_modules: list[nn.Module] = []
        self.sites: list[Site] = []

    def wants(self, module: nn.Module) -> bool:
        self.attention_modules.append(module)
        return True

    def apply(self, module: nn.Module, x: Tensor, p: float) -> Tensor:
        path = self.paths[module]
        kind = self._kind(path, tuple(x.shape))
        self.sites.append(Site(len(self.sites), path, self.calls[module], kind, p, self.layer, x.dim()))
        self.calls[module] += 1
        return x

    def _kind(self, path: str, shape: tuple[int, ...]) -> str:
        if shape[0] == TRACE_TEXTS and (len(shape) == 2 or (len(shape) == 3 and shape[1] == TRACE_TOKENS)):
            return "activation"
        if len(shape) == 4 and shape[0] == TRACE_TEXTS and shape[2:] == (TRACE_TOKENS, TRACE_TOKENS):
            return "attention"
        if len(shape) == 2:
            return "tokens" if shape[0] == TRACE_TEXTS * TRACE_TOKENS else "shared"
        told = f"its dropout site {path} masks a value of unknown layout {list(shape)}"
        raise UserError(f"{self.what}: {told}, which this version cannot mask by text; leave it out")


@contextmanager
def understood(model: PreTrainedModel, what: str) -> Iterator[None]:
    """Inside the block the model's forward is taken apart: whatever an unknown architecture makes of that becomes one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        told = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{what}: this version cannot take {type(model).__name__} apart ({told}); leave it out") from error


@torch.inference_mode()
def list_sites(model: PreTrainedModel, what: str = "model") -> list[Site]:
    """Every dropout site of `model` (eval mode) in order of execution, attention and sites of p = 0 included.

    A forward on a tiny input is traced twice: the second time with the `training` flag of the attention modules alone
    raised, since only then do they pass on the probability they would use. what: what errors call the model. Raises UserError for a
    site whose value has no known layout.
    """
    paths = {module: path for path, module in model.named_modules()}
    ids, mask = trace_inputs(model, TRACE_TEXTS, TRACE_TOKENS)
    attention_modules: list[nn.Module] = []
    for _ in range(2):
        trace = _Trace(paths, what)
        with ExitStack() as stack:
            stack.enter_context(intercept(model, trace))
            _watch_layers(model, trace, stack)
            for module in attention_modules:
                module.training = True
            try:
                model(input_ids=ids, attention_mask=mask)
            finally:
                for module in attention_modules:
                    module.training = False
        attention_modules = trace.attention_modules
    return trace.sites


def _watch_layers(model: PreTrainedModel, trace: _Trace, stack: ExitStack) -> None:
    """Keep `trace.layer` right: what runs between two layers belongs to the lower one, then comes the head."""
    layers = layer_modules(model) or []
    depth = model.config.get_text_config().num_hidden_layers
    calls = iter(range(depth))

    def forward(original, *args, **kwargs):
        trace.layer = index = next(calls)
        out = original(*args, **kwargs)
        if index == depth - 1:
            trace.layer = "head"
        return out

    for layer in layers:
        stack.enter_context(patched(layer, forward))


def num_site_layers(sites: Sequence[Site]) -> int:
    return max((site.layer for site in sites if isinstance(site.layer, int)), default=-1) + 1


def active_sites(sites: Sequence[Site], scope: str, teacher: str = "the teacher") -> list[Site]:
    """The sites of `scope`: "all", "last:M" (last M layers and head) or "head". UserError for any other scope."""
    if scope == "all" or not sites:
        return list(sites)
    depth = num_site_layers(sites)
    match = re.fullmatch(r"last:(\d+)", scope)
    if match:
        count = int(match[1])
        if depth == 0:
            raise UserError(f"--mc_scope {scope}: {teacher} has no dropout site in its layers; use --mc_scope all")
        if not 1 <= count <= depth:
            raise UserError(f"--mc_scope {scope}: {teacher} has {depth} layers, so last:1 to last:{depth} or all")
        return [s for s in sites if s.layer == "head" or (isinstance(s.layer, int) and s.layer >= depth - count)]
    if scope != "head":
        raise UserError(f"--mc_scope {scope}: must be all, last:M (M = 1, 2, ...) or head")
    chosen = [s for s in sites if s.layer == "head"]
    if not chosen:
        raise UserError(f"--mc_scope head: {teacher} has no dropout site in its head; use --mc_scope last:1")
    return chosen


def active_probabilities(
    sites: Sequence[Site], scope: str, mc_dropout_p: float | None, teacher: str = "the teacher"
) -> dict[int, float]:
    """Site index -> p > 0 of the sites of `scope`; mc_dropout_p: of all of them, None = the model's own.

    Raises UserError for a scope without sites and where nothing would be random.
    """
    chosen = active_sites(sites, scope, teacher)
    p_of_site = {site.index: site.p if mc_dropout_p is None else mc_dropout_p for site in chosen}
    p_of_site = {index: p for index, p in p_of_site.items() if p > 0}
    if any(p >= 1 for p in p_of_site.values()):
        raise UserError(f"{teacher}: its configuration drops everything (p = 1); set --mc_dropout_p 0.1")
    if not chosen:
        raise UserError(f"{teacher}: no dropout was found in it, so every sample would be the same; use --no-mc")
    if not p_of_site:
        raise UserError(
            f"{teacher}: all {len(chosen)} dropout sites of --mc_scope {scope} have p = 0, so "
            "every sample would be the same; set --mc_dropout_p 0.1, or use --no-mc"
        )
    return p_of_site


class AnyValue(TorchDispatchMode):
    """Answers 1 where a model asks for the value of a tensor that has none ("is this mask all ones?").

    To an encoder with a decoder each text has one end token: asked how many different numbers of them there are, it answers one, and
    where hidden states [B, L, D] are then picked by the mask [B, L] of these tokens, it gives one of each text.
    """

    one_end_each = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten = torch.ops.aten  # inference mode shows the composite operators as they are called
        if func in (aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default):
            return True
        if func is aten.unique_consecutive.default and args[0].is_meta:
            self.one_end_each, nothing = True, args[0].new_empty(0)
            return args[0].flatten()[:1].clone(), nothing, nothing.clone()
        if func is aten.index.Tensor and self.one_end_each and args[0].is_meta and args[0].dim() == 3:
            mask, *others = args[1]
            if mask is not None and mask.dtype == torch.bool and mask.dim() == 2 and others in ([], [None]):
                return args[0][:, 0].clone()
        return func(*args, **(kwargs or {}))


def sites_of_config(config: PreTrainedConfig, what: str = "model") -> list[Site] | None:
    """`list_sites` of the classifier that a configuration describes, without weights; None where it cannot be run so."""
    try:
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False).eval()
        with AnyValue():
            return list_sites(model, what)
    except UserError:
        raise
    except Exception:  # whatever a model does without values; the real one is looked at when its turn comes
        return None


class Masks:
    """SiteHandler that applies the mask contract to K replicas of B texts laid out k-major: [K * B, ...].

    Elements (position = column index of a right-padded batch, D = width of the value):
    [L, D], in "tokens" as well: position * D + column · [D]: column · attention: (head * 16384 + query) * 16384 + key, head < 128,
    L <= 16384 · shared: flat index, example id 0xFFFFFFFF, one sample at a time.
    """

    key: Tensor | None = None  # seed and first sample on the device, as of `Draws`, instead of those of the host

    def __init__(
        self,
        model: PreTrainedModel,
        sites: Sequence[Site],
        p_of_site: dict[int, float],
        seed: int,
        example_ids: Tensor,
        num_samples: int,
        first_sample: int = 0,
    ):
        """sites: all of the model's; p_of_site: site index -> p of the active ones; example_ids int64 [B]."""
        self.seed, self.num_samples, self.p_of_site = seed, num_samples, p_of_site
        modules = dict(model.named_modules())
        self._sites: dict[nn.Module, list[Site]] = {}
        for site in sites:
            self._sites.setdefault(modules[site.path], []).append(site)
        self._by_layer: dict[int | str | None, Counter[nn.Module]] = {}
        for site in sites:
            self._by_layer.setdefault(site.layer, Counter())[modules[site.path]] += 1
        self.restart(example_ids, first_sample)

    def restart(self, example_ids: Tensor, first_sample: int) -> None:
        """For another forward."""
        self.example_ids, self.first_sample = example_ids, first_sample
        self.rewind()

    def rewind(self) -> None:
        """For the same forward once more."""
        self._calls: Counter[nn.Module] = Counter()
        self._rows: dict[tuple, tuple[Tensor, Tensor]] = {}

    def skip_layer(self, layer: int) -> None:
        """Count the calls of a layer that does not run."""
        self._calls.update(self._by_layer.get(layer, Counter()))

    def skip_embeddings(self, embeddings: nn.Module) -> None:
        """Count the calls inside a module of embeddings that does not run; a dropout outside of it runs, and is counted then."""
        calls, inside = self._by_layer.get(None, Counter()), set(embeddings.modules())
        self._calls.update({module: count for module, count in calls.items() if module in inside})

    def _next(self, module: nn.Module) -> Site | None:
        sites = self._sites.get(module)
        return None if sites is None else sites[self._calls[module] % len(sites)]

    def wants(self, module: nn.Module) -> bool:
        site = self._next(module)
        if site is not None and site.index in self.p_of_site:
            return True
        self._calls[module] += 1
        return False

    def apply(self, module: nn.Module, x: Tensor, p: float) -> Tensor:
        site = self._next(module)
        self._calls[module] += 1
        if site is None or site.index not in self.p_of_site:
            return x
        p = self.p_of_site[site.index]
        if site.kind == "shared":
            return self._shared(x, site, p)
        if site.kind == "tokens":
            rows, width = (len(x) // (self.num_samples * len(self.example_ids)),), x.shape[-1]
        else:
            rows, width = x.shape[1:-1], x.shape[-1]
        ids, offsets = self.rows(site.kind, tuple(rows), width, x.device)
        flat = x.reshape(self.num_samples, -1, width)
        masked = repeat_dropout(flat, self.num_samples, p, self.seed, site.index, ids, offsets, self.first_sample, self.key)
        return masked.view(x.shape)

    def _shared(self, x: Tensor, site: Site, p: float) -> Tensor:
        if self.num_samples != 1:
            raise RuntimeError(f"{site.path} is shared by all texts: one sample at a time")
        offsets = torch.arange(x.shape[0], device=x.device) * x.shape[1]
        ids = torch.full_like(offsets, SHARED_EXAMPLE)
        return repeat_dropout(x.contiguous(), 1, p, self.seed, site.index, ids, offsets, self.first_sample, self.key)[0]

    def rows(self, kind: str, rows: tuple[int, ...], width: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Example id and first element of every row of one replica: rows = () | (L,) | (H, L)."""
        key = (device, kind == "attention", *rows, width)
        if key not in self._rows:
            example_ids = self.example_ids.to(device)
            if kind == "attention":
                heads, queries = rows
                if heads > 128 or max(queries, width) > ATTENTION_STRIDE:
                    raise UserError(f"attention masks reach 128 heads and 16384 tokens, not {heads} and {width}")
                head = torch.arange(heads, device=device)[:, None]
                first = ((head * ATTENTION_STRIDE + torch.arange(queries, device=device)) * ATTENTION_STRIDE).flatten()
            else:
                first = torch.arange(rows[0] if rows else 1, device=device) * width
            ids = example_ids.repeat_interleave(len(first))
            self._rows[key] = (ids, first.repeat(len(example_ids)))
        return self._rows[key]
