// What every user of mc_statistics_kernel.h shares: the problem's description and the scalar end of each text.
#pragma once

#include <cmath>
#include <cstdint>

#include "cpu/select_teacher.h"

namespace muka_fast {
namespace mc_statistics {

struct Problem {
    int64_t num_samples, num_teachers;
    int64_t sample_stride, text_stride;  // in elements; the classes of one text are consecutive
    const int64_t* offsets;              // [N + 1]
    const float* log_classes;            // [N] ln C_i
    float *mean_probs, *var_probs;       // [B, S], rows probs_stride apart
    float *predictive_entropy, *expected_entropy, *mutual_information, *normalized_entropy;  // [B, N], rows entropy_stride apart
    float *selected, *teacher_margin;    // [B], selection_stride apart; the selected teacher's number as a float, exact below 2^24
    int64_t probs_stride, entropy_stride, selection_stride;
};

// How many sums of up to `classes` exponentials may be multiplied before the product leaves float32's range.
inline int64_t products_per_log(int64_t classes) {
    const int bits = 64 - __builtin_clzll(static_cast<unsigned long long>(classes));
    return 120 / bits;
}

// NaN fails every comparison below and is kept: a teacher that computed nonsense must not look certain.
inline void write_entropies(const Problem& p, int64_t text, int64_t teacher, float predictive, float expected) {
    const int64_t at = text * p.entropy_stride + teacher;
    const float h = predictive < 0 ? 0.0f : predictive, e = expected < 0 ? 0.0f : expected, upper = p.log_classes[teacher];
    p.predictive_entropy[at] = h;
    p.expected_entropy[at] = e;
    p.mutual_information[at] = h - e < 0 ? 0.0f : h - e;
    p.normalized_entropy[at] = upper > 0 ? h / upper : h * 0.0f;
}

// Lowest normalised entropy; ties and NaN as in select_teacher.
inline void select(const Problem& p, int64_t text) {
    const float* entropy = p.normalized_entropy + text * p.entropy_stride;
    int64_t selected;
    p.teacher_margin[text * p.selection_stride] = select_teacher(p.num_teachers, [&](int64_t i) { return -entropy[i]; }, selected);
    p.selected[text * p.selection_stride] = static_cast<float>(selected);
}

// Floats of working memory that one thread needs, where the widest teacher has `widest` classes.
inline int64_t statistics_scratch(int64_t widest) {
    // Narrow blocks need up to 3 * 31 vectors of 16, wide rows three rows of whole vectors.
    return 3 * (widest + 16) + 3 * 32 * 16;
}

}  // namespace mc_statistics
}  // namespace muka_fast
