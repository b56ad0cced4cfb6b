"""What arithmetic of Triton kernels is made of one instruction of the card each: exp and log in base 2, a product and a sum.

exp(x) = exp2(x * LOG2_E), ln x = LN_2 * log2(x), where tl.exp takes two and tl.log twenty instructions. Both are as exact as their
arguments in float32: each errs by about 1e-7 near 1.
"""

from muka_fast.ops.philox import triton

FUSED = {"enable_fp_fusion": True}  # of every launch: a b + c in one instruction, which Triton 3.10 no longer does unasked
if triton is not None:
    import triton.language as tl
    from triton.language.extra import libdevice

    from muka_fast.ops.philox import IN_INTERPRETER

    LOG2_E, LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
    LOWEST = tl.constexpr(-3.0e38)  # finite start of a running maximum: differences are no NaN where all so far is -inf
    TINY = tl.constexpr(2.0**-126)  # the least argument that log2 does not take for 0

    @triton.jit
    def log2(x):
        if IN_INTERPRETER:  # which lacks the function
            return tl.log2(x)
        return libdevice.fast_log2f(x)

    @triton.jit
    def minus_p_log_p(p):
        """-p ln p; 0 for 0."""
        return p * log2(tl.maximum(p, TINY)) * -LN_2

    @triton.jit
    def reciprocal(x):
        """1 / x of a normal number, to the last bit but one; the division takes eight instructions more for all others."""
        if IN_INTERPRETER:
            return 1.0 / x
        return libdevice.fast_dividef(1.0, x)
