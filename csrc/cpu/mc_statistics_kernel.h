// The arithmetic of mc_statistics for one instruction set; compiled through each_isa.h.
//
// Per sample and teacher one pass finds the maximum, one takes the exponentials, one updates mean and variance (Welford), all on
// one text's classes in the first-level cache: every logit is read from memory once. Two layouts: vectors over classes (wide), and
// for few classes vectors over LANES texts (narrow).
#include "cpu/vector_math.h"

// Lays one text's logits into `row` and returns their maximum (a NaN may be passed over: its exponential is NaN all the same).
//
// Where classes is no multiple of LANES the last vector holds the last LANES logits, those that an earlier vector has replaced by
// -inf, whose exponential is 0. Needs classes >= LANES.
template <class T>
INLINE float stage_row(const T* x, int64_t classes, VecInt fresh, float* row) {
    const int64_t whole = classes / LANES * LANES;
    Vec best = splat(-__builtin_inff());
    for (int64_t c = 0; c < whole; c += LANES) {
        // The same sample of the next teacher or text: needed after the other samples of this one, when it will have arrived.
        __builtin_prefetch(x + c + classes, 0, 2);
        const Vec v = load(x + c);
        store(row + c, v);
        best = vmax(v, best);
    }
    if (whole < classes) {
        const Vec v = fresh ? load(x + classes - LANES) : splat(-__builtin_inff());
        store(row + whole, v);
        best = vmax(v, best);
    }
    return reduce_max(best);
}

// A sum of squares, fused and reassociated, may round to a little below 0. NaN stays NaN.
INLINE Vec nonnegative(Vec x) { return x < splat(0.0f) ? splat(0.0f) : x; }

// Writes the vectors of a row staged as above; the last one first, as its repeated lanes hold nothing.
INLINE void unstage_row(const float* row, int64_t classes, Vec scale, float* out) {
    const int64_t whole = classes / LANES * LANES;
    if (whole < classes) store(out + classes - LANES, nonnegative(load(row + whole) * scale));
    for (int64_t c = 0; c < whole; c += LANES) store(out + c, nonnegative(load(row + c) * scale));
}

// One teacher, one text. scratch: 3 * padded(classes) floats.
template <class T>
INLINE void wide_text(const T* x, int64_t sample_stride, int64_t samples, int64_t classes, float* scratch, float* mean_out, float* var_out,
                      float& predictive, float& expected) {
    const int64_t padded = (classes + LANES - 1) / LANES * LANES;
    float *row = scratch, *mean = scratch + padded, *m2 = scratch + 2 * padded;
    for (int64_t c = 0; c < 2 * padded; c += LANES) store(mean + c, Vec{});
    VecInt fresh;
    for (int lane = 0; lane < LANES; ++lane) fresh[lane] = lane >= padded - classes ? -1 : 0;
    // Sums of exponentials are gathered as a product, as long as it fits, and cost one logarithm per flush.
    const int64_t flush = products_per_log(classes);
    float product = 1.0f, log_sum = 0.0f, inner = 0.0f;
    for (int64_t k = 0; k < samples; ++k, x += sample_stride) {
        const Vec top = splat(stage_row(x, classes, fresh, row));
        Vec sum0{}, sum1{}, dot0{}, dot1{}, dot;
        int64_t c = 0;
        for (; c + LANES < padded; c += 2 * LANES) {
            const Vec e0 = exp_nonpositive(load(row + c) - top, dot);
            dot0 += dot;
            const Vec e1 = exp_nonpositive(load(row + c + LANES) - top, dot);
            dot1 += dot;
            store(row + c, e0);
            store(row + c + LANES, e1);
            sum0 += e0;
            sum1 += e1;
        }
        if (c < padded) {
            const Vec e = exp_nonpositive(load(row + c) - top, dot);
            store(row + c, e);
            sum0 += e;
            dot0 += dot;
        }
        const float sum = reduce_sum(sum0 + sum1), inverse = 1.0f / sum;
        inner += reduce_sum(dot0 + dot1) * inverse;
        product *= sum;
        if ((k + 1) % flush == 0) {
            log_sum += log_positive(splat(product))[0];
            product = 1.0f;
        }
        const Vec scale = splat(inverse), step = splat(1.0f / (float)(k + 1));
        for (c = 0; c < padded; c += LANES) {
            const Vec p = load(row + c) * scale, old = load(mean + c), delta = p - old, now = old + delta * step;
            store(mean + c, now);
            store(m2 + c, load(m2 + c) + delta * (p - now));
        }
    }
    log_sum += log_positive(splat(product))[0];
    Vec entropy{};
    for (int64_t c = 0; c < padded; c += LANES) entropy -= x_log_x(load(mean + c));
    unstage_row(mean, classes, splat(1.0f), mean_out);
    unstage_row(m2, classes, splat(1.0f / (float)samples), var_out);
    predictive = reduce_sum(entropy);
    expected = (log_sum - inner) / (float)samples;
}

// One teacher, LANES texts at once (the last ones repeat where fewer are left: rows[lane] says which). scratch: 3 * classes * LANES floats.
template <class T>
INLINE void narrow_texts(const T* const* rows, int64_t sample_stride, int64_t samples, int64_t classes, float* scratch, float* predictive,
                         float* expected) {
    float *block = scratch, *mean = scratch + classes * LANES, *m2 = scratch + 2 * classes * LANES;
    for (int64_t c = 0; c < 2 * classes; ++c) store(mean + c * LANES, Vec{});
    const int64_t flush = products_per_log(classes);
    Vec product = splat(1.0f), log_sum{}, inner{};
    for (int64_t k = 0; k < samples; ++k) {
        Vec top = splat(-__builtin_inff());
        for (int64_t c = 0; c < classes; ++c) {
            Vec v;
            for (int lane = 0; lane < LANES; ++lane) v[lane] = widen(rows[lane][k * sample_stride + c]);
            store(block + c * LANES, v);
            top = vmax(v, top);
        }
        Vec sum{}, dot_sum{}, dot;
        for (int64_t c = 0; c < classes; ++c) {
            const Vec e = exp_nonpositive(load(block + c * LANES) - top, dot);
            store(block + c * LANES, e);
            sum += e;
            dot_sum += dot;
        }
        const Vec inverse = 1.0f / sum, step = splat(1.0f / (float)(k + 1));
        inner += dot_sum * inverse;
        product *= sum;
        if ((k + 1) % flush == 0) {
            log_sum += log_positive(product);
            product = splat(1.0f);
        }
        for (int64_t c = 0; c < classes; ++c) {
            const Vec p = load(block + c * LANES) * inverse, old = load(mean + c * LANES), delta = p - old, now = old + delta * step;
            store(mean + c * LANES, now);
            store(m2 + c * LANES, load(m2 + c * LANES) + delta * (p - now));
        }
    }
    log_sum += log_positive(product);
    Vec entropy{};
    for (int64_t c = 0; c < classes; ++c) entropy -= x_log_x(load(mean + c * LANES));
    store(predictive, entropy);
    store(expected, (log_sum - inner) * splat(1.0f / (float)samples));
}

// One teacher's block of up to LANES texts, written out.
template <class T>
INLINE void narrow_block(const Problem& problem, const T* logits, int64_t first, int64_t texts, int64_t teacher, float* scratch) {
    const int64_t start = problem.offsets[teacher], classes = problem.offsets[teacher + 1] - start;
    const T* rows[LANES];
    for (int64_t lane = 0; lane < LANES; ++lane)
        rows[lane] = logits + (first + (lane < texts ? lane : texts - 1)) * problem.text_stride + start;
    float predictive[LANES], expected[LANES];
    narrow_texts(rows, problem.sample_stride, problem.num_samples, classes, scratch, predictive, expected);
    float *mean = scratch + classes * LANES, *m2 = scratch + 2 * classes * LANES;
    const Vec share = splat(1.0f / (float)problem.num_samples);
    for (int64_t c = 0; c < classes; ++c) store(m2 + c * LANES, nonnegative(load(m2 + c * LANES) * share));
    for (int64_t lane = 0; lane < texts; ++lane) {
        const int64_t at = (first + lane) * problem.probs_stride + start;
        for (int64_t c = 0; c < classes; ++c) {
            problem.mean_probs[at + c] = mean[c * LANES + lane];
            problem.var_probs[at + c] = m2[c * LANES + lane];
        }
        write_entropies(problem, first + lane, teacher, predictive[lane], expected[lane]);
    }
}

// Texts [begin, end) of all teachers. scratch: as many floats as statistics_scratch() says.
template <class T>
static void statistics(const Problem& problem, const T* logits, int64_t begin, int64_t end, float* scratch) {
    const int64_t* offsets = problem.offsets;
    const int64_t teachers = problem.num_teachers;
    for (int64_t first = begin; first < end; first += LANES) {
        const int64_t texts = end - first < LANES ? end - first : LANES;
        for (int64_t i = 0; i < teachers; ++i)
            if (offsets[i + 1] - offsets[i] < 2 * LANES) narrow_block(problem, logits, first, texts, i, scratch);
        for (int64_t text = first; text < first + texts; ++text) {
            for (int64_t i = 0; i < teachers; ++i) {
                const int64_t start = offsets[i], classes = offsets[i + 1] - start, at = text * problem.probs_stride + start;
                if (classes < 2 * LANES) continue;
                float predictive, expected;
                wide_text(logits + text * problem.text_stride + start, problem.sample_stride, problem.num_samples, classes, scratch,
                          problem.mean_probs + at, problem.var_probs + at, predictive, expected);
                write_entropies(problem, text, i, predictive, expected);
            }
            select(problem, text);
        }
    }
}

[[maybe_unused]] static void run(const Problem& problem, const void* logits, int dtype, int64_t begin, int64_t end, float* scratch) {
    if (dtype == 1) return statistics(problem, (const Float16*)logits, begin, end, scratch);
    if (dtype == 2) return statistics(problem, (const BFloat16*)logits, begin, end, scratch);
    statistics(problem, (const float*)logits, begin, end, scratch);
}
