// mc_head on the CPU: K masks, the classifier's product and the statistics over the masks, a block of texts at a time
// (kernels/ops/mc_head.py). Neither masks nor masked features nor all logits are ever in memory.
#include <pybind11/pybind11.h>

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
constexpr int64_t kGrain = int64_t{1} << 20;         // masked elements per thread, about 1 ms

// The whole task. B texts, D features (width), C classes, padded to a multiple of kPad.
struct Head {
    int64_t num_samples, width, classes, padded;
    const float* features;         // [B, D]
    const float* base;             // [B, C] W x without bias
    const float* packed;           // tiles of [D, up to kTile]
    const float* bias;             // [padded]
    const float* zeros;            // [kTile]
    const float* column_max;       // [D] largest |weight| of each feature
    const int64_t* example_ids;    // [B]
    uint64_t (*keep_bits)(const MaskStream&, uint64_t);
    uint64_t seed;
    uint32_t site, threshold;
    float scale, log_classes;
    bool subtract;                 // masks drop at most half: sum what they drop
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
    float* base;        // [block, padded]
    float* energy;      // [D]
    float* statistics;  // as mc_statistics asks
    float* margin;      // [block], not used further
    int64_t* selected;  // [block], not used further
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
            for (int64_t c = 0; c < columns; ++c)
                for (int64_t d = 0; d < width; ++d) to[d * columns + c] = first + c < classes ? weight[(first + c) * width + d] : 0.0f;
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

// Pointers as integers, float32 and contiguous: features [B, D], weight [C, D], bias [C] or 0, base [B, C] = features times weight,
// example_ids int64 [B]; six outputs as in Head.
void mc_head(uintptr_t features, uintptr_t weight, uintptr_t bias, uintptr_t base, uintptr_t example_ids, int64_t num_samples,
             int64_t num_texts, int64_t width, int64_t classes, uint64_t seed, uint32_t site, uint32_t threshold, float scale,
             uintptr_t mean_probs, uintptr_t var_probs, uintptr_t predictive_entropy, uintptr_t expected_entropy,
             uintptr_t mutual_information, uintptr_t normalized_entropy, int threads) {
    auto floats = [](uintptr_t p) { return reinterpret_cast<float*>(p); };
    const int64_t padded = (classes + kPad - 1) / kPad * kPad;
    auto packed = buffer<float>(padded * width), column_max = buffer<float>(width);
    pack_weight(floats(weight), classes, width, padded, packed.get(), column_max.get(), threads);
    std::vector<float> padded_bias(padded, 0.0f), zeros(kTile, 0.0f);
    if (bias) std::copy(floats(bias), floats(bias) + classes, padded_bias.begin());
    const int level = isa_level();
    auto bits = keep_bits_plain;
#ifdef MUKA_PHILOX_AVX2
    if (level >= 1) bits = keep_bits_avx2;
#endif
    const Head head{num_samples, width, classes, padded, floats(features), floats(base), packed.get(), padded_bias.data(), zeros.data(),
                    column_max.get(), reinterpret_cast<const int64_t*>(example_ids), bits, seed, site, threshold, scale,
                    static_cast<float>(std::log(static_cast<double>(classes))), threshold <= 32768, floats(mean_probs), floats(var_probs),
                    floats(predictive_entropy), floats(expected_entropy), floats(mutual_information), floats(normalized_entropy)};
    const int64_t fitting = kBlockFloats / (num_samples * padded);
    const int64_t block = fitting < 1 ? 1 : fitting < kBlock ? fitting : kBlock;
    parallel_for(num_texts, threads, kGrain / (num_samples * width + 1) + 1, [&](int64_t begin, int64_t end) {
        auto logits = buffer<float>(num_samples * block * padded), text_base = buffer<float>(block * padded), energy = buffer<float>(width);
        auto work = buffer<float>(statistics_scratch(classes)), margin = buffer<float>(block);
        auto selected = buffer<int64_t>(block);
        auto lists = buffer<int32_t>(block * num_samples * width);
        auto masks = buffer<Mask>(block * num_samples);
        const Scratch scratch{logits.get(), text_base.get(), energy.get(), work.get(), margin.get(), selected.get(), lists.get(), masks.get()};
        ISA_CALL(level, run_head, head, scratch, begin, end, block);
    });
}

}  // namespace
}  // namespace mc_head

void bind_mc_head(py::module_& m) { m.def("mc_head", &mc_head::mc_head, py::call_guard<py::gil_scoped_release>()); }

}  // namespace muka_fast
