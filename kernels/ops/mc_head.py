"""mc_head: the statistics of a linear classifier under K dropout masks of its input, in one pass over features and weights.

    z_k[b] = W (mask_k[b] * scale * x[b]) + bias,  P_k = softmax(z_k);  mean, variance and entropies of P_k over k (method.md 2)
    mask_k: element = feature column (method.md 5); deterministic logits: W x + bias

Bytes: features, weight and bias once, outputs once. Operations: K masks of D lanes a text (ten Philox rounds for eight lanes), and
2 K B C D floating-point operations for a dense product; the C++ kernel sums only the columns that a mask drops, the share p of
them. Never in memory: masks, [K, B, D], [K, B, C].
Letters: K samples (k) · B texts (b) · D features (d) · C classes (c).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from muka_fast.ops import philox, table
from muka_fast.ops.aot import Specialisation
from muka_fast.ops.philox import PHILOX_CALL_OPERATIONS, philox_calls
from muka_fast.ops.reference import mc_head_ref

SCHEMA = (
    "(Tensor features, Tensor weight, Tensor? bias, int num_samples, float p, int seed, int site, Tensor example_ids)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


class McHeadStatistics(NamedTuple):
    """Statistics of one teacher over its K masks, float32 (float64 for float64 features)."""

    mean_probs: Tensor  # [B, C]
    var_probs: Tensor  # [B, C] population variance
    predictive_entropy: Tensor  # [B] nats
    expected_entropy: Tensor  # [B] nats
    mutual_information: Tensor  # [B] nats, clamped at 0
    normalized_entropy: Tensor  # [B] in [0, 1]
    logits: Tensor  # [B, C] without dropout


def bytes_moved(num_texts: int, width: int, classes: int, itemsize: int = 4) -> int:
    """Bytes the op must read (features, weight, bias, ids) and write (three [B, C], four [B]), each once."""
    read = itemsize * (num_texts * width + classes * width + classes) + 8 * num_texts
    return read + 4 * (3 * num_texts * classes + 4 * num_texts)


def operations(num_samples: int, num_texts: int, width: int, classes: int) -> dict[str, int]:
    """What the op must compute: random lanes, integer operations behind them, dense-product flops, exponentials."""
    return {
        "philox_lanes": num_samples * num_texts * width,
        "philox_operations": num_samples * num_texts * philox_calls(0, width) * PHILOX_CALL_OPERATIONS,
        "dense_flops": 2 * (num_samples + 1) * num_texts * width * classes,
        "exponentials": num_samples * num_texts * classes,
    }


def _empty_outputs(features: Tensor, classes: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    texts = features.shape[0]
    shapes = [(texts, classes)] * 2 + [(texts,)] * 4 + [(texts, classes)]
    return tuple(features.new_empty(shape, dtype=dtype) for shape in shapes)


def mc_head_fake(
    features: Tensor, weight: Tensor, bias: Tensor | None, num_samples: int, p: float, seed: int, site: int, example_ids: Tensor
) -> tuple[Tensor, ...]:
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    return _empty_outputs(features, weight.shape[0], dtype)


def mc_head_reference(
    features: Tensor, weight: Tensor, bias: Tensor | None, num_samples: int, p: float, seed: int, site: int, example_ids: Tensor
) -> tuple[Tensor, ...]:
    outputs = mc_head_ref(features, weight, bias, num_samples, p, philox.unsigned_seed(seed), site, example_ids)
    return tuple(output.contiguous() for output in outputs)


def mc_head_cpu(
    features: Tensor, weight: Tensor, bias: Tensor | None, num_samples: int, p: float, seed: int, site: int, example_ids: Tensor
) -> tuple[Tensor, ...]:
    if features.dtype == torch.float64:  # only tests ask for it
        return mc_head_reference(features, weight, bias, num_samples, p, seed, site, example_ids)
    x, w = features.float().contiguous(), weight.float().contiguous()
    b = None if bias is None else bias.float().contiguous()
    threshold, scale = philox.mask_parameters(p)
    outputs = _empty_outputs(x, w.shape[0], torch.float32)
    table._C.mc_head(
        x.data_ptr(), w.data_ptr(), 0 if b is None else b.data_ptr(), example_ids.data_ptr(), num_samples,
        *x.shape, w.shape[0], philox.unsigned_seed(seed), site, threshold, scale, *(o.data_ptr() for o in outputs),
        torch.get_num_threads(),
    )  # fmt: skip
    return outputs


mc_head_triton: Callable | None = None
SPECIALISATIONS: list[Specialisation] = []

_op = table.register(
    "mc_head",
    SCHEMA,
    reference=mc_head_reference,
    cpu=None if table._C is None else mc_head_cpu,
    triton=mc_head_triton,
    fake=mc_head_fake,
)


def mc_head(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    num_samples: int,
    p: float,
    seed: int,
    site: int,
    example_ids: Tensor,
) -> McHeadStatistics:
    """Statistics over K dropout masks of `linear(features)`, and the deterministic logits. Not differentiable.

    features: [B, D], float32, float16, bfloat16 or float64. weight: [C, D]. bias: [C] or None. num_samples: K >= 1.
    p: dropout probability, 0 <= p < 1 (rounded to 1/65536). seed: 64 bits, unsigned. site: 0 ... 2^32 - 1.
    example_ids: int64 [B], wrap at 2^32. A NaN feature makes the text's statistics NaN unless every mask drops it.
    Raises ValueError for anything outside these ranges.
    """
    if features.dim() != 2 or weight.dim() != 2 or features.shape[1] != weight.shape[1] or weight.shape[0] < 1:
        raise ValueError(f"features [B, D] and weight [C, D] do not match: {list(features.shape)}, {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape [{weight.shape[0]}], not {list(bias.shape)}")
    if num_samples < 1 or not 0 <= site < 1 << 32:
        raise ValueError(f"num_samples {num_samples} must be at least 1 and site {site} in [0, 2^32)")
    philox.mask_parameters(p)
    ids = philox.check_rows("example_ids", example_ids, features.shape[0], features.device)
    return McHeadStatistics(*_op(features, weight, bias, num_samples, p, philox.signed_seed(seed), site, ids))
