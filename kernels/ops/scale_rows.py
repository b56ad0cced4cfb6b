"""scale_rows: y[b] = grad[b] * factor[b] in any dtype, one pass: the backward pass of distill_loss on a GPU.

PyTorch's product with one factor a row reads single elements, and needs a second pass for another dtype.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from muka_fast.ops import table
from muka_fast.ops.aot import Specialisation
from muka_fast.ops.philox import triton

scale_rows: Callable | None = None
SPECIALISATIONS: list[Specialisation] = []
if triton is not None:
    import triton.language as tl

    from muka_fast.ops.fast_math import FUSED

    @triton.jit
    def scale_rows_kernel(
        p_grad,  # [B, C]
        p_factor,  # [B], factor_stride apart
        p_y,  # [B, C], may be p_grad
        C, factor_stride, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """BLOCK classes of one row per program, the last rows first: what the forward pass wrote last is still in the cache."""
        i = tl.num_programs(0) - 1 - tl.program_id(0)
        blocks = tl.cdiv(C, BLOCK)
        i_b = (i // blocks).to(tl.int64)
        o_c = i % blocks * BLOCK + tl.arange(0, BLOCK)
        b_y = tl.load(p_grad + i_b * C + o_c, mask=o_c < C) * tl.load(p_factor + i_b * factor_stride)
        tl.store(p_y + i_b * C + o_c, b_y.to(p_y.dtype.element_ty), mask=o_c < C)

    def configuration(classes: int) -> tuple[int, int]:
        """BLOCK and number of warps: up to four loads of 16 bytes a lane."""
        block = max(32, min(2048, triton.next_power_of_2(classes)))
        return block, max(1, block // 512)

    def scale_rows(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
        """grad [B, C], contiguous, times factor [B] in `dtype`; in place where grad is of that dtype."""
        product = grad if grad.dtype == dtype else torch.empty_like(grad, dtype=dtype)
        texts, classes = grad.shape
        if texts == 0:
            return product
        block, warps = configuration(classes)
        with table.on_device_of(grad):
            scale_rows_kernel[(texts * triton.cdiv(classes, block),)](
                grad, factor, product, classes, factor.stride(0), BLOCK=block, num_warps=warps, **FUSED
            )
        return product

    SPECIALISATIONS = [
        Specialisation(
            f"distill_loss backward {dtype} C={classes}",
            scale_rows_kernel,
            {"p_grad": "*fp32", "p_factor": "*fp32", "p_y": f"*{dtype}", "C": "i32", "factor_stride": "i64"},
            {"BLOCK": configuration(classes)[0]},
            num_warps=configuration(classes)[1],
        )
        for dtype in ("fp32", "fp16", "bf16")
        for classes in (4, 1200)
    ]
