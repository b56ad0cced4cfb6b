// repeat_dropout on the CPU: K masked copies of every row; each row is read once from memory and stays in cache for its K copies.
// Bound by the Philox rounds (ten per eight elements), then by the stores.
#include <pybind11/pybind11.h>

#include "cpu/mask_row.h"
#include "parallel.h"

namespace py = pybind11;

namespace muka_fast {
namespace {

constexpr int64_t kGrain = int64_t{1} << 18;  // elements written per thread, about a quarter of a millisecond

// x: [rows, D] (sample_stride 0) or [K, rows, D] (sample_stride rows * D), float32; y: [K, rows, D]; ids, offsets: int64 [rows].
void repeat_dropout(uintptr_t x_address, uintptr_t y_address, uintptr_t ids_address, uintptr_t offsets_address, int64_t num_samples,
                    int64_t rows, int64_t width, int64_t sample_stride, uint64_t seed, uint32_t site, uint32_t first_sample,
                    uint32_t threshold, float scale, int num_threads) {
    const auto* x = reinterpret_cast<const float*>(x_address);
    auto* y = reinterpret_cast<float*>(y_address);
    const auto* ids = reinterpret_cast<const int64_t*>(ids_address);
    const auto* offsets = reinterpret_cast<const int64_t*>(offsets_address);
    const RowMasker mask = row_masker();
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

// Door for tests and benchmarks: the keep bits of elements 0 ... 64 * words - 1 of one stream.
void keep_bits(uintptr_t out, int64_t words, uint64_t seed, uint32_t sample, uint32_t site, uint32_t example, uint32_t threshold) {
    const MaskStream stream{seed, sample, site, example, threshold};
    keep_bits_function(isa_level())(stream, 0, words, reinterpret_cast<uint64_t*>(out));
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
