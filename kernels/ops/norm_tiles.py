"""What the norms share on a GPU: rows as tuples of tiles [ROWS, BLOCK] in float32, 0 behind the last of D columns."""

from muka_fast.ops.philox import triton

if triton is not None:
    import triton.language as tl

    @triton.jit
    def load_columns(p, o_d, D: tl.constexpr, BLOCK: tl.constexpr):
        """What every row has one of a column of, [1, BLOCK] each; o_d: columns of the first tile."""
        b = ()
        for t in tl.static_range((D + BLOCK - 1) // BLOCK):
            b += (tl.load(p + t * BLOCK + o_d, mask=t * BLOCK + o_d < D, other=0.0).to(tl.float32),)
        return b

    @triton.jit
    def mean_and_rstd(b_x, b_sum, o_d, eps, D: tl.constexpr, BLOCK: tl.constexpr):
        """Mean and 1 / sqrt(variance + eps) of every row, [ROWS, 1]; b_sum: sum of the tiles b_x."""
        b_mean = tl.sum(b_sum, 1, keep_dims=True) * (1.0 / D)
        b_squares = tl.zeros_like(b_sum)
        for t in tl.static_range((D + BLOCK - 1) // BLOCK):
            b_centred = tl.where(t * BLOCK + o_d < D, b_x[t] - b_mean, 0.0)
            b_squares += b_centred * b_centred
        return b_mean, tl.rsqrt(tl.sum(b_squares, 1, keep_dims=True) * (1.0 / D) + eps)

    def tile(width: int, warps: int, lone: int) -> dict[str, int]:
        """Constexprs: a row is BLOCK columns at a time, eight a lane, of one warp up to `lone` columns; others have other rows."""
        block = 256 if width <= lone else min(256 * warps, triton.next_power_of_2(triton.cdiv(width, 2)))
        return {"D": width, "ROWS": 256 * warps // block, "BLOCK": block}
