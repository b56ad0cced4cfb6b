"""Running a classifier in parts, from any layer to any layer, through the model's own forward: for what layered.py does not know."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from muka_fast.intercept import SiteHandler, build_positions_without_waiting, intercept, layer_modules, patched
from muka_fast.probe import trace_inputs
from muka_fast.sites import Masks, Site


class _Reached(Exception):
    """The forward has arrived where it was to stop; carries the hidden states."""

    def __init__(self, hidden: Tensor):
        self.hidden = hidden


class _NoMasks:
    """SiteHandler of the deterministic pass."""

    def wants(self, module: nn.Module) -> bool:
        return False

    def apply(self, module: nn.Module, x: Tensor, p: float) -> Tensor:
        return x


class _Eager(_NoMasks):
    """Nothing is masked, but attention takes the path on which its probabilities could be."""

    def wants(self, module: nn.Module) -> bool:
        return True


class _Capture(_NoMasks):
    """Keeps what goes into one call of one dropout module."""

    def __init__(self, module: nn.Module, occurrence: int):
        self.module, self.remaining, self.value = module, occurrence, None

    def apply(self, module: nn.Module, x: Tensor, p: float) -> Tensor:
        if module is self.module:
            if self.remaining == 0:
                self.value = x
            self.remaining -= 1
        return x


class ModelSplit:
    """`run` executes layers start..stop of a model; every part of the model's forward outside its layers stays its own.

    Layers below `start` hand on what they get, and the hidden states given to `run` replace the input of layer `start`
    (start = depth: the output of the last layer). The model itself computes masks, rotary tables, position biases,
    final norm, pooler and head.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.layers = layer_modules(model)
        self.depth = model.config.get_text_config().num_hidden_layers if self.layers else 0
        self._templates: list[Any] = []  # what each layer call returns
        self._embeddings = self._find_embeddings()
        self._embedding_width = 0
        build_positions_without_waiting(model)
        if self.layers:
            self._probe()

    def leave_whole(self) -> None:
        """From now on the model has no layers to be cut at."""
        self.layers, self.depth = None, 0

    def _find_embeddings(self) -> nn.Module | None:
        for name in ("embeddings", "embed_tokens"):
            if isinstance(module := getattr(self.model.base_model, name, None), nn.Module):
                return module
        return None

    @torch.inference_mode()
    def _probe(self) -> None:
        """Learn what the layers and the embeddings return."""
        ids, mask = trace_inputs(self.model, 1, 3)
        templates: list[Any] = []

        def layer_forward(original, *args, **kwargs):
            out = original(*args, **kwargs)
            templates.append(out)
            return out

        def embeddings_forward(original, *args, **kwargs):
            out = original(*args, **kwargs)
            self._embedding_width = (out[0] if isinstance(out, tuple) else out).shape[-1]
            return out

        with ExitStack() as stack:
            for layer in self.layers or []:
                stack.enter_context(patched(layer, layer_forward))
            if self._embeddings is not None:
                stack.enter_context(patched(self._embeddings, embeddings_forward))
            self.model(input_ids=ids, attention_mask=mask)
        self._templates = [
            tuple(isinstance(part, Tensor) for part in out) if isinstance(out, tuple) else None for out in templates
        ]

    def run(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        start: int = 0,
        hidden: Tensor | None = None,
        stop: int | None = None,
        masks: Masks | None = None,
    ) -> Tensor:
        """Logits [B, C], or with `stop` the hidden states [B, L, D] that enter layer `stop` (depth: leave the last).

        input_ids, attention_mask [B, L]: of the replicas, k-major, where `masks` holds several samples.
        hidden: what enters layer `start`; start = 0 needs none.
        """
        return self._run(input_ids, attention_mask, masks or _NoMasks(), start, hidden, stop)

    def run_eagerly(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits [B, C] without masks, attention computed as it is where its probabilities are masked."""
        return self._run(input_ids, attention_mask, _Eager())

    def site_input(
        self, input_ids: Tensor, attention_mask: Tensor, site: Site, *, start: int = 0, hidden: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What enters a dropout site of the head in the deterministic pass, and that pass's logits."""
        capture = _Capture(self.model.get_submodule(site.path), site.occurrence)
        logits = self._run(input_ids, attention_mask, capture, start, hidden)
        return capture.value, logits

    @torch.inference_mode()
    def _run(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        handler: SiteHandler,
        start: int = 0,
        hidden: Tensor | None = None,
        stop: int | None = None,
    ) -> Tensor:
        step = _Step(self, start, hidden, stop, handler if isinstance(handler, Masks) else None)
        with ExitStack() as stack:
            stack.enter_context(intercept(self.model, handler))
            for layer in self.layers or []:
                stack.enter_context(patched(layer, step.layer))
            if hidden is not None and self._embeddings is not None and start > 0:
                stub = hidden.new_zeros(()).expand(*input_ids.shape, self._embedding_width)
                if step.masks is not None:
                    step.masks.skip_embeddings(self._embeddings)
                stack.enter_context(patched(self._embeddings, lambda original, *args, **kwargs: stub))
            try:
                return self.model(input_ids=input_ids, attention_mask=attention_mask).logits
            except _Reached as reached:
                return reached.hidden.to(input_ids.device)  # where a teacher is split over devices: back to where it began

    def like_layer(self, index: int, hidden: Tensor) -> Any:
        """`hidden` in the form in which layer call `index` returns its result."""
        template = self._templates[index]
        return hidden if template is None else tuple(hidden if is_tensor else None for is_tensor in template)


class _Step:
    """The layer calls of one `run`."""

    def __init__(self, split: ModelSplit, start: int, hidden: Tensor | None, stop: int | None, masks: Masks | None):
        self.split, self.start, self.hidden, self.stop, self.masks = split, start, hidden, stop, masks
        self.calls = 0

    def layer(self, original: Callable, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        index, self.calls = self.calls, self.calls + 1
        if index == self.start and self.hidden is not None:
            hidden_states = self.hidden
        if index == self.stop:
            raise _Reached(hidden_states)
        if index < self.start:
            if self.masks is not None:
                self.masks.skip_layer(index)
            if index == self.start - 1 == self.split.depth - 1:
                hidden_states = self.hidden
            return self.split.like_layer(index, hidden_states)
        out = original(hidden_states, *args, **kwargs)
        if index + 1 == self.stop == self.split.depth:
            raise _Reached(out[0] if isinstance(out, tuple) else out)
        return out
