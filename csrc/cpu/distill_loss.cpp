// distill_loss on the CPU: the composed target, the divergence and its gradient, one text at a time (kernels/ops/distill_loss.py).
// Bound by one exponential and one logarithm per student class; no target of more than one text is ever in memory.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <stdexcept>
#include <vector>

#include "cpu/isa.h"
#include "cpu/select_teacher.h"
#include "parallel.h"

namespace py = pybind11;

namespace muka_fast {
namespace distill_loss {
namespace {

constexpr int64_t kGrain = 200000;  // classes of teachers and student per thread, about half a millisecond
constexpr int64_t kSumBlock = 32;    // vectors per partial sum
constexpr double kMarginFloor = 1e-6;

// A piece of teacher `teacher`'s block, columns [from, from + length), that lands on classes [to, to + length).
struct Run {
    int64_t teacher, from, to, length;
};

struct Problem {
    int64_t num_teachers, width, num_classes;  // width: S
    int64_t logits_stride, probs_stride;  // between texts, in elements
    const float* teacher_probs;           // [B, S]
    const float* scores;                  // [B, N]
    const Run* runs;
    int64_t num_runs;
    const int64_t* selected;  // [B], hard only
    const float* factors;     // [B] teacher margin + 1e-6, or null
    bool soft;
    float inverse_tau, inverse_temperature;
    float* loss;  // [B]
    float* grad;  // [B, C]
};

// Disjoint teachers in order give one run each; a shuffled or shared label space gives more and shorter ones.
std::vector<Run> find_runs(const std::vector<int64_t>& offsets, const int64_t* teacher_to_union, int64_t num_classes) {
    std::vector<Run> runs;
    for (size_t i = 0; i + 1 < offsets.size(); ++i)
        for (int64_t s = offsets[i]; s < offsets[i + 1]; ++s) {
            if (teacher_to_union[s] < 0 || teacher_to_union[s] >= num_classes)
                throw std::invalid_argument("teacher_to_union has an entry outside the student's classes");
            if (s > offsets[i] && teacher_to_union[s] == teacher_to_union[s - 1] + 1)
                ++runs.back().length;
            else
                runs.push_back({static_cast<int64_t>(i), s, teacher_to_union[s], 1});
        }
    return runs;
}

#define KERNEL_FILE "cpu/distill_loss_kernel.h"
#include "cpu/each_isa.h"
#undef KERNEL_FILE

// Pointers as integers; dtype of the logits: 0 float32, 1 float16, 2 bfloat16. The caller has checked shapes, strides and
// offsets.
void distill_loss(uintptr_t logits, int dtype, int64_t num_texts, int64_t num_classes, int64_t logits_stride, uintptr_t teacher_probs,
                  int64_t probs_stride, uintptr_t scores, const std::vector<int64_t>& offsets, uintptr_t teacher_to_union, bool soft,
                  double tau, double temperature, bool margin, uintptr_t loss, uintptr_t grad, int threads) {
    const int64_t teachers = static_cast<int64_t>(offsets.size()) - 1;
    const std::vector<Run> runs = find_runs(offsets, reinterpret_cast<const int64_t*>(teacher_to_union), num_classes);
    const float* score_rows = reinterpret_cast<const float*>(scores);
    std::vector<int64_t> selected(num_texts);
    std::vector<float> factors(num_texts);
    for (int64_t text = 0; text < num_texts; ++text) {
        const float* row = score_rows + text * teachers;
        const float teacher_margin = select_teacher(teachers, [&](int64_t i) { return row[i]; }, selected[text]);
        // In double: reassociated to (best + floor) - second in float, the floor of a tie would lose 5 %.
        factors[text] = static_cast<float>(static_cast<double>(teacher_margin) + kMarginFloor);
    }
    const Problem problem{teachers,
                          offsets.back(),
                          num_classes,
                          logits_stride,
                          probs_stride,
                          reinterpret_cast<const float*>(teacher_probs),
                          score_rows,
                          runs.data(),
                          static_cast<int64_t>(runs.size()),
                          selected.data(),
                          margin ? factors.data() : nullptr,
                          soft,
                          static_cast<float>(1.0 / tau),
                          static_cast<float>(1.0 / temperature),
                          reinterpret_cast<float*>(loss),
                          reinterpret_cast<float*>(grad)};
    const int level = isa_level();
    const int64_t scratch_floats = 2 * (num_classes + 16) + 16 + teachers + 16;
    const int64_t grain = kGrain / (num_classes + offsets.back()) + 1;
    parallel_for(num_texts, threads, grain, [&](int64_t begin, int64_t end) {
        std::unique_ptr<float[]> scratch(new float[scratch_floats]);
        ISA_CALL(level, run, problem, reinterpret_cast<const void*>(logits), dtype, begin, end, scratch.get());
    });
}

}  // namespace
}  // namespace distill_loss

void bind_distill_loss(py::module_& m) {
    m.def("distill_loss", &distill_loss::distill_loss, py::call_guard<py::gil_scoped_release>());
}

}  // namespace muka_fast
