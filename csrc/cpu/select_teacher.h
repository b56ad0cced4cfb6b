// The choice of a teacher by its score, for the ops that make one (mc_statistics, mc_head, distill_loss).
#pragma once

#include <cmath>
#include <cstdint>

namespace muka_fast {

// Best score(i), ties to the lowest index, NaN never. Returns the margin to the second: 1 for a teacher alone, NaN beside a NaN.
template <class Score>
inline float select_teacher(int64_t teachers, Score score, int64_t& selected) {
    float best = -HUGE_VALF, second = -HUGE_VALF;
    bool nan = false;
    selected = 0;
    for (int64_t i = 0; i < teachers; ++i) {
        const float s = score(i);
        nan |= s != s;
        if (s > best) {
            second = best;
            best = s;
            selected = i;
        } else if (s > second) {
            second = s;
        }
    }
    return nan ? NAN : teachers == 1 ? 1.0f : best - second;
}

}  // namespace muka_fast
