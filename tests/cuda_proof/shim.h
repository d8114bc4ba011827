// What CUDA C++ has and g++ has not, so that a kernel's unchanged text compiles for the host.
//
// Included before the kernel's text. The types with their alignments and the half precision functions are from NVIDIA's
// own headers.
#pragma once

#include <assert.h>
#include <float.h>
#include <limits.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <initializer_list>
#include <type_traits>
#include <utility>

#define __CUDA_INCLUDE_COMPILER_INTERNAL_HEADERS__
#include <cuda_fp16.h>

// In front of `static`, a section of its own: a block's shared memory is filled with NaNs before the block runs, so that
// reading what nobody wrote shows.
#undef __shared__
#define __shared__ static __attribute__((section("gg_shared")))
#undef __constant__
#define __constant__
#undef __global__
#define __global__
#undef __grid_constant__
#define __grid_constant__
#undef __launch_bounds__
#define __launch_bounds__(...)

static uint3 threadIdx, blockIdx;
static dim3 blockDim, gridDim;
static const int warpSize = 32;

namespace gg {

constexpr size_t most_dynamic = 48 * 1024, beyond = 4096;
alignas(128) static unsigned char dynamic_shared[most_dynamic + beyond];

enum class Wait : int { ready, block, warp, done };

// One CUDA thread of the running block.
struct Thread {
    Wait state;
    int line;             // where it waits
    const char *at;       // for which function it waits
    unsigned mask;        // the lanes named in a warp function
    int source;           // the lane whose value it asks for, -1 for a vote
    alignas(8) unsigned char value[8], result[8];
};

[[noreturn]] void fail(const char *format, ...);
Thread &self();
void wait();
unsigned lanes_alive();

static inline void barrier(int line) {
    Thread &me = self();
    me.state = Wait::block, me.line = line, me.at = "__syncthreads";
    wait();
}

static inline void meet(unsigned mask, int source, const char *at, int line) {
    Thread &me = self();
    me.state = Wait::warp, me.line = line, me.at = at, me.mask = mask, me.source = source;
    wait();
}

static inline int lane() {
    return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32;
}

template <class T>
static inline T exchange(unsigned mask, T value, int source, const char *at, int line) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8 || std::is_same<T, __half>::value, "CUDA shuffles 4 or 8 bytes");
    memcpy(self().value, &value, sizeof(T));
    meet(mask, source, at, line);
    T result;
    memcpy(&result, self().result, sizeof(T));
    return result;
}

template <class T>
static inline T shfl(unsigned mask, T value, int from, int width, const char *at, int line) {
    int first = lane() / width * width;
    return exchange(mask, value, first + (from & (width - 1)), at, line);
}
template <class T>
static inline T shfl_up(unsigned mask, T value, unsigned delta, int width, const char *at, int line) {
    int first = lane() / width * width, from = lane() - int(delta);
    return exchange(mask, value, from < first ? lane() : from, at, line);
}
template <class T>
static inline T shfl_down(unsigned mask, T value, unsigned delta, int width, const char *at, int line) {
    int first = lane() / width * width, from = lane() + int(delta);
    return exchange(mask, value, from >= first + width ? lane() : from, at, line);
}
template <class T>
static inline T shfl_xor(unsigned mask, T value, int bits, int width, const char *at, int line) {
    int first = lane() / width * width, from = lane() ^ bits;
    return exchange(mask, value, from >= first + width ? lane() : from, at, line);
}
static inline unsigned ballot(unsigned mask, int predicate, const char *at, int line) {
    int vote = predicate != 0;
    memcpy(self().value, &vote, sizeof vote);
    meet(mask, -1, at, line);
    unsigned result;
    memcpy(&result, self().result, sizeof result);
    return result;
}

// Errors of CUDA's approximate functions. A correctly rounded result is moved by as many units in the last place as
// CUDA documents at the most, up or down by a hash of the result, when a launch asks for it.
static bool worst_rounding = false;

static inline float off(float y, int ulps) {
    if (!worst_rounding || ulps == 0 || !isfinite(y) || fabsf(y) < 2 * FLT_MIN || y == 1.0f) return y;
    uint32_t bits;
    memcpy(&bits, &y, 4);
    uint32_t hash = bits * 2654435761u;
    bits += hash >> 31 ? ulps : -ulps;
    memcpy(&y, &bits, 4);
    return y;
}
static inline double off(double y, int ulps) {
    if (!worst_rounding || ulps == 0 || !isfinite(y) || fabs(y) < 2 * DBL_MIN || y == 1.0) return y;
    uint64_t bits;
    memcpy(&bits, &y, 8);
    uint64_t hash = bits * 0x9E3779B97F4A7C15u;
    bits += hash >> 63 ? ulps : -ulps;
    memcpy(&y, &bits, 8);
    return y;
}

}  // namespace gg

// A function of CUDA's mathematical library with its documented largest error in units in the last place, float and
// double. The name is replaced everywhere, in CuPy's headers too, so that overloads for other types stay overloads.
#define GG_MATH(name, ulps_float, ulps_double)                                                \
    static inline float gg_##name##f(float x) { return gg::off(name##f(x), ulps_float); }     \
    static inline float gg_##name(float x) { return gg::off(name##f(x), ulps_float); }        \
    static inline double gg_##name(double x) { return gg::off(name(x), ulps_double); }        \
    template <class I, class = typename std::enable_if<std::is_integral<I>::value>::type>     \
    static inline double gg_##name(I x) { return gg_##name(double(x)); }
GG_MATH(exp, 2, 1)
GG_MATH(exp2, 2, 1)
GG_MATH(expm1, 1, 1)
GG_MATH(log, 1, 1)
GG_MATH(log2, 1, 1)
GG_MATH(log1p, 1, 1)
GG_MATH(tanh, 2, 1)
#undef GG_MATH
static inline float gg_expf_fast(float x) { return gg::off(expf(x), 2 + int(fabsf(1.173f * x))); }
static inline float gg_logf_fast(float x) { return gg::off(logf(x), 3); }
#define exp gg_exp
#define expf gg_expf
#define exp2 gg_exp2
#define exp2f gg_exp2f
#define expm1 gg_expm1
#define expm1f gg_expm1f
#define log gg_log
#define logf gg_logf
#define log2 gg_log2
#define log2f gg_log2f
#define log1p gg_log1p
#define log1pf gg_log1pf
#define tanh gg_tanh
#define tanhf gg_tanhf
#define __expf gg_expf_fast
#define __logf gg_logf_fast

#define __syncthreads() gg::barrier(__LINE__)
#define GG_FULL 0xffffffffu
static inline void gg_syncwarp(int line, unsigned mask = GG_FULL) { gg::meet(mask, gg::lane(), "__syncwarp", line); }
#define __syncwarp(...) gg_syncwarp(__LINE__ __VA_OPT__(,) __VA_ARGS__)
#define GG_SHUFFLE(name)                                                                          \
    template <class T, class... W>                                                                \
    static inline T gg_##name(int line, unsigned mask, T value, int lane, int width = 32) {       \
        return gg::name(mask, value, lane, width, "__" #name "_sync", line);                      \
    }
GG_SHUFFLE(shfl)
GG_SHUFFLE(shfl_up)
GG_SHUFFLE(shfl_down)
GG_SHUFFLE(shfl_xor)
#undef GG_SHUFFLE
#define __shfl_sync(...) gg_shfl(__LINE__, __VA_ARGS__)
#define __shfl_up_sync(...) gg_shfl_up(__LINE__, __VA_ARGS__)
#define __shfl_down_sync(...) gg_shfl_down(__LINE__, __VA_ARGS__)
#define __shfl_xor_sync(...) gg_shfl_xor(__LINE__, __VA_ARGS__)
#define __ballot_sync(mask, predicate) gg::ballot(mask, predicate, "__ballot_sync", __LINE__)
#define __any_sync(mask, predicate) (gg::ballot(mask, predicate, "__any_sync", __LINE__) != 0)
#define __all_sync(mask, predicate) (gg::ballot(mask, !(predicate), "__all_sync", __LINE__) == 0)
static inline unsigned __activemask() { return gg::lanes_alive(); }

static inline void __threadfence() {}
static inline void __threadfence_block() {}
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
static inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
static inline int __ffs(int x) { return __builtin_ffs(x); }

template <class T> static inline T __ldg(const T *p) { return *p; }
template <class T> static inline T __ldcg(const T *p) { return *p; }
template <class T> static inline T __ldcs(const T *p) { return *p; }
template <class T> static inline void __stcg(T *p, T value) { *p = value; }
template <class T> static inline void __stcs(T *p, T value) { *p = value; }

#define GG_BITS(name, from, to)          \
    static inline to name(from x) {      \
        to y;                            \
        memcpy(&y, &x, sizeof y);        \
        return y;                        \
    }
GG_BITS(__float_as_int, float, int)
GG_BITS(__float_as_uint, float, unsigned)
GG_BITS(__int_as_float, int, float)
GG_BITS(__uint_as_float, unsigned, float)
GG_BITS(__double_as_longlong, double, long long)
GG_BITS(__longlong_as_double, long long, double)
#undef GG_BITS

// Rounded once, as on the device: volatile keeps g++ from contracting what CUDA leaves apart.
#define GG_ONCE(type, expression)        \
    volatile type once = expression;     \
    return once;
static inline float __fadd_rn(float a, float b) { GG_ONCE(float, a + b) }
static inline float __fsub_rn(float a, float b) { GG_ONCE(float, a - b) }
static inline float __fmul_rn(float a, float b) { GG_ONCE(float, a * b) }
static inline float __fdiv_rn(float a, float b) { GG_ONCE(float, a / b) }
static inline float __frcp_rn(float a) { GG_ONCE(float, 1.0f / a) }
static inline float __fsqrt_rn(float a) { return sqrtf(a); }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline double __dadd_rn(double a, double b) { GG_ONCE(double, a + b) }
static inline double __dsub_rn(double a, double b) { GG_ONCE(double, a - b) }
static inline double __dmul_rn(double a, double b) { GG_ONCE(double, a * b) }
static inline double __ddiv_rn(double a, double b) { GG_ONCE(double, a / b) }
static inline double __drcp_rn(double a) { GG_ONCE(double, 1.0 / a) }
static inline double __dsqrt_rn(double a) { return sqrt(a); }
static inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
#undef GG_ONCE

// CUDA gives 0 for a finite numerator over 2**126 and above.
static inline float __fdividef(float a, float b) {
    if (fabsf(b) > 0x1p126f && isfinite(b)) return isinf(a) ? NAN : 0.0f * a;
    return gg::off(a / b, 2);
}
static inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
static inline float rsqrtf(float x) { return gg::off(1.0f / sqrtf(x), 2); }
static inline float rsqrt(float x) { return rsqrtf(x); }
static inline double rsqrt(double x) { return gg::off(1.0 / sqrt(x), 1); }
static inline float __frsqrt_rn(float x) { return float(1.0 / sqrt(double(x))); }

// CUDA's min and max: of two numbers of one type the type, of two floating point numbers the one that is no NaN.
static inline float min(float a, float b) { return fminf(a, b); }
static inline float max(float a, float b) { return fmaxf(a, b); }
static inline double min(double a, double b) { return fmin(a, b); }
static inline double max(double a, double b) { return fmax(a, b); }
#define GG_MINMAX(type)                                              \
    static inline type min(type a, type b) { return b < a ? b : a; } \
    static inline type max(type a, type b) { return a < b ? b : a; }
GG_MINMAX(int)
GG_MINMAX(unsigned)
GG_MINMAX(long)
GG_MINMAX(unsigned long)
GG_MINMAX(long long)
GG_MINMAX(unsigned long long)
#undef GG_MINMAX

// Atomics are left out on purpose: gpugrad's sums have a fixed order. CuPy's headers name these two, and nothing calls them.
template <class T> static inline T gg_no_atomics() {
    gg::fail("an atomic operation was called: its order is not fixed");
}
template <class T> static inline T atomicCAS(T *, T, T) { return gg_no_atomics<T>(); }
static inline unsigned long long atomicAdd(unsigned long long *, unsigned long long) {
    return gg_no_atomics<unsigned long long>();
}
