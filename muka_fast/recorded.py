"""The student's step on one GPU as CUDA graphs: recorded once per shape of a batch, replayed from then on.

A step of a small batch is a few thousand launches, which take the host longer than the work takes the device (an H200, 16 texts and
BERT-base in bf16: 33 ms and 6 ms). Two replays launch it all: to the logits, and from their gradient through backward, clipping and
AdamW. The loss between them runs as it is, so that every method has its own.
"""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from muka_fast.config import RunConfig
from muka_fast.errors import UserError, first_line
from muka_fast.memory import send
from muka_fast.ops.adamw import AdamW, Rule, Tensors

log = logging.getLogger("muka_fast")
LARGEST = 1 << 24  # B x L x D: from there on the device's work hides the launches, and activations would be held twice
# Keys of a ds_config that a recorded step obeys. What else is enabled (a profiler, a monitor, a scheduler) DeepSpeed's own step does.
OBEYED = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "optimizer", "gradient_clipping"}
OBEYED |= {"bf16", "zero_optimization", "zero_allow_untested_optimizer", "steps_per_print", "timers"}


class Recording(NamedTuple):
    """Two graphs over memory of their own. `forward` reads inputs and leaves logits; `update` reads the gradient of these, changes
    the weights and leaves the norm of their gradient, before clipping."""

    forward: torch.cuda.CUDAGraph
    update: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor]
    logits: Tensor
    grad: Tensor
    norm: Tensor
    addresses: Tensor  # of the weights' gradients, as `AdamW.step` takes them


def recordable(model: nn.Module, config: RunConfig, ds_config: dict[str, Any]) -> bool:
    """Whether the steps of this run are those of one process with whole weights, all of a batch at once."""
    return (
        config.cuda_graphs
        and ds_config["zero_optimization"]["stage"] == 0
        and ds_config["train_batch_size"] == ds_config["train_micro_batch_size_per_gpu"]
        and not any(enabled(value) for key, value in ds_config.items() if key not in OBEYED)
        and not config.activation_checkpointing
        and isinstance(model, PreTrainedModel)  # else it gives more than logits
        and not any(getattr(module, "layerdrop", 0) for module in model.modules())  # drawn on the host: for ever what it was once
    )


def enabled(value: Any) -> bool:
    """Whether an entry of a ds_config asks for anything."""
    return value.get("enabled", True) if isinstance(value, dict) else bool(value)


class RecordedSteps:
    """Steps of a student by the weights, moments and rule of `optimizer`, torch's AdamW or Adam, which itself makes none.

    The first batch of a shape runs as it is, which compiles whatever its kernels need; the second is recorded. Dropout masks are those
    of a step that is not: a replay reads the texts and the epoch that training_layers.py has told by then.
    """

    def __init__(self, model: PreTrainedModel, in_bf16: bool, optimizer: torch.optim.Optimizer, max_norm: float) -> None:
        """in_bf16: forwards run under autocast; max_norm: gradients are clipped to it. Its groups differ in their decay alone."""
        # What autocast would cast at every use, tensor by tensor, and gradients back, AdamW casts as it writes, and reads as it is.
        linear = {id(p) for module in model.modules() if isinstance(module, nn.Linear) for p in module.parameters(recurse=False)}
        whole = {name: p for name, p in model.named_parameters() if in_bf16 and id(p) in linear}
        self.casts = {name: p.detach().bfloat16().requires_grad_(p.requires_grad) for name, p in whole.items()}
        self.cast_from = list(whole.values())
        self.learnt = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.leaves = [self.casts.get(name, p) for name, p in self.learnt.items()]
        self.width = model.config.get_text_config().hidden_size
        self.model, self.in_bf16, self.optimizer = model, in_bf16, optimizer
        group = optimizer.param_groups[0]
        coupled = not isinstance(optimizer, torch.optim.AdamW)
        self.rule = Rule(group["betas"], group["eps"], max_norm, coupled)
        self.adamw: AdamW | None = None  # at the first step: a checkpoint gives the optimizer other moments
        self.rates = torch.zeros(3, device=model.device)
        self.pool: Any = None
        self.stream: torch.cuda.Stream | None = None
        self.met: dict[tuple[int, ...], Recording | None] = {}
        self.too_large: set[tuple[int, ...]] = set()  # shapes for whose recording there was no memory
        self.possible: bool | None = None
        self.replayed: Recording | None = None
        self.leaf: Tensor | None = None

    def fits(self, texts: int, length: int) -> bool:
        """Whether batches of this shape are recorded where any are."""
        return texts * length * self.width <= LARGEST and (texts, length) not in self.too_large

    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits [B, C] of a batch on the device, input_ids [B, L] among it; their gradient is what `update` takes."""
        shape = tuple(batch["input_ids"].shape)
        if self.possible and shape in self.met and self.met[shape] is None and self.fits(*shape):
            self.met[shape] = self._record(batch) or self._record_again(batch)
        self.replayed = self.met.setdefault(shape, None)
        if self.replayed is None:
            return self._try(batch) if self.possible is None else self._logits(batch)
        for name, values in self.replayed.inputs.items():
            values.copy_(batch[name])
        self.replayed.forward.replay()
        self.leaf = self.replayed.logits.detach().requires_grad_()
        return self.leaf

    def update(self, lr: float, step: int) -> Tensor:
        """Step 1, 2, ... of the run: clip, change the weights, forget the gradients; the norm before clipping."""
        self.rates.copy_(send(torch.tensor(self.rule.rates(lr, step)), self.rates.device))
        if self.replayed is None:
            return self._update()
        self.replayed.grad.copy_(self.leaf.grad)
        self.replayed.update.replay()
        return self.replayed.norm

    def _logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        # Not cached: a recording would keep casts as they were.
        with torch.autocast(self.rates.device.type, torch.bfloat16, enabled=self.in_bf16, cache_enabled=False):
            return functional_call(self.model, self.casts, kwargs=dict(batch)).logits

    def _cast(self) -> None:
        if self.casts:
            with torch.no_grad():
                torch._foreach_copy_(list(self.casts.values()), self.cast_from)

    def _update(self) -> Tensor:
        adamw = self._adamw()
        grads = adamw.readable([leaf.grad for leaf in self.leaves])
        for leaf in self.leaves:
            leaf.grad = None
        return adamw.step(grads, self.rates, send(adamw.addresses(grads), self.rates.device))

    def _adamw(self) -> AdamW:
        if self.adamw is None:
            decays = {p: group["weight_decay"] for group in self.optimizer.param_groups for p in group["params"]}
            weights, state = list(self.learnt.values()), self.optimizer.state
            exp_avgs, exp_avg_sqs = ([state[p][key] for p in weights] for key in ("exp_avg", "exp_avg_sq"))
            casts = [self.casts[name].detach() if name in self.casts else None for name in self.learnt]
            tensors = Tensors([p.detach() for p in weights], exp_avgs, exp_avg_sqs, casts, [decays[p] for p in weights])
            self.adamw = AdamW(tensors, self.rule)
        return self.adamw

    def _try(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The first forward of all, of weights that a checkpoint may have changed: a model that waits in it cannot be recorded."""
        self._cast()
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")  # which warns of itself
            try:
                logits = self._logits(batch)
            finally:
                torch.cuda.set_sync_debug_mode(before)
        waits = []
        for warning in told:
            if "synchroniz" not in str(warning.message):
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
            elif "prototype" not in str(warning.message):
                waits.append(f"{warning.filename}:{warning.lineno}")
        self.possible = not waits
        if waits:
            log.info("the student's forward waits for the GPU (%s): its steps are launched one kernel at a time", waits[0])
        return logits

    @contextmanager
    def _recording(self, graph: torch.cuda.CUDAGraph) -> Iterator[None]:
        """As torch.cuda.graph, which would also give all cached memory back, of the host too."""
        with torch.cuda.stream(self.stream):
            # Another thread's calls (NCCL's watchdog) are no concern of the recording.
            graph.capture_begin(self.pool, capture_error_mode="thread_local")
            try:
                yield
            finally:
                graph.capture_end()

    def _record_again(self, batch: Mapping[str, Tensor]) -> Recording | None:
        """After a lack of memory: while recording the allocator gives nothing back that launched steps have left in its caches."""
        torch.cuda.empty_cache()
        recording = self._record(batch)
        if recording is None:
            shape = tuple(batch["input_ids"].shape)
            self.too_large.add(shape)
            log.info("no memory is left to record steps of %d texts of %d tokens: they are launched one kernel at a time", *shape)
        return recording

    def _record(self, batch: Mapping[str, Tensor]) -> Recording | None:
        """None where there is not memory enough. Raises UserError where CUDA refuses."""
        inputs, adamw = {name: values.clone() for name, values in batch.items()}, self._adamw()
        forward, update = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        self.stream = self.stream or torch.cuda.Stream()
        if not any(self.met.values()):  # a pool of failed recordings alone, which is given back, cannot be recorded into
            self.pool = torch.cuda.graph_pool_handle()
        try:
            with self._recording(forward):
                logits = self._logits(inputs)
            grad, addresses = torch.zeros_like(logits), torch.zeros(len(self.leaves), dtype=torch.int64, device=logits.device)
            with self._recording(update):
                grads = adamw.readable(torch.autograd.grad(logits, self.leaves, grad, allow_unused=True))
                norm = adamw.step(grads, self.rates, addresses)
        except RuntimeError as error:
            # The end of a recording that failed may raise an error of its own. No name for either: it would keep this frame's memory.
            if isinstance(error.__context__ or error, torch.OutOfMemoryError):
                return None
            told = first_line(error.__context__ or error)
            raise UserError(f"the student's step cannot be recorded as a CUDA graph ({told}): train with --no-cuda_graphs") from error
        addresses.copy_(adamw.addresses(grads))  # known only now, and the replays'
        return Recording(forward, update, inputs, logits.detach(), grad, norm, addresses)
