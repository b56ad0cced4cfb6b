// Philox4x32-10 and the mask contract built on it: which elements of a row survive dropout, the same on every machine.
//
//   key = (seed low, seed high); counter = (element / 8, sample, site, example id), all uint32, wrapping
//   one call gives 4 x 32 bits = eight 16-bit lanes, low half first; lane element % 8 belongs to the element
//   an element is dropped where its lane < threshold
//
// Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). No framework header in here.
#pragma once

#include <cstdint>
#include <cstring>

// Wide instructions are chosen per function at run time, never for a whole file: one wheel runs everywhere.
#if defined(__x86_64__) && defined(__GNUC__)
#define MUKA_PHILOX_AVX2 1
// GCC 12 warns about its own `__Y = __Y` wherever an AVX-512 intrinsic is inlined (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#endif

namespace muka_fast {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;
constexpr int kLanes = 8;  // 16-bit lanes of one call

// One row of masks: everything but the element.
struct MaskStream {
    uint64_t seed;
    uint32_t sample, site, example;
    uint32_t threshold;  // round-half-even(p * 65536), below 65536
};

inline __attribute__((always_inline)) void philox4x32(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t seed, uint32_t out[4]) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
        const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * c0, p1 = static_cast<uint64_t>(kPhiloxM1) * c2;
        const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0, n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
        c1 = static_cast<uint32_t>(p1);
        c3 = static_cast<uint32_t>(p0);
        c0 = n0;
        c2 = n2;
        k0 += kPhiloxW0;
        k1 += kPhiloxW1;
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

// Bit i is set where element 8 * call + i is kept.
inline __attribute__((always_inline)) uint32_t keep_byte(const MaskStream& s, uint64_t call) {
    uint32_t w[4];
    philox4x32(static_cast<uint32_t>(call), s.sample, s.site, s.example, s.seed, w);
    uint32_t keep = 0;
    for (int j = 0; j < 4; ++j) {
        keep |= static_cast<uint32_t>((w[j] & 0xFFFFu) >= s.threshold) << (2 * j);
        keep |= static_cast<uint32_t>((w[j] >> 16) >= s.threshold) << (2 * j + 1);
    }
    return keep;
}

#ifdef MUKA_PHILOX_AVX2

// Eight calls at once, as two independent chains of four. A 32-bit word sits in the low half of a 64-bit lane: the widening
// multiply reads only the low halves, so the high halves may hold rubbish between rounds and no shuffle is needed.
// After the return, lanes[i] holds the 16 lanes of calls call + 2i and call + 2i + 1.
__attribute__((target("avx2"), always_inline)) static inline void philox_x8(const MaskStream& s, uint64_t call, __m256i lanes[4]) {
    const __m256i m0 = _mm256_set1_epi64x(kPhiloxM0), m1 = _mm256_set1_epi64x(kPhiloxM1);
    const __m256i first = _mm256_set1_epi64x(static_cast<int64_t>(call));
    // Counter of lane j: 0 2 1 3, so that the unpacking below leaves the calls in order.
    __m256i a0 = _mm256_add_epi64(first, _mm256_setr_epi64x(0, 2, 1, 3)), b0 = _mm256_add_epi64(a0, _mm256_set1_epi64x(4));
    __m256i a1 = _mm256_set1_epi64x(s.sample), b1 = a1;
    __m256i a2 = _mm256_set1_epi64x(s.site), b2 = a2;
    __m256i a3 = _mm256_set1_epi64x(s.example), b3 = a3;
    uint32_t k0 = static_cast<uint32_t>(s.seed), k1 = static_cast<uint32_t>(s.seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < kPhiloxRounds; ++round) {
        const __m256i key0 = _mm256_set1_epi64x(k0), key1 = _mm256_set1_epi64x(k1);
        const __m256i pa0 = _mm256_mul_epu32(a0, m0), pa1 = _mm256_mul_epu32(a2, m1);
        const __m256i pb0 = _mm256_mul_epu32(b0, m0), pb1 = _mm256_mul_epu32(b2, m1);
        a0 = _mm256_xor_si256(_mm256_srli_epi64(pa1, 32), _mm256_xor_si256(a1, key0));
        b0 = _mm256_xor_si256(_mm256_srli_epi64(pb1, 32), _mm256_xor_si256(b1, key0));
        a2 = _mm256_xor_si256(_mm256_srli_epi64(pa0, 32), _mm256_xor_si256(a3, key1));
        b2 = _mm256_xor_si256(_mm256_srli_epi64(pb0, 32), _mm256_xor_si256(b3, key1));
        a1 = pa1, a3 = pa0, b1 = pb1, b3 = pb0;
        k0 += kPhiloxW0;
        k1 += kPhiloxW1;
    }
    // Low halves of two words side by side: 64 bits of one call; then the 128 bits of one call in one half register.
    const __m256i a01 = _mm256_blend_epi32(a0, _mm256_slli_epi64(a1, 32), 0xAA);
    const __m256i a23 = _mm256_blend_epi32(a2, _mm256_slli_epi64(a3, 32), 0xAA);
    const __m256i b01 = _mm256_blend_epi32(b0, _mm256_slli_epi64(b1, 32), 0xAA);
    const __m256i b23 = _mm256_blend_epi32(b2, _mm256_slli_epi64(b3, 32), 0xAA);
    lanes[0] = _mm256_unpacklo_epi64(a01, a23);  // counters 0 and 1
    lanes[1] = _mm256_unpackhi_epi64(a01, a23);  // counters 2 and 3
    lanes[2] = _mm256_unpacklo_epi64(b01, b23);
    lanes[3] = _mm256_unpackhi_epi64(b01, b23);
}

// 16 x 16 bits: all ones where the lane is kept (lane >= threshold, unsigned).
__attribute__((target("avx2"), always_inline)) static inline __m256i keep_lanes(__m256i lanes, __m256i threshold) {
    return _mm256_cmpeq_epi16(_mm256_max_epu16(lanes, threshold), lanes);
}

// Keep bits of 64 * words elements from 8 * call on: bit i of bits[j] is set where element 8 * call + 64 * j + i is kept.
__attribute__((target("avx2"))) inline void keep_bits_avx2(const MaskStream& s, uint64_t call, int64_t words, uint64_t* bits) {
    const __m256i t = _mm256_set1_epi16(static_cast<int16_t>(s.threshold));
    for (int64_t j = 0; j < words; ++j) {
        __m256i lanes[4];
        philox_x8(s, call + 8 * j, lanes);
        uint64_t word = 0;
        for (int i = 0; i < 4; i += 2) {
            // packs works inside 128-bit halves: put the quarters back into order before taking one bit a byte.
            __m256i packed = _mm256_packs_epi16(keep_lanes(lanes[i], t), keep_lanes(lanes[i + 1], t));
            packed = _mm256_permute4x64_epi64(packed, 0xD8);
            word |= static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_epi8(packed))) << (16 * i);
        }
        bits[j] = word;
    }
}

#define MUKA_AVX512 "avx512f,avx512bw,avx512dq,avx512vl"

// The same eight calls in one chain of wide registers: keep bits of 64 elements. Iterations of the caller's loop overlap in flight.
__attribute__((target(MUKA_AVX512), always_inline)) static inline uint64_t keep_word_avx512(const MaskStream& s, uint64_t call) {
    const __m512i m0 = _mm512_set1_epi64(kPhiloxM0), m1 = _mm512_set1_epi64(kPhiloxM1);
    // Counter of 64-bit lane j, again in the order that the unpacking undoes.
    __m512i c0 = _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(call)), _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7));
    __m512i c1 = _mm512_set1_epi64(s.sample), c2 = _mm512_set1_epi64(s.site), c3 = _mm512_set1_epi64(s.example);
    uint32_t k0 = static_cast<uint32_t>(s.seed), k1 = static_cast<uint32_t>(s.seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < kPhiloxRounds; ++round) {
        const __m512i p0 = _mm512_mul_epu32(c0, m0), p1 = _mm512_mul_epu32(c2, m1);
        c0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c1, _mm512_set1_epi64(k0), 0x96);  // 0x96: xor of three
        c2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c3, _mm512_set1_epi64(k1), 0x96);
        c1 = p1, c3 = p0;
        k0 += kPhiloxW0;
        k1 += kPhiloxW1;
    }
    const __m512i c01 = _mm512_mask_blend_epi32(0xAAAA, c0, _mm512_slli_epi64(c1, 32));
    const __m512i c23 = _mm512_mask_blend_epi32(0xAAAA, c2, _mm512_slli_epi64(c3, 32));
    const __m512i t = _mm512_set1_epi16(static_cast<int16_t>(s.threshold));
    const uint64_t low = _mm512_cmpge_epu16_mask(_mm512_unpacklo_epi64(c01, c23), t);   // calls 0 to 3
    const uint64_t high = _mm512_cmpge_epu16_mask(_mm512_unpackhi_epi64(c01, c23), t);  // calls 4 to 7
    return low | high << 32;
}

__attribute__((target(MUKA_AVX512))) inline void keep_bits_avx512(const MaskStream& s, uint64_t call, int64_t words, uint64_t* bits) {
    for (int64_t j = 0; j < words; ++j) bits[j] = keep_word_avx512(s, call + 8 * j);
}
#endif

inline void keep_bits_plain(const MaskStream& s, uint64_t call, int64_t words, uint64_t* bits) {
    for (int64_t j = 0; j < words; ++j) {
        bits[j] = 0;
        for (int i = 0; i < kLanes; ++i) bits[j] |= static_cast<uint64_t>(keep_byte(s, call + 8 * j + i)) << (8 * i);
    }
}

using KeepBits = void (*)(const MaskStream& s, uint64_t call, int64_t words, uint64_t* bits);

// level: instruction set to use, 0 baseline, 1 AVX2, 2 AVX-512 (cpu/isa.h).
inline KeepBits keep_bits_function(int level) {
#ifdef MUKA_PHILOX_AVX2
    if (level >= 2) return keep_bits_avx512;
    if (level == 1) return keep_bits_avx2;
#endif
    (void)level;
    return keep_bits_plain;
}

}  // namespace muka_fast
