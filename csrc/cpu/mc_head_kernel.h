// The arithmetic of mc_head for one instruction set; compiled through each_isa.h.
//
// The masked product is not a dense one: with W x known, the logits of one mask are scale * (W x - sum of the dropped columns), a
// tenth of the work at p = 0.1. The columns of the weight lie transposed and packed in tiles that stay in the second-level cache while
// all masks of a block of texts pass over them.
#include "cpu/mc_statistics_kernel.h"

// out[0 : R * LANES) = scale * (base + sign * sum over the listed features of x[d] * weight[d]) + bias.
template <int R, int UNROLL>
INLINE void gather_vectors(const float* weight, int64_t stride, const float* x, const int32_t* list, int64_t count, const float* base,
                           float sign, float scale, const float* bias, float* out) {
    Vec sum[UNROLL][R] = {};
    int64_t i = 0;
    for (; i + UNROLL <= count; i += UNROLL) {
#pragma GCC unroll 8
        for (int u = 0; u < UNROLL; ++u) {
            const float* column = weight + list[i + u] * stride;
            const Vec value = splat(x[list[i + u]]);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) sum[u][r] += value * load(column + r * LANES);
        }
    }
    for (; i < count; ++i) {
        const float* column = weight + list[i] * stride;
        const Vec value = splat(x[list[i]]);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) sum[0][r] += value * load(column + r * LANES);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
        Vec total = sum[0][r];
#pragma GCC unroll 8
        for (int u = 1; u < UNROLL; ++u) total += sum[u][r];
        store(out + r * LANES, (load(base + r * LANES) + total * sign) * scale + load(bias + r * LANES));
    }
}

// One tile of one mask; the number of accumulators is part of the code, so that they stay in registers.
static void gather_tile(int64_t vectors, const float* weight, int64_t stride, const float* x, const int32_t* list, int64_t count,
                        const float* base, float sign, float scale, const float* bias, float* out) {
    while (vectors > 0) {
        const int64_t now = vectors < 12 ? vectors : 12;
        switch (now) {
#define CASE(R, UNROLL)                                                                                      \
    case R:                                                                                                  \
        gather_vectors<R, UNROLL>(weight, stride, x, list, count, base, sign, scale, bias, out); \
        break;
            CASE(1, 4) CASE(2, 4) CASE(3, 4) CASE(4, 3) CASE(5, 2) CASE(6, 2)
            CASE(7, 1) CASE(8, 1) CASE(9, 1) CASE(10, 1) CASE(11, 1) CASE(12, 1)
#undef CASE
        }
        weight += now * LANES, base += now * LANES, bias += now * LANES, out += now * LANES;
        vectors -= now;
    }
}

// The features that a mask drops (or keeps), ascending; returns how many. list has kOverrun entries to spare.
static int64_t list_features(int64_t width, const uint64_t* keep, bool dropped, int32_t* list) {
    int64_t count = 0;
    for (int64_t d = 0; d < width; d += 64) {
        uint64_t bits = dropped ? ~keep[d / 64] : keep[d / 64];
        if (width - d < 64) bits &= (uint64_t{1} << (width - d)) - 1;
        const int found = __builtin_popcountll(bits);
        // A fixed number of entries costs less than a branch on how many there are; the surplus is overwritten or unused.
        for (int i = 0; i < kOverrun; ++i, bits &= bits - 1) list[count + i] = (int32_t)d + __builtin_ctzll(bits | uint64_t{1} << 63);
        for (int i = kOverrun; i < found; ++i, bits &= bits - 1) list[count + i] = (int32_t)d + __builtin_ctzll(bits);
        count += found;
    }
    return count;
}

// Which columns to sum for sample k of a text. The difference W x - (dropped) loses digits where the dropped features carried most of
// W x, and is undefined where one of them is infinite or NaN: such a mask sums what it keeps instead.
INLINE Mask choose_columns(const Head& h, const uint64_t* keep, const float* energy, float total, int32_t* list) {
    if (h.subtract) {
        const int64_t count = list_features(h.width, keep, true, list);
        float lost[4] = {};
        int64_t i = 0;
        for (; i + 4 <= count; i += 4)
            for (int j = 0; j < 4; ++j) lost[j] += energy[list[i + j]];
        for (; i < count; ++i) lost[0] += energy[list[i]];
        if ((lost[0] + lost[1]) + (lost[2] + lost[3]) < 0.75f * total) return Mask{count, true};
    }
    return Mask{list_features(h.width, keep, false, list), false};
}

// Which features the masks of texts [first, first + texts) drop.
static void prepare_block(const Head& h, const Scratch& s, int64_t first, int64_t texts) {
    for (int64_t t = 0; t < texts; ++t) {
        const float* x = h.features + (first + t) * h.width;
        float total = 0.0f;
        for (int64_t d = 0; d < h.width; ++d) {
            const float share = x[d] * h.column_max[d];
            s.energy[d] = share * share;
            total += s.energy[d];
        }
        for (int64_t k = 0; k < h.num_samples; ++k) {
            const MaskStream stream{h.seed, (uint32_t)k, h.site, (uint32_t)h.example_ids[first + t], h.threshold};
            h.keep_bits(stream, 0, (h.width + 63) / 64, s.keep);
            s.masks[t * h.num_samples + k] = choose_columns(h, s.keep, s.energy, total, s.lists + (t * h.num_samples + k) * h.width);
        }
    }
}

// W x of one text and tile into base, and the logits without dropout. Every mask's logits start from base, so its error would be in all
// of them: it is summed in short chunks, which keeps rounding errors below those of a plain product.
static void unmasked_tile(const Head& h, int64_t text, int64_t c, int64_t columns, float* base) {
    const float* weight = h.packed + c * h.width;
    for (int64_t i = 0; i < columns; ++i) base[i] = 0.0f;
    for (int64_t d = 0; d < h.width; d += kChunk)
        gather_tile(columns / LANES, weight, columns, h.features + text * h.width, h.all + d, h.width - d < kChunk ? h.width - d : kChunk,
                    base, 1.0f, 1.0f, h.zeros, base);
    for (int64_t i = 0; i < columns && c + i < h.classes; ++i) h.logits[text * h.classes + c + i] = base[i] + h.bias[c + i];
}

// Texts [begin, end), `block` at a time.
static void run_head(const Head& h, const Scratch& s, int64_t begin, int64_t end, int64_t block) {
    const int64_t offsets[2] = {0, h.classes};
    for (int64_t first = begin; first < end; first += block) {
        const int64_t texts = end - first < block ? end - first : block;
        prepare_block(h, s, first, texts);
        for (int64_t c = 0; c < h.padded; c += kTile) {
            const int64_t columns = h.padded - c < kTile ? h.padded - c : kTile;
            for (int64_t t = 0; t < texts; ++t) {
                unmasked_tile(h, first + t, c, columns, s.base);
                for (int64_t k = 0; k < h.num_samples; ++k) {
                    const Mask mask = s.masks[t * h.num_samples + k];
                    gather_tile(columns / LANES, h.packed + c * h.width, columns, h.features + (first + t) * h.width,
                                s.lists + (t * h.num_samples + k) * h.width, mask.count,
                                mask.dropped ? s.base : h.zeros, mask.dropped ? -1.0f : 1.0f, h.scale, h.bias + c,
                                s.logits + (k * block + t) * h.padded + c);
                }
            }
        }
        const Problem problem{h.num_samples, 1, block * h.padded, h.padded, offsets, &h.log_classes, h.mean_probs + first * h.classes,
                              h.var_probs + first * h.classes, h.predictive_entropy + first, h.expected_entropy + first,
                              h.mutual_information + first, h.normalized_entropy + first, s.selected, s.margin, h.classes, 1, 1};
        statistics(problem, s.logits, 0, texts, s.statistics);
    }
}
