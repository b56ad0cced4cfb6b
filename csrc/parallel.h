// Work sharing and instruction sets for the CPU kernels: parallel_for over std::thread, and the CLONES macro.
//
// No OpenMP: a region in a forked child (a DataLoader worker) hangs, and its barrier costs milliseconds on a busy machine. No pool:
// starting and joining a thread costs about 40 us, so each one must get enough work (`grain`) to be worth it.
#pragma once

#include <cstdint>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

// One function, several instruction sets: the loader picks when the extension is loaded, so one wheel serves every x86-64 machine.
// Needs GCC's arch= names and glibc's ifunc; elsewhere the baseline is built. Helpers called inside must be INLINE, else they stay
// baseline code. A clone may contract to FMA: the last bit differs between machines.
#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

#define INLINE static inline __attribute__((always_inline))

namespace muka_fast {

// How many threads `items` pieces of work are worth: at most `requested`, each with at least `grain` items, never less than one.
inline int worthwhile_threads(int64_t items, int requested, int64_t grain) {
    const int64_t worth = items / (grain > 0 ? grain : 1);
    const int64_t threads = worth < requested ? worth : requested;
    return threads < 1 ? 1 : static_cast<int>(threads);
}

// Calls body(begin, end) on consecutive parts of [0, items), at once, on at most `requested` threads; the caller's is one of them.
// `grain`: the fewest items worth a thread of their own (about 1 ms of work). Where the system refuses a thread, the caller does its part.
// The first exception of any part is thrown again after all have ended.
template <class Body>
void parallel_for(int64_t items, int requested, int64_t grain, const Body& body) {
    const int threads = worthwhile_threads(items, requested, grain);
    if (threads == 1) {
        if (items > 0) body(int64_t{0}, items);
        return;
    }
    std::vector<std::exception_ptr> errors(threads);
    auto part = [&](int index) {
        try {
            body(items * index / threads, items * (index + 1) / threads);
        } catch (...) {
            errors[index] = std::current_exception();
        }
    };
    std::vector<std::thread> workers;
    workers.reserve(threads);
    for (int index = 1; index < threads; ++index) {
        try {
            workers.emplace_back(part, index);
        } catch (const std::system_error&) {
            part(index);
        }
    }
    part(0);
    for (std::thread& worker : workers) worker.join();
    for (const std::exception_ptr& error : errors)
        if (error) std::rethrow_exception(error);
}

}  // namespace muka_fast
