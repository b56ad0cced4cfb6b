// Masking one row of float32: y[i] = x[i] * scale where element + i of the stream is kept, else 0.
#pragma once

#include "cpu/isa.h"
#include "philox.h"

namespace muka_fast {

using RowMasker = void (*)(const MaskStream& s, uint64_t element, const float* x, float* y, int64_t width, float scale);

inline void mask_plain(const MaskStream& s, uint64_t element, const float* x, float* y, int64_t width, float scale) {
    int64_t i = 0;
    while (i < width) {
        const uint32_t keep = keep_byte(s, (element + i) / kLanes);
        for (int lane = (element + i) % kLanes; lane < kLanes && i < width; ++lane, ++i) y[i] = (keep >> lane) & 1 ? x[i] * scale : 0.0f;
    }
}

#ifdef MUKA_PHILOX_AVX2
__attribute__((target("avx2"), always_inline)) inline void mask_16(__m256i lanes, __m256i threshold, __m256 scale, const float* x, float* y) {
    const __m256i keep = keep_lanes(lanes, threshold);
    const __m256 low = _mm256_castsi256_ps(_mm256_cvtepi16_epi32(_mm256_castsi256_si128(keep)));
    const __m256 high = _mm256_castsi256_ps(_mm256_cvtepi16_epi32(_mm256_extracti128_si256(keep, 1)));
    // AND with all ones or zeros selects: a dropped NaN or infinity becomes 0, as in the reference.
    _mm256_storeu_ps(y, _mm256_and_ps(low, _mm256_mul_ps(_mm256_loadu_ps(x), scale)));
    _mm256_storeu_ps(y + 8, _mm256_and_ps(high, _mm256_mul_ps(_mm256_loadu_ps(x + 8), scale)));
}

__attribute__((target("avx2"))) inline void mask_avx2(const MaskStream& s, uint64_t element, const float* x, float* y, int64_t width, float scale) {
    // Elements before the first whole call: only the data are then unaligned, never the lanes.
    int64_t i = (kLanes - static_cast<int64_t>(element % kLanes)) % kLanes;
    i = i < width ? i : width;
    mask_plain(s, element, x, y, i, scale);
    const __m256i threshold = _mm256_set1_epi16(static_cast<int16_t>(s.threshold));
    const __m256 scales = _mm256_set1_ps(scale);
    for (; i < width; i += 64) {
        __m256i lanes[4];
        philox_x8(s, (element + i) / kLanes, lanes);
        const int64_t left = width - i;
        int j = 0;
        if (left >= 64) {
            for (; j < 4; ++j) mask_16(lanes[j], threshold, scales, x + i + 16 * j, y + i + 16 * j);
            continue;
        }
        for (; 16 * (j + 1) <= left; ++j) mask_16(lanes[j], threshold, scales, x + i + 16 * j, y + i + 16 * j);
        if (16 * j < left) {
            alignas(32) float in[16] = {}, out[16];
            std::memcpy(in, x + i + 16 * j, (left - 16 * j) * sizeof(float));
            mask_16(lanes[j], threshold, scales, in, out);
            std::memcpy(y + i + 16 * j, out, (left - 16 * j) * sizeof(float));
        }
    }
}

__attribute__((target(MUKA_AVX512))) inline void mask_avx512(const MaskStream& s, uint64_t element, const float* x, float* y, int64_t width, float scale) {
    const __m512 scales = _mm512_set1_ps(scale);
    // Starts at the beginning of the first call, so before the row where that begins inside a call: masked out like the row's end.
    const int64_t skipped = static_cast<int64_t>(element % kLanes);
    uint64_t valid = ~uint64_t{0} << skipped;
    for (int64_t i = -skipped; i < width; i += 64, valid = ~uint64_t{0}) {
        if (width - i < 64) valid &= (uint64_t{1} << (width - i)) - 1;
        const uint64_t keep = keep_word_avx512(s, (element + i) / kLanes);
        for (int j = 0; j < 64; j += 16) {
            const __mmask16 here = static_cast<__mmask16>(valid >> j), kept = static_cast<__mmask16>((keep & valid) >> j);
            _mm512_mask_storeu_ps(y + i + j, here, _mm512_maskz_mul_ps(kept, _mm512_maskz_loadu_ps(kept, x + i + j), scales));
        }
    }
}
#endif

// The fastest one that this processor has.
inline RowMasker row_masker() {
#ifdef MUKA_PHILOX_AVX2
    if (isa_level() >= 2) return mask_avx512;
    if (isa_level() == 1) return mask_avx2;
#endif
    return mask_plain;
}

}  // namespace muka_fast
