// Compiles the file named by KERNEL_FILE once per instruction set, each in its own namespace, and ISA_CALL picks one when called.
//
// Why not target_clones: explicit vectors are split to the baseline's width before the clones are made. Include this inside a namespace,
// after every standard header: a kernel file must include nothing and call no function of the standard library, whose inline functions
// would otherwise be compiled for the wide machine and be shared with the narrow one.
// In a kernel file LANES is the number of floats per vector.
#ifndef ISA_CALL
#define ISA_CALL(level, function, ...)                                                                  \
    ((level) >= 2 ? isa_v4::function(__VA_ARGS__) : (level) == 1 ? isa_v3::function(__VA_ARGS__)        \
                                                                 : isa_baseline::function(__VA_ARGS__))
#endif

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define LANES 4
namespace isa_baseline {
#include KERNEL_FILE
}
#undef LANES
#define LANES 8
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace isa_v3 {
#include KERNEL_FILE
}
#pragma GCC pop_options
#undef LANES
#define LANES 16
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
namespace isa_v4 {
#include KERNEL_FILE
}
#pragma GCC pop_options
#undef LANES
#else
// Other compilers and processors: what the compiler is told to build for; 128-bit vectors are native on aarch64 as well.
#define LANES 4
namespace isa_baseline {
#include KERNEL_FILE
}
#undef LANES
namespace isa_v3 = isa_baseline;
namespace isa_v4 = isa_baseline;
#endif
