"""What the masked ops share: seeds, argument checks and the Triton side of the mask contract.

    Philox4x32-10, key = (seed_lo, seed_hi); counter = (element // 8, sample, site, example id), all uint32
    one call gives 4 x 32 bits = eight 16-bit lanes, low half first; lane element % 8 belongs to the element
    dropped where lane < t = round-half-even(p * 65536); kept values times float32(65536 / (65536 - t))

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. The C++ twin is csrc/philox.h.
"""

import torch
from torch import Tensor

from muka_fast.ops.reference import LANES, dropout_scale, dropout_threshold

try:
    import triton
    import triton.language as tl
except ImportError:  # platforms without Triton run the C++ or the PyTorch implementation
    triton = None

# 32-bit multiplications of one call: two per round, each giving a low and a high half. The op's cost in `operations`.
PHILOX_CALL_OPERATIONS = 10 * (2 * 2 + 4)


def signed_seed(seed: int) -> int:
    """The 64-bit seed as torch and Triton carry it: int64, the same bits. Raises ValueError outside [0, 2^64)."""
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed {seed} is outside [0, 2^64)")
    return seed - (1 << 64) if seed >> 63 else seed


def unsigned_seed(seed: int) -> int:
    """Inverse of `signed_seed`."""
    return seed & 0xFFFFFFFFFFFFFFFF


def mask_parameters(p: float) -> tuple[int, float]:
    """Threshold t and scale (a float that float32 holds exactly) of dropout probability p in [0, 65535.5 / 65536)."""
    return dropout_threshold(p), torch.tensor(dropout_scale(p), dtype=torch.float32).item()


def check_rows(name: str, value: Tensor, rows: int, device: torch.device) -> Tensor:
    """`value` as a contiguous int64 [rows] tensor on `device`; ValueError where it is not one entry a row or not an integer."""
    if value.shape != (rows,):
        raise ValueError(f"{name} must have shape [{rows}], one entry per row, not {list(value.shape)}")
    if value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool:
        raise ValueError(f"{name} must hold integers, not {value.dtype}")
    return value.to(device=device, dtype=torch.int64).contiguous()


def check_counters(site: int, first_sample: int, num_samples: int) -> None:
    """ValueError where the site or one of the samples first_sample ... first_sample + num_samples - 1 is no uint32."""
    if not 0 <= site < 1 << 32 or not 0 <= first_sample <= (1 << 32) - num_samples:
        raise ValueError(f"site {site} and {num_samples} samples from {first_sample} must be in [0, 2^32)")


def philox_calls(first_element: int, width: int) -> int:
    """Philox calls that cover `width` elements from `first_element`: eight lanes each, shared by no two rows."""
    return (first_element + width + LANES - 1) // LANES - first_element // LANES if width else 0


if triton is not None:

    @triton.jit
    def keep_lanes(seed, calls, sample, site, example, threshold, CALLS: tl.constexpr, ROWS: tl.constexpr):
        """True where kept, [ROWS, CALLS * 8]: calls int32 [ROWS, CALLS] (or [1, CALLS]), example int32 [ROWS, CALLS] or [ROWS, 1]."""
        c0 = tl.broadcast_to(calls.to(tl.uint32, bitcast=True), [ROWS, CALLS])
        zero = tl.zeros([ROWS, CALLS], tl.uint32)
        w0, w1, w2, w3 = tl.philox(seed, c0, zero + sample.to(tl.uint32), zero + site.to(tl.uint32), zero + example.to(tl.uint32))
        # Natural lane order by joins: element 8 * call + 4 * (pair) + 2 * (word of the pair) + half.
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).to(tl.uint32)  # [ROWS, CALLS, pair, word]
        lanes = tl.join(words & 0xFFFF, words >> 16)  # [ROWS, CALLS, pair, word, half]
        return tl.reshape(lanes, [ROWS, CALLS * 8]) >= threshold
