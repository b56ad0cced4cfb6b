// mc_statistics on the CPU: the statistics of K stochastic passes of N teachers, each logit read once (kernels/ops/mc_statistics.py).
// Bound by the exponentials: about thirty vector instructions per LANES logits against four bytes read for each.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <memory>
#include <vector>

#include "cpu/isa.h"
#include "cpu/mc_statistics.h"
#include "parallel.h"

namespace py = pybind11;

namespace muka_fast {
namespace mc_statistics {
namespace {

constexpr int64_t kGrain = 400000;  // exponentials per thread, about half a millisecond

#define KERNEL_FILE "cpu/mc_statistics_kernel.h"
#include "cpu/each_isa.h"
#undef KERNEL_FILE

// Pointers as integers; dtype 0 float32, 1 float16, 2 bfloat16. per_text [B, 2 S + 4 N + 2], contiguous: mean, variance, the four
// entropies, selected teacher and teacher margin of a text side by side. The caller has checked shapes, strides and offsets.
void mc_statistics(uintptr_t logits, int dtype, int64_t num_samples, int64_t num_texts, int64_t sample_stride, int64_t text_stride,
                   const std::vector<int64_t>& offsets, uintptr_t per_text, int threads) {
    const int64_t teachers = static_cast<int64_t>(offsets.size()) - 1, width = offsets.back();
    std::vector<float> log_classes(teachers);
    int64_t widest = 0;
    for (int64_t i = 0; i < teachers; ++i) {
        const int64_t classes = offsets[i + 1] - offsets[i];
        log_classes[i] = static_cast<float>(std::log(static_cast<double>(classes)));
        widest = classes > widest ? classes : widest;
    }
    float* const probs = reinterpret_cast<float*>(per_text);
    float* const entropies = probs + 2 * width;
    const int64_t row = 2 * width + 4 * teachers + 2;
    const Problem problem{num_samples,
                          teachers,
                          sample_stride,
                          text_stride,
                          offsets.data(),
                          log_classes.data(),
                          probs,
                          probs + width,
                          entropies,
                          entropies + teachers,
                          entropies + 2 * teachers,
                          entropies + 3 * teachers,
                          entropies + 4 * teachers,
                          entropies + 4 * teachers + 1,
                          row,
                          row,
                          row};
    const int level = isa_level();
    const int64_t scratch_floats = statistics_scratch(widest);
    const int64_t grain = kGrain / (num_samples * width) + 1;
    parallel_for(num_texts, threads, grain, [&](int64_t begin, int64_t end) {
        std::unique_ptr<float[]> scratch(new float[scratch_floats]);
        ISA_CALL(level, run, problem, reinterpret_cast<const void*>(logits), dtype, begin, end, scratch.get());
    });
}

}  // namespace
}  // namespace mc_statistics

void bind_mc_statistics(py::module_& m) {
    m.def("mc_statistics", &mc_statistics::mc_statistics, py::call_guard<py::gil_scoped_release>());
    m.def("machine_isa", &machine_isa, "Widest instruction set of this machine: 0 baseline, 1 x86-64-v3, 2 x86-64-v4");
    m.def("limit_isa", [](int level) { isa_level() = level < machine_isa() ? level : machine_isa(); }, "For tests: use at most this level");
}

}  // namespace muka_fast
