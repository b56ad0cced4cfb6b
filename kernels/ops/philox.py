"""What the masked ops share: seeds, argument checks and the Triton side of the mask contract.

    Philox4x32-10, key = (seed_lo, seed_hi); counter = (element // 8, sample, site, example id), all uint32
    one call gives 4 x 32 bits = eight 16-bit lanes, low half first; lane element % 8 belongs to the element
    dropped where lane < t = round-half-even(p * 65536); kept values times float32(65536 / (65536 - t))

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. The C++ twin is csrc/philox.h.
"""

import os
from functools import cache

import torch
from torch import Tensor

from muka_fast.ops.reference import LANES, Draws, dropout_scale, dropout_threshold

try:
    import triton
    import triton.language as tl
except ImportError:  # platforms without Triton run the C++ or the PyTorch implementation
    triton = None


def signed_seed(seed: int) -> int:
    """The 64-bit seed as torch and Triton carry it: int64, the same bits. Raises ValueError outside [0, 2^64)."""
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed {seed} is outside [0, 2^64)")
    return seed - (1 << 64) if seed >> 63 else seed


def unsigned_seed(seed: int) -> int:
    """Inverse of `signed_seed`."""
    return seed & 0xFFFFFFFFFFFFFFFF


def on_the_host(seed: int, first_sample: int, key: Tensor | None) -> tuple[int, int]:
    """Seed, unsigned, and first sample: those of the key where there is one."""
    seed, first_sample = (seed, first_sample) if key is None else key.tolist()
    return unsigned_seed(seed), first_sample


@cache
def mask_parameters(p: float) -> tuple[int, float]:
    """Threshold t and scale (a float that float32 holds exactly) of dropout probability p in [0, 65535.5 / 65536)."""
    return dropout_threshold(p), torch.tensor(dropout_scale(p), dtype=torch.float32).item()


def check_draws(draws: Draws | None, p: float, texts: int, device: torch.device) -> None:
    """ValueError where p draws masks and `draws` are not those of `texts` texts on this device."""
    if not dropout_threshold(p):
        return
    if draws is None:
        raise ValueError("draws are needed where p is not 0")
    check_counters(draws.site, 0, 1)
    check_key(draws.key, device)
    if check_rows("example_ids", draws.example_ids, texts, device).data_ptr() != draws.example_ids.data_ptr():
        raise ValueError(f"example_ids must be int64 and contiguous, on {device}")


def check_key(key: Tensor, device: torch.device) -> None:
    """ValueError where it is not that of `Draws`."""
    if key.dtype != torch.int64 or key.shape != (2,) or key.device != device or not key.is_contiguous():
        raise ValueError(f"key must be int64 [2] on {device}, seed and sample")


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


def philox_calls(width: int) -> int:
    """Philox calls of a row of `width` elements that begins with a call: eight lanes each, shared by no two rows."""
    return (width + LANES - 1) // LANES


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if triton is not None:
    IN_INTERPRETER = tl.constexpr(INTERPRETED)

    @triton.jit
    def wide_product(a, b):
        """High and low 32 bits of a * b by one instruction, where tl.umulhi and a product of their own often make two."""
        if IN_INTERPRETER:
            b_ab = a.to(tl.uint64) * b
            return (b_ab >> 32).to(tl.uint32), b_ab.to(tl.uint32)
        else:
            product: tl.constexpr = "{ .reg .b64 ab; mul.wide.u32 ab, $2, $3; mov.b64 {$1, $0}, ab; }"
            return tl.inline_asm_elementwise(product, "=r,=r,r,r", [a, b], dtype=(tl.uint32, tl.uint32), is_pure=True, pack=1)

    @triton.jit
    def philox_words(seed, c0, c1, c2, c3):
        """Four words uint32 of the counter (c0, c1, c2, c3), uint32 of one shape."""
        seed = seed.to(tl.uint64)
        key_0, key_1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
        for _ in tl.static_range(10):
            high_0, low_0 = wide_product(c0, 0xD2511F53)
            high_2, low_2 = wide_product(c2, 0xCD9E8D57)
            c0, c1, c2, c3 = high_2 ^ c1 ^ key_0, low_2, high_0 ^ c3 ^ key_1, low_0
            key_0 += 0x9E3779B9
            key_1 += 0xBB67AE85
        return c0, c1, c2, c3

    @triton.jit
    def words_of(seed, calls, sample, site, example, CALLS: tl.constexpr, ROWS: tl.constexpr):
        """The four words of each call, uint32 [ROWS, CALLS]."""
        zero = tl.zeros([ROWS, CALLS], tl.uint32)
        sample, site, example = sample.to(tl.uint32), site.to(tl.uint32), example.to(tl.uint32)
        return philox_words(seed, zero + calls.to(tl.uint32, bitcast=True), zero + sample, zero + site, zero + example)

    @triton.jit
    def in_order(w0, w1, w2, w3):
        """Four words of each call in lane order: [ROWS, CALLS, pair, word]; a last axis of two halves makes lanes of it."""
        return tl.join(tl.join(w0, w2), tl.join(w1, w3))

    @triton.jit
    def keep_lanes(seed, calls, sample, site, example, threshold, CALLS: tl.constexpr, ROWS: tl.constexpr):
        """True where kept, [ROWS, CALLS * 8]: calls int32 [ROWS, CALLS] (or [1, CALLS]), example int32 [ROWS, CALLS] or [ROWS, 1]."""
        w0, w1, w2, w3 = words_of(seed, calls, sample, site, example, CALLS, ROWS)
        words = in_order(w0, w1, w2, w3)
        # Halves are compared at the top of a word: the high one where it stands, which saves its shift.
        return tl.reshape(tl.join(words << 16, words), [ROWS, CALLS * 8]) >= threshold.to(tl.uint32) << 16

    @triton.jit
    def keep_bits(w, top):
        """Bits 0 and 1: the low and the high half of w are kept; top: threshold << 16."""
        return (w << 16 >= top).to(tl.int32) | (w >= top).to(tl.int32) << 1

    @triton.jit
    def keep_shifted_lanes(seed, calls, shift, sample, site, example, threshold, CALLS: tl.constexpr, ROWS: tl.constexpr):
        """As `keep_lanes`, of the elements from `shift` on: int32 [ROWS, 1] or one, 0 ... 7. Each eight of them are of two calls."""
        top = threshold.to(tl.uint32) << 16
        bits = tl.zeros([ROWS, CALLS], tl.int32)
        for i in tl.static_range(2):
            w0, w1, w2, w3 = words_of(seed, calls + i, sample, site, example, CALLS, ROWS)
            bits |= (keep_bits(w0, top) | keep_bits(w1, top) << 2 | keep_bits(w2, top) << 4 | keep_bits(w3, top) << 6) << 8 * i
        bits = bits >> shift
        words = in_order(bits, bits >> 2, bits >> 4, bits >> 6)
        return tl.reshape(tl.join(words & 1, words & 2), [ROWS, CALLS * 8]) != 0
