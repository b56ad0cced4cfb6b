// dropout_add_layer_norm on the CPU: layer_norm(mask(x) + residual) over replicas in one pass over a row that stays in cache.
// The residual of the first stochastic layer is one row per text, read once for all its replicas.
#include <pybind11/pybind11.h>

#include <cmath>

#include "cpu/mask_row.h"
#include "parallel.h"

namespace py = pybind11;

namespace muka_fast {
namespace {

constexpr int64_t kGrain = int64_t{1} << 19;  // elements per thread, about 1 ms

// row += residual, then normalised in place: two passes over a row in cache, so that the variance loses nothing to cancellation.
CLONES void add_and_normalize(float* __restrict row, const float* __restrict residual, const float* __restrict weight,
                              const float* __restrict bias, int64_t width, float eps) {
    float sum = 0.0f;
    for (int64_t i = 0; i < width; ++i) {
        row[i] += residual[i];
        sum += row[i];
    }
    const float mean = sum / static_cast<float>(width);
    float squares = 0.0f;
    for (int64_t i = 0; i < width; ++i) squares += (row[i] - mean) * (row[i] - mean);
    const float scale = 1.0f / std::sqrt(squares / static_cast<float>(width) + eps);
    for (int64_t i = 0; i < width; ++i) row[i] = (row[i] - mean) * scale * weight[i] + bias[i];
}

// x, y [R, rows, D]; residual [rows, D] (replica stride 0) or [R, rows, D]; weight, bias [D]; ids, offsets int64 [rows]; all float32.
// num_plain: how many leading replicas pass unmasked (0 or 1).
void dropout_add_layer_norm(uintptr_t x_address, uintptr_t residual_address, uintptr_t weight_address, uintptr_t bias_address,
                            uintptr_t y_address, uintptr_t ids_address, uintptr_t offsets_address, int64_t replicas, int64_t rows,
                            int64_t width, int64_t residual_stride, float eps, uint64_t seed, uint32_t site, uint32_t first_sample,
                            uint32_t threshold, float scale, int64_t num_plain, int num_threads) {
    const auto* x = reinterpret_cast<const float*>(x_address);
    const auto* residual = reinterpret_cast<const float*>(residual_address);
    const auto* weight = reinterpret_cast<const float*>(weight_address);
    const auto* bias = reinterpret_cast<const float*>(bias_address);
    auto* y = reinterpret_cast<float*>(y_address);
    const auto* ids = reinterpret_cast<const int64_t*>(ids_address);
    const auto* offsets = reinterpret_cast<const int64_t*>(offsets_address);
    const RowMasker mask = row_masker();
    const int64_t row_work = replicas * width;
    parallel_for(rows, num_threads, row_work > 0 ? (kGrain + row_work - 1) / row_work : rows, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row)
            for (int64_t r = 0; r < replicas; ++r) {
                const float* from = x + (r * rows + row) * width;
                float* to = y + (r * rows + row) * width;
                if (r < num_plain || threshold == 0) {
                    std::memcpy(to, from, width * sizeof(float));
                } else {
                    const MaskStream s{seed, first_sample + static_cast<uint32_t>(r - num_plain), site, static_cast<uint32_t>(ids[row]), threshold};
                    mask(s, static_cast<uint64_t>(offsets[row]), from, to, width, scale);
                }
                add_and_normalize(to, residual + r * residual_stride + row * width, weight, bias, width, eps);
            }
    });
}

}  // namespace

void bind_dropout_add_layer_norm(py::module_& m) {
    m.def("dropout_add_layer_norm", &dropout_add_layer_norm, py::call_guard<py::gil_scoped_release>());
}

}  // namespace muka_fast
