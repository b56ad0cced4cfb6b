// one_query_attention on the CPU: one query per text over its packed keys; one softmax, K masks of its probabilities.
// Per text and head: L d multiply-adds for the scores, once; then K (L d) for the values. Probabilities never leave the cache.
#include <pybind11/pybind11.h>

#include <cmath>
#include <vector>

#include "cpu/mask_row.h"
#include "parallel.h"

namespace py = pybind11;

namespace muka_fast {
namespace {

constexpr int64_t kGrain = int64_t{1} << 20;           // multiply-adds per thread, about 1 ms
constexpr uint64_t kAttentionStride = 16384;           // ATTENTION_STRIDE of kernels/ops/reference.py

// probs[l] = softmax_l(scaling * q . k_l + bias_l); key rows lie `stride` floats apart.
CLONES void softmax_scores(const float* __restrict q, const float* __restrict key, const float* __restrict bias, float* __restrict probs,
                           int64_t length, int64_t head_dim, int64_t stride, float scaling) {
    float highest = -INFINITY;
    for (int64_t l = 0; l < length; ++l) {
        float dot = 0.0f;
        for (int64_t j = 0; j < head_dim; ++j) dot += q[j] * key[l * stride + j];
        probs[l] = dot * scaling + (bias ? bias[l] : 0.0f);
        highest = probs[l] > highest ? probs[l] : highest;
    }
    float sum = 0.0f;
    for (int64_t l = 0; l < length; ++l) sum += (probs[l] = std::exp(probs[l] - highest));
    const float scale = 1.0f / sum;
    for (int64_t l = 0; l < length; ++l) probs[l] *= scale;
}

// out[j] = sum_l probs[l] value[l][j]
CLONES void weighted_values(const float* __restrict probs, const float* __restrict value, float* __restrict out, int64_t length,
                            int64_t head_dim, int64_t stride) {
    for (int64_t j = 0; j < head_dim; ++j) out[j] = 0.0f;
    for (int64_t l = 0; l < length; ++l) {
        const float p = probs[l];
        for (int64_t j = 0; j < head_dim; ++j) out[j] += p * value[l * stride + j];
    }
}

// query [B, H * d], key and value [T, G * d] with row stride key_stride, starts int64 [B + 1], bias [H, bias_stride] or 0,
// out [R, B, H * d], ids and positions int64 [B]; float32. num_plain: leading replicas without mask (0 or 1).
void one_query_attention(uintptr_t query_address, uintptr_t key_address, uintptr_t value_address, uintptr_t starts_address,
                         uintptr_t bias_address, uintptr_t out_address, uintptr_t ids_address, uintptr_t positions_address,
                         int64_t replicas, int64_t texts, int64_t num_heads, int64_t num_key_heads, int64_t head_dim,
                         int64_t bias_stride, float scaling, uint64_t seed, uint32_t site, uint32_t first_sample, uint32_t threshold,
                         float scale, int64_t num_plain, int num_threads) {
    const auto* query = reinterpret_cast<const float*>(query_address);
    const auto* key = reinterpret_cast<const float*>(key_address);
    const auto* value = reinterpret_cast<const float*>(value_address);
    const auto* starts = reinterpret_cast<const int64_t*>(starts_address);
    const auto* bias = reinterpret_cast<const float*>(bias_address);
    auto* out = reinterpret_cast<float*>(out_address);
    const auto* ids = reinterpret_cast<const int64_t*>(ids_address);
    const auto* positions = reinterpret_cast<const int64_t*>(positions_address);
    const RowMasker mask = row_masker();
    const int64_t width = num_heads * head_dim, stride = num_key_heads * head_dim, group = num_heads / num_key_heads;
    const int64_t tokens = texts ? starts[texts] - starts[0] : 0;
    const int64_t text_work = texts ? tokens * width * (replicas + 1) / texts + 1 : 1;
    parallel_for(texts, num_threads, (kGrain + text_work - 1) / text_work, [&](int64_t begin, int64_t end) {
        std::vector<float> probs, masked;
        for (int64_t b = begin; b < end; ++b) {
            const int64_t length = starts[b + 1] - starts[b];
            probs.resize(length), masked.resize(length);
            for (int64_t h = 0; h < num_heads; ++h) {
                const int64_t column = starts[b] * stride + (h / group) * head_dim;
                softmax_scores(query + b * width + h * head_dim, key + column, bias ? bias + h * bias_stride : nullptr, probs.data(),
                               length, head_dim, stride, scaling);
                const uint64_t element = (static_cast<uint64_t>(h) * kAttentionStride + static_cast<uint64_t>(positions[b])) * kAttentionStride;
                for (int64_t r = 0; r < replicas; ++r) {
                    const float* weights = probs.data();
                    if (r >= num_plain && threshold != 0) {
                        const MaskStream s{seed, first_sample + static_cast<uint32_t>(r - num_plain), site, static_cast<uint32_t>(ids[b]), threshold};
                        mask(s, element, probs.data(), masked.data(), length, scale);
                        weights = masked.data();
                    }
                    weighted_values(weights, value + column, out + (r * texts + b) * width + h * head_dim, length, head_dim, stride);
                }
            }
        }
    });
}

}  // namespace

void bind_one_query_attention(py::module_& m) {
    m.def("one_query_attention", &one_query_attention, py::call_guard<py::gil_scoped_release>());
}

}  // namespace muka_fast
