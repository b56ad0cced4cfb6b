"""What a model costs, from its configuration alone: parameters, FLOPs, activations, bytes per process under each ZeRO stage.

The model is built on PyTorch's meta device, where tensors have shapes and no values, and run there once. P parameters, N processes.
"""

import copy
import time
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from muka_fast.errors import UserError, first_line
from muka_fast.sites import AnyValue
from muka_fast.teachers import DTYPES, settle_forward
from muka_fast.tokenizer import position_limit

STAGES = ("0", "1", "2", "3", "3 offload")
# DeepSpeed's defaults, in elements: gradients under way, whole weights at work and fetched ahead, weights too small to partition.
REDUCE_BUCKET, LIVE_WEIGHTS, PREFETCHED_WEIGHTS, PERSISTENT_WEIGHT = 500_000_000, 1_000_000_000, 50_000_000, 100_000
MEASURED_FLOPS = 1e10  # of one timed forward, a fraction of a second on a slow core
MEASURED_LAYERS = 2
DECODER_LAYERS = ("decoder_layers", "num_decoder_layers")  # BART's and T5's name for the number of them


@dataclass(frozen=True)
class Footprint:
    """num_parameters: P; small_parameters: of tensors that ZeRO-3 leaves whole; forward_flops and activation_bytes: of one batch;
    tokens: of a text in it, which a model may cut."""

    num_parameters: int
    small_parameters: int
    forward_flops: int
    activation_bytes: int
    tokens: int


@dataclass(frozen=True)
class StageMemory:
    """Bytes on one process of training under one ZeRO stage. buffers: at most; host: what offload puts into the node's memory."""

    stage: str
    weights: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int
    host: int

    @property
    def device(self) -> int:
        """Bytes on the GPU."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.buffers


def unloaded(config: PreTrainedConfig, precision: str) -> PreTrainedModel:
    """The classifier that a configuration describes, as a run would use it, with random weights."""
    model = AutoModelForSequenceClassification.from_config(config, dtype=DTYPES[precision], trust_remote_code=False)
    settle_forward(model)
    return model


def footprint(config: PreTrainedConfig, texts: int, tokens: int, precision: str, what: str) -> Footprint:
    """Run a classifier in training mode over `texts` x `tokens`, or as many as it takes, on the meta device. Raises UserError where
    it cannot."""
    kept: dict[int, torch.UntypedStorage] = {}
    try:
        with torch.device("meta"):
            model = unloaded(config, precision).train()
            tokens = min(tokens, position_limit(model))
            ids = torch.zeros(texts, tokens, dtype=torch.int64)
        weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                kept[storage._cdata] = storage  # held, so that its address stays its own
            return tensor

        with AnyValue(), FlopCounterMode(display=False) as flops, torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
    except Exception as error:  # whatever a model does without values
        told = first_line(error)
        if isinstance(error, RuntimeError) and any(word in str(error).lower() for word in ("meta", "pytorch")):  # for its developers
            told = f"a model of type {config.model_type} does not run without weights and texts"
        raise UserError(f"{what}: cannot be planned from its configuration: {told}") from error
    sizes = [parameter.numel() for parameter in model.parameters()]
    small = sum(size for size in sizes if size <= PERSISTENT_WEIGHT)
    return Footprint(sum(sizes), small, flops.get_total_flops(), sum(storage.nbytes() for storage in kept.values()), tokens)


def stage_memory(stage: str, cost: Footprint, processes: int, precision: str) -> StageMemory:
    """Weights, gradients, fp32 master weights and moments of AdamW as ZeRO partitions them (arXiv 1910.02054), and its buffers.

    Without ZeRO the weights are fp32 and need no master weights: 16 P bytes, in bf16 2 P more of casts that the backward keeps.
    From stage 1 on it is 4 P (2 P in half precision) of weights and of gradients and 12 P of optimizer state, of which each stage
    partitions one more: the state, the gradients, the weights.
    """
    width, share = DTYPES[precision].itemsize, -(-cost.num_parameters // processes)
    whole = width * cost.num_parameters
    common = {"stage": stage, "activations": cost.activation_bytes, "host": 0}
    if stage == "0":
        casts, whole = (0 if precision == "fp32" else whole), 4 * cost.num_parameters
        buffers = min(whole, 4 * REDUCE_BUCKET) if processes > 1 else 0
        return StageMemory(weights=whole + casts, gradients=whole, optimizer=8 * cost.num_parameters, buffers=buffers, **common)
    bucket = width * REDUCE_BUCKET
    if stage in ("1", "2"):
        gradients = whole if stage == "1" else width * share
        # configs/zero2.json overlaps communication, which takes a second bucket.
        buffers = bucket * int(stage)
        return StageMemory(weights=whole, gradients=gradients, optimizer=12 * share, buffers=buffers, **common)
    buffers = bucket + min(whole, width * (LIVE_WEIGHTS + PREFETCHED_WEIGHTS))
    small = width * cost.small_parameters if processes > 1 else 0
    if stage == "3":
        return StageMemory(weights=width * share + small, gradients=width * share, optimizer=12 * share, buffers=buffers, **common)
    # Gradients are collected in fp32 where the optimizer runs.
    common["host"] = (width + 12 + 4) * share
    return StageMemory(weights=small, gradients=0, optimizer=0, buffers=buffers, **common)


def measured_flops(config: PreTrainedConfig, texts: int, tokens: int, precision: str, device: str, train: bool, what: str) -> float:
    """FLOP/s that this machine reaches on a model of this shape, cut to two layers with random weights: forward, or with backward.

    Takes a few seconds. Raises UserError where the model cannot be cut or does not fit.
    """
    try:
        small = reduced(config)
        cost = footprint(small, 1, tokens, precision, what)
        texts = max(1, min(texts, int(MEASURED_FLOPS / max(cost.forward_flops, 1))))
        autocast = train and device == "cpu" and precision == "bf16"
        model = unloaded(small, "fp32" if autocast else precision).to(device).train(train)
        ids = torch.ones(texts, cost.tokens, dtype=torch.int64, device=device)
        if small.is_encoder_decoder:
            ids[:, -1] = small.eos_token_id  # which its head looks for

        def work() -> None:
            with torch.set_grad_enabled(train), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            if train:
                logits.float().square().mean().backward()
                model.zero_grad()
            if device != "cpu":
                torch.cuda.synchronize()

        work()  # the first one allocates
        start, rounds = time.perf_counter(), 0
        while rounds < 2 or time.perf_counter() - start < 0.5:
            work()
            rounds += 1
        seconds = (time.perf_counter() - start) / rounds
    except Exception as error:  # out of memory, or a configuration that cannot be cut
        raise UserError(f"{what}: its speed cannot be measured here ({first_line(error)}); give --flops or --gpu") from error
    return cost.forward_flops * texts * (3 if train else 1) / seconds


def reduced(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration with two layers and a small vocabulary: every layer costs the same, and a look-up costs nothing."""
    small, layers = copy.deepcopy(config), config.num_hidden_layers
    small.num_hidden_layers = min(layers, MEASURED_LAYERS)
    for name in DECODER_LAYERS:
        if hasattr(config, name):
            setattr(small, name, min(getattr(config, name), MEASURED_LAYERS))
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == layers:  # a kind for each layer
            setattr(small, name, value[: small.num_hidden_layers])
    if hasattr(config, "vocab_size"):  # CANINE hashes letters
        small.vocab_size = min(config.vocab_size, 1000)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "decoder_start_token_id"):
        if getattr(config, name, None) is not None:
            setattr(small, name, 0)
    return small
