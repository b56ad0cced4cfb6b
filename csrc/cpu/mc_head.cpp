// mc_head on the CPU: K masks, the classifier's product and the statistics over the masks, a block of texts at a time
// (kernels/ops/mc_head.py). Neither masks nor masked features nor all logits are ever in memory.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "cpu/isa.h"
#include "cpu/mc_statistics.h"
#include "parallel.h"
#include "philox.h"

namespace py = pybind11;

namespace muka_fast {
namespace mc_head {
namespace {

using namespace mc_statistics;

constexpr int64_t kTile = 96;                        // classes per tile: accumulators of 12 narrow vectors, 300 kB of weights at D = 768
constexpr int64_t kPad = 16;                         // classes are padded to the widest vector
constexpr int64_t kBlock = 16;                       // texts that share a pass over the weights
constexpr int64_t kBlockFloats = int64_t{1} << 20;   // logits of one block at most, where C is large
constexpr int64_t kChunk = 32;                       // features that are summed before their sum joins the total
constexpr int kOverrun = 12;                         // list entries written at once: hardly ever exceeded by 64 features at p = 0.1
constexpr int64_t kGrain = int64_t{1} << 20;         // masked elements per thread, about 1 ms

// The whole task. B texts, D features (width), C classes, padded to a multiple of kPad.
struct Head {
    int64_t num_samples, width, classes, padded;
    const float* features;         // [B, D]
    const int32_t* all;            // [D] 0, 1, 2, ...
    const float* packed;           // tiles of [D, up to kTile]
    const float* bias;             // [padded]
    const float* zeros;            // [kTile]
    const float* column_max;       // [D] largest |weight| of each feature
    const int64_t* example_ids;    // [B]
    KeepBits keep_bits;
    uint64_t seed;
    uint32_t site, threshold;
    float scale, log_classes;
    bool subtract;                 // masks drop at most half: sum what they drop
    float* logits;                 // [B, C] without dropout
    float *mean_probs, *var_probs;  // [B, C]
    float *predictive_entropy, *expected_entropy, *mutual_information, *normalized_entropy;  // [B]
};

struct Mask {
    int64_t count;  // features listed
    bool dropped;   // the list holds what is dropped, not what is kept
};

// Working memory of one thread.
struct Scratch {
    float* logits;      // [K, block, padded]
    float* base;        // [kTile] W x without bias
    uint64_t* keep;     // [D / 64, rounded up]
    float* energy;      // [D]
    float* statistics;  // as mc_statistics asks
    float* margin;      // [block], not used further
    float* selected;    // [block], not used further
    int32_t* lists;     // [block, K, D]
    Mask* masks;        // [block, K]
};

#define KERNEL_FILE "cpu/mc_head_kernel.h"
#include "cpu/each_isa.h"
#undef KERNEL_FILE

// weight [C, D] -> tiles of kTile classes, each [D, columns] with zeros behind the last class; column_max [D].
void pack_weight(const float* weight, int64_t classes, int64_t width, int64_t padded, float* packed, float* column_max, int threads) {
    const int64_t tiles = (padded + kTile - 1) / kTile;
    parallel_for(tiles, threads, 1 + kGrain / (kTile * width + 1), [&](int64_t begin, int64_t end) {
        for (int64_t tile = begin; tile < end; ++tile) {
            const int64_t first = tile * kTile, columns = padded - first < kTile ? padded - first : kTile;
            float* to = packed + first * width;
            for (int64_t d0 = 0; d0 < width; d0 += 16)  // squares that fit the first-level cache on both sides
                for (int64_t c = 0; c < columns; ++c)
                    for (int64_t d = d0; d < width && d < d0 + 16; ++d)
                        to[d * columns + c] = first + c < classes ? weight[(first + c) * width + d] : 0.0f;
        }
    });
    for (int64_t d = 0; d < width; ++d) column_max[d] = 0.0f;
    for (int64_t c = 0; c < classes; ++c)
        for (int64_t d = 0; d < width; ++d) {
            const float size = std::fabs(weight[c * width + d]);
            column_max[d] = column_max[d] < size ? size : column_max[d];
        }
}

template <class T>
std::unique_ptr<T[]> buffer(int64_t count) {
    return std::unique_ptr<T[]>(new T[count]);
}

// Pointers as integers, float32 and contiguous: features [B, D], weight [C, D], bias [C] or 0, example_ids int64 [B]; outputs as in Head.
void mc_head(uintptr_t features, uintptr_t weight, uintptr_t bias, uintptr_t example_ids, int64_t num_samples,
             int64_t num_texts, int64_t width, int64_t classes, uint64_t seed, uint32_t site, uint32_t threshold, float scale,
             uintptr_t mean_probs, uintptr_t var_probs, uintptr_t predictive_entropy, uintptr_t expected_entropy,
             uintptr_t mutual_information, uintptr_t normalized_entropy, uintptr_t logits, int threads) {
    auto floats = [](uintptr_t p) { return reinterpret_cast<float*>(p); };
    const int64_t padded = (classes + kPad - 1) / kPad * kPad;
    auto packed = buffer<float>(padded * width), column_max = buffer<float>(width);
    pack_weight(floats(weight), classes, width, padded, packed.get(), column_max.get(), threads);
    std::vector<float> padded_bias(padded, 0.0f), zeros(kTile, 0.0f);
    if (bias) std::copy(floats(bias), floats(bias) + classes, padded_bias.begin());
    auto all = buffer<int32_t>(width);
    for (int64_t d = 0; d < width; ++d) all[d] = static_cast<int32_t>(d);
    const int level = isa_level();
    const Head head{num_samples, width, classes, padded, floats(features), all.get(), packed.get(), padded_bias.data(), zeros.data(),
                    column_max.get(), reinterpret_cast<const int64_t*>(example_ids), keep_bits_function(level), seed, site, threshold, scale,
                    static_cast<float>(std::log(static_cast<double>(classes))), threshold <= 32768, floats(logits), floats(mean_probs), floats(var_probs),
                    floats(predictive_entropy), floats(expected_entropy), floats(mutual_information), floats(normalized_entropy)};
    const int64_t fitting = kBlockFloats / (num_samples * padded);
    const int64_t block = fitting < 1 ? 1 : fitting < kBlock ? fitting : kBlock;
    parallel_for(num_texts, threads, kGrain / (num_samples * width + 1) + 1, [&](int64_t begin, int64_t end) {
        auto sample_logits = buffer<float>(num_samples * block * padded), base = buffer<float>(kTile), energy = buffer<float>(width);
        auto work = buffer<float>(statistics_scratch(classes)), margin = buffer<float>(block), selected = buffer<float>(block);
        auto keep = buffer<uint64_t>((width + 63) / 64);
        auto lists = buffer<int32_t>(block * num_samples * width + kOverrun);
        auto masks = buffer<Mask>(block * num_samples);
        const Scratch scratch{sample_logits.get(), base.get(), keep.get(), energy.get(), work.get(), margin.get(), selected.get(), lists.get(), masks.get()};
        ISA_CALL(level, run_head, head, scratch, begin, end, block);
    });
}

}  // namespace
}  // namespace mc_head

void bind_mc_head(py::module_& m) { m.def("mc_head", &mc_head::mc_head, py::call_guard<py::gil_scoped_release>()); }

}  // namespace muka_fast
