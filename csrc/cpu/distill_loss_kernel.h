// The arithmetic of distill_loss for one instruction set; compiled through each_isa.h.
//
// One text at a time: its target q, and its logits, then their exponentials, live in two rows of scratch in the first-level cache.
#include "cpu/vector_math.h"

// One text's logits / T into `row`, padded with -inf to whole vectors; returns their maximum (NaN may be passed over).
template <class T>
INLINE float stage_logits(const T* x, int64_t classes, float inverse_temperature, float* row) {
    const Vec scale = splat(inverse_temperature);
    const int64_t whole = classes / LANES * LANES;
    Vec best = splat(-__builtin_inff());
    for (int64_t c = 0; c < whole; c += LANES) {
        const Vec v = load(x + c) * scale;
        store(row + c, v);
        best = vmax(v, best);
    }
    if (whole < classes) {
        store(row + whole, splat(-__builtin_inff()));
        if (classes >= LANES) {  // the last LANES logits, some of them once more: scalar stores would stall the vector loads to come
            const Vec v = load(x + classes - LANES) * scale;
            store(row + classes - LANES, v);
            best = vmax(v, best);
        } else {
            for (int64_t c = 0; c < classes; ++c) row[c] = widen(x[c]) * inverse_temperature;
            best = load(row);
        }
    }
    return reduce_max(best);
}

INLINE Vec lane_number() {
    Vec number;
    for (int lane = 0; lane < LANES; ++lane) number[lane] = (float)lane;
    return number;
}

// softmax(scores / tau) over the teachers; `weights` holds whole vectors.
static void soft_weights(const float* scores, int64_t teachers, float inverse_tau, float* weights) {
    const Vec top = splat(stage_logits(scores, teachers, inverse_tau, weights));
    Vec sum{}, unused;
    for (int64_t i = 0; i < teachers; i += LANES) {
        const Vec e = exp_nonpositive(load(weights + i) - top, unused);
        store(weights + i, e);
        sum += e;
    }
    const Vec scale = splat(1.0f / reduce_sum(sum));
    for (int64_t i = 0; i < teachers; i += LANES) store(weights + i, load(weights + i) * scale);
}

// q of one text [classes, padded with zeros]: every run is a piece of a teacher's block that lands on consecutive classes.
// q has room for one vector more than padded: the last vector of a run adds zeros to what lies behind it.
static void compose_target(const Problem& p, int64_t text, int64_t padded, float* weights, float* q) {
    const float* probs = p.teacher_probs + text * p.probs_stride;
    for (int64_t c = 0; c < padded; c += LANES) store(q + c, Vec{});
    int64_t only = -1;
    if (p.soft) {
        soft_weights(p.scores + text * p.num_teachers, p.num_teachers, p.inverse_tau, weights);
    } else {
        only = p.selected[text];
    }
    for (const Run* run = p.runs; run != p.runs + p.num_runs; ++run) {
        if (only >= 0 && run->teacher != only) continue;
        const float weight = only >= 0 ? 1.0f : weights[run->teacher];
        const float* from = probs + run->from;
        float* to = q + run->to;
        int64_t c = 0;
        for (; c + LANES <= run->length; c += LANES) store(to + c, load(to + c) + load(from + c) * splat(weight));
        if (c < run->length && run->from + c + LANES <= p.width) {
            const Vec v = lane_number() < splat((float)(run->length - c)) ? load(from + c) * splat(weight) : splat(0.0f);
            store(to + c, load(to + c) + v);
        } else {
            for (; c < run->length; ++c) to[c] += weight * from[c];
        }
    }
}

// KL(q, softmax(z / T)) = sum q ln q - sum q d + (sum q) ln(sum exp d), d = z / T - max; gradient ((sum q) p - q) / T.
template <class T>
static void texts(const Problem& p, const T* logits, int64_t begin, int64_t end, float* scratch) {
    const int64_t classes = p.num_classes, padded = (classes + LANES - 1) / LANES * LANES, whole = classes / LANES * LANES;
    float *row = scratch, *q = row + padded, *weights = q + padded + LANES;
    for (int64_t text = begin; text < end; ++text) {
        compose_target(p, text, padded, weights, q);
        const Vec top = splat(stage_logits(logits + text * p.logits_stride, classes, p.inverse_temperature, row));
        Vec sum{}, mass{}, cross{}, unused;
        for (int64_t first = 0; first < padded; first += kSumBlock * LANES) {
            // Sums of sums: over 10,000 classes one running sum alone would lose two digits.
            const int64_t last = first + kSumBlock * LANES < padded ? first + kSumBlock * LANES : padded;
            Vec block_sum{}, block_mass{}, block_cross{};
            for (int64_t c = first; c < last; c += LANES) {
                const Vec d = load(row + c) - top, target = load(q + c), e = exp_nonpositive(d, unused);
                store(row + c, e);
                block_sum += e;
                block_mass += target;
                // Where q is 0 the student's log-probability must not enter, be it -inf.
                block_cross += target < splat(1.17549435e-38f) ? splat(0.0f) : target * (log_normal(target) - d);
            }
            sum += block_sum, mass += block_mass, cross += block_cross;
        }
        const float total = reduce_sum(sum), target_mass = reduce_sum(mass), factor = p.factors ? p.factors[text] : 1.0f;
        const float divergence = reduce_sum(cross) + target_mass * log_positive(splat(total))[0];
        p.loss[text] = divergence * factor;
        const float step = factor * p.inverse_temperature;
        const Vec of_student = splat(target_mass / total * step), of_target = splat(step);
        float* grad = p.grad + text * classes;
        for (int64_t c = 0; c < whole; c += LANES) store(grad + c, load(row + c) * of_student - load(q + c) * of_target);
        if (whole < classes && classes >= LANES) {
            const int64_t c = classes - LANES;
            store(grad + c, load(row + c) * of_student - load(q + c) * of_target);
        } else {
            for (int64_t c = whole; c < classes; ++c) grad[c] = row[c] * of_student[0] - q[c] * of_target[0];
        }
    }
}

static void run(const Problem& p, const void* logits, int dtype, int64_t begin, int64_t end, float* scratch) {
    if (dtype == 1) return texts(p, (const Float16*)logits, begin, end, scratch);
    if (dtype == 2) return texts(p, (const BFloat16*)logits, begin, end, scratch);
    texts(p, (const float*)logits, begin, end, scratch);
}
