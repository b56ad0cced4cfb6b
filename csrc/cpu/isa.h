// Which instruction set the CPU kernels use: 0 baseline, 1 x86-64-v3 (AVX2, FMA), 2 x86-64-v4 (AVX-512).
#pragma once

#include <atomic>

namespace muka_fast {

inline int machine_isa() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
    return __builtin_cpu_supports("x86-64-v4") ? 2 : __builtin_cpu_supports("x86-64-v3") ? 1 : 0;
#else
    return 0;
#endif
}

// Lowered by tests only, so that every level is tested on a wide machine.
inline std::atomic<int>& isa_level() {
    static std::atomic<int> level{machine_isa()};
    return level;
}

}  // namespace muka_fast
