// Vectors of LANES floats with exp and log of our own; part of a kernel file (see each_isa.h), so no include guard.
//
// NaN stays NaN everywhere: comparisons are written so that a NaN operand takes the branch that keeps it.
typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef float VecLoose __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t VecInt __attribute__((vector_size(LANES * 4)));
typedef uint16_t VecHalf __attribute__((vector_size(LANES * 2), aligned(2), may_alias));
typedef uint32_t VecBits __attribute__((vector_size(LANES * 4)));

INLINE Vec splat(float x) { return Vec{} + x; }
INLINE Vec load(const float* p) { return *(const VecLoose*)p; }
INLINE void store(float* p, Vec x) { *(VecLoose*)p = x; }
INLINE Vec vmax(Vec a, Vec b) { return a > b ? a : b; }

// The 16-bit formats, widened exactly.
struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

INLINE Vec load(const BFloat16* p) { return (Vec)(__builtin_convertvector(*(const VecHalf*)p, VecBits) << 16); }

INLINE Vec load(const Float16* p) {
    const VecBits half = __builtin_convertvector(*(const VecHalf*)p, VecBits);
    const VecBits magnitude = (half & 0x7fff) << 13;
    const VecBits finite = (VecBits)((Vec)magnitude * 0x1p112f);  // the exponent's new bias; right for denormals too
    const VecBits special = magnitude | 0x7f800000;                // infinity and NaN
    return (Vec)((magnitude >= (VecBits{} + 0x0f800000u) ? special : finite) | ((half & 0x8000) << 16));
}

INLINE float widen(float x) { return x; }
INLINE float widen(BFloat16 x) {
    const uint32_t bits = (uint32_t)x.bits << 16;
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}
INLINE float widen(Float16 x) {
    const uint32_t magnitude = (uint32_t)(x.bits & 0x7fff) << 13;
    float value;
    __builtin_memcpy(&value, &magnitude, 4);
    value *= 0x1p112f;
    uint32_t bits = magnitude | 0x7f800000;
    if (magnitude < 0x0f800000u) __builtin_memcpy(&bits, &value, 4);
    bits |= (uint32_t)(x.bits & 0x8000) << 16;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

// exp(x) for x <= 0: relative error below 1e-7; exactly 0 below -87 (where float32 leaves its normal range), exactly 1 at 0.
// `product` becomes exp(x) * x, which is 0 where exp is, so that 0 ln 0 = 0 holds for x = -inf as well.
INLINE Vec exp_nonpositive(Vec x, Vec& product) {
    const Vec low = splat(-87.0f);
    const Vec bounded = x < low ? low : x;
    // To nearest by truncation, as the argument is not positive. (Adding and subtracting a large constant would be simplified away.)
    const VecInt power = __builtin_convertvector(bounded * 1.44269504f - 0.5f, VecInt);
    const Vec n = __builtin_convertvector(power, Vec);
    const Vec r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
    // Minimax on |r| <= ln 2 / 2, leading 1 + r fixed.
    const Vec r2 = r * r;
    const Vec even = 0.49999994f + r * 0.16666515f;
    const Vec odd = 0.041668456f + r * 0.008369419f;
    const Vec tail = even + r2 * (odd + r2 * 0.0013813145f);
    const Vec scaled = (Vec)((power + 127) << 23) * (1.0f + (r + r2 * tail));
    const Vec value = x < low ? splat(0.0f) : scaled;
    product = value * bounded;
    return value;
}

// ln(x) for x > 0 normal. Zero and below, infinity and NaN give some number.
INLINE Vec log_normal(Vec x) {
    const VecInt bits = (VecInt)x - 0x3f3504f3;  // sqrt(1/2)
    const Vec exponent = __builtin_convertvector(bits >> 23, Vec);
    const Vec f = (Vec)((bits & 0x007fffff) + 0x3f3504f3) - 1.0f;
    // Minimax on [sqrt(1/2) - 1, sqrt(2) - 1], leading f - f^2 / 2 fixed; no division, which would cost as much as all the rest.
    const Vec f2 = f * f;
    const Vec high = (0.14197604f - f * 0.13168193f) + f2 * (0.12796742f - f * 0.076577708f);
    const Vec tail = (0.33333331f - f * 0.25000855f) + f2 * ((0.20001361f - f * 0.16622166f) + f2 * high);
    return exponent * 0.693147181f + (f + f2 * (f * tail - 0.5f));
}

// ln(x) for x > 0 normal; NaN stays NaN.
INLINE Vec log_positive(Vec x) { return x == x ? log_normal(x) : x; }

// x ln x with 0 ln 0 = 0; NaN stays NaN.
INLINE Vec x_log_x(Vec x) { return x < splat(1.17549435e-38f) ? splat(0.0f) : x * log_normal(x); }

// Halving: each step folds the upper half of what is left onto the lower one.
#if LANES == 16
#define FOLD(op, x)                                                                             \
    x = op(x, __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7)); \
    x = op(x, __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11)); \
    x = op(x, __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13)); \
    x = op(x, __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
#elif LANES == 8
#define FOLD(op, x)                                                     \
    x = op(x, __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3)); \
    x = op(x, __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5)); \
    x = op(x, __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6));
#else
#define FOLD(op, x)                                         \
    x = op(x, __builtin_shufflevector(x, x, 2, 3, 0, 1)); \
    x = op(x, __builtin_shufflevector(x, x, 1, 0, 3, 2));
#endif
INLINE Vec vadd(Vec a, Vec b) { return a + b; }

INLINE float reduce_max(Vec x) {
    FOLD(vmax, x)
    return x[0];
}

INLINE float reduce_sum(Vec x) {
    FOLD(vadd, x)
    return x[0];
}
#undef FOLD
