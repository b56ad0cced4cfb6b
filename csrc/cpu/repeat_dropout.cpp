// repeat_dropout on the CPU: K masked copies of every row; each row is read once from memory and stays in cache for its K copies.
// Bound by the Philox rounds (ten per eight elements), then by the stores.
#include <pybind11/pybind11.h>

#include "parallel.h"
#include "philox.h"

namespace py = pybind11;

namespace muka_fast {
namespace {

constexpr int64_t kGrain = int64_t{1} << 20;  // elements written per thread, about 1 ms

void mask_plain(const MaskStream& s, uint64_t element, const float* x, float* y, int64_t width, float scale) {
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

__attribute__((target("avx2"))) void mask_avx2(const MaskStream& s, uint64_t element, const float* x, float* y, int64_t width, float scale) {
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
#endif

// x: [rows, D] (sample_stride 0) or [K, rows, D] (sample_stride rows * D), float32; y: [K, rows, D]; ids, offsets: int64 [rows].
void repeat_dropout(uintptr_t x_address, uintptr_t y_address, uintptr_t ids_address, uintptr_t offsets_address, int64_t num_samples,
                    int64_t rows, int64_t width, int64_t sample_stride, uint64_t seed, uint32_t site, uint32_t first_sample,
                    uint32_t threshold, float scale, int num_threads) {
    const auto* x = reinterpret_cast<const float*>(x_address);
    auto* y = reinterpret_cast<float*>(y_address);
    const auto* ids = reinterpret_cast<const int64_t*>(ids_address);
    const auto* offsets = reinterpret_cast<const int64_t*>(offsets_address);
    auto mask = mask_plain;
#ifdef MUKA_PHILOX_AVX2
    if (has_avx2()) mask = mask_avx2;
#endif
    const int64_t row_work = num_samples * width;
    parallel_for(rows, num_threads, row_work > 0 ? (kGrain + row_work - 1) / row_work : rows, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row)
            for (int64_t k = 0; k < num_samples; ++k) {
                const MaskStream s{seed, first_sample + static_cast<uint32_t>(k), site, static_cast<uint32_t>(ids[row]), threshold};
                const float* from = x + k * sample_stride + row * width;
                float* to = y + (k * rows + row) * width;
                if (threshold == 0)
                    std::memcpy(to, from, width * sizeof(float));
                else
                    mask(s, static_cast<uint64_t>(offsets[row]), from, to, width, scale);
            }
    });
}

// Test and benchmark door: the keep bits themselves, no data. Fills out[(count + 63) / 64] from element 0 of one stream.
void keep_bits(uintptr_t out_address, int64_t count, uint64_t seed, uint32_t sample, uint32_t site, uint32_t example, uint32_t threshold,
               bool plain) {
    auto* out = reinterpret_cast<uint64_t*>(out_address);
    const MaskStream s{seed, sample, site, example, threshold};
    auto bits = keep_bits_plain;
#ifdef MUKA_PHILOX_AVX2
    if (has_avx2() && !plain) bits = keep_bits_avx2;
#else
    (void)plain;
#endif
    for (int64_t i = 0; 64 * i < count; ++i) out[i] = bits(s, 8 * static_cast<uint64_t>(i));
}

}  // namespace

void bind_repeat_dropout(py::module_& m) {
    m.def("repeat_dropout", &repeat_dropout, py::call_guard<py::gil_scoped_release>());
    m.def("keep_bits", &keep_bits, py::call_guard<py::gil_scoped_release>());
    m.def("philox4x32", [](uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t seed) {
        uint32_t w[4];
        philox4x32(c0, c1, c2, c3, seed, w);
        return py::make_tuple(w[0], w[1], w[2], w[3]);
    });
}

}  // namespace muka_fast
