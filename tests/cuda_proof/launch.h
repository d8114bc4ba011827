// Runs a kernel of the same translation unit on the host.
//
// A block's threads run one after the other. Where the kernel has barriers or warp functions, each thread is a fiber:
// a thread that must wait hands over, and the block goes on when everybody has come. The order of threads, warps and
// blocks is fixed (ascending, or descending on request): what a race would do is not reproduced, but a result that
// depends on the order shows by comparing both.
#pragma once

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <ucontext.h>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

// The linker gives a section that is a C identifier these two ends; the variable is there so that the section is.
__attribute__((section("gg_shared"), used)) static int gg_shared_there;
extern "C" unsigned char __start_gg_shared[] __attribute__((visibility("hidden")));
extern "C" unsigned char __stop_gg_shared[] __attribute__((visibility("hidden")));

namespace gg {

constexpr size_t stack_size = 64 * 1024;
constexpr unsigned most_threads = 1024;

struct Fiber {
    Thread thread;
    uint3 index;
    bool started;
    ucontext_t start;
    jmp_buf at;
    unsigned char *stack;
};

static char message[1024];
static jmp_buf landing;          // of the launch, for everything that ends it early
static jmp_buf scheduler;        // to where a fiber hands over
static ucontext_t from_scheduler;
static Fiber *fibers, *running;
static unsigned count;           // threads of a block
static void (*body)();
static bool uses_fibers;

[[noreturn]] void fail(const char *format, ...) {
    va_list list;
    va_start(list, format);
    int used = vsnprintf(message, sizeof message, format, list);
    va_end(list);
    if (used > 0 && size_t(used) < sizeof message)
        snprintf(message + used, sizeof message - used, " [block (%u, %u, %u), thread (%u, %u, %u)]", blockIdx.x,
                 blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z);
    _longjmp(landing, 1);
}

Thread &self() {
    if (!uses_fibers) fail("a barrier or warp function in a kernel that was taken to have none");
    return running->thread;
}

__attribute__((noinline)) void wait() {
    Fiber *me = running;
    if (_setjmp(me->at) == 0) _longjmp(scheduler, 1);
}

static void enter() {
    body();
    running->thread.state = Wait::done;
    _longjmp(scheduler, 1);
}

__attribute__((noinline)) static void resume(Fiber *fiber) {
    running = fiber;
    threadIdx = fiber->index;
    if (_setjmp(scheduler) != 0) return;
    if (fiber->started) _longjmp(fiber->at, 1);
    fiber->started = true;
    setcontext(&fiber->start);
}

static unsigned alive(unsigned warp) {
    unsigned lanes = 0;
    for (unsigned l = 0; l < 32 && warp * 32 + l < count; ++l)
        if (fibers[warp * 32 + l].thread.state != Wait::done) lanes |= 1u << l;
    return lanes;
}

unsigned lanes_alive() { return self(), alive(unsigned(running - fibers) / 32); }

// Let every group of lanes of a warp go on whose members have all come. True if one could.
static bool release(unsigned warp) {
    bool any = false;
    unsigned living = alive(warp);
    Fiber *lanes = fibers + warp * 32;
    for (unsigned l = 0; l < 32 && warp * 32 + l < count; ++l) {
        Thread &first = lanes[l].thread;
        if (first.state != Wait::warp) continue;
        threadIdx = lanes[l].index;
        if (!(first.mask >> l & 1)) fail("%s at line %d: lane %u is not in its own mask %#x", first.at, first.line, l, first.mask);
        unsigned group = first.mask & living;
        bool complete = true;
        for (unsigned k = 0; k < 32; ++k)
            if (group >> k & 1) {
                Thread &other = lanes[k].thread;
                complete &= other.state == Wait::warp && other.line == first.line && other.at == first.at && other.mask == first.mask;
            }
        if (!complete) continue;
        unsigned votes = 0;
        for (unsigned k = 0; k < 32; ++k)
            if (group >> k & 1 && first.source < 0) {
                int vote;
                memcpy(&vote, lanes[k].thread.value, sizeof vote);
                votes |= unsigned(vote) << k;
            }
        for (unsigned k = 0; k < 32; ++k)
            if (group >> k & 1) {
                Thread &thread = lanes[k].thread;
                if (thread.source < 0)
                    memcpy(thread.result, &votes, sizeof votes);
                else if (thread.source > 31 || !(group >> thread.source & 1))
                    fail("%s at line %d: lane %u reads from lane %d, which has left or is not in the mask %#x", thread.at,
                         thread.line, k, thread.source, thread.mask);
                else
                    memcpy(thread.result, lanes[thread.source].thread.value, sizeof thread.result);
            }
        for (unsigned k = 0; k < 32; ++k)
            if (group >> k & 1) lanes[k].thread.state = Wait::ready;
        any = true;
    }
    return any;
}

[[noreturn]] static void diverged() {
    char where[400];
    size_t used = 0;
    where[0] = 0;
    unsigned left = 0;
    bool counted[most_threads] = {};
    for (unsigned t = 0; t < count; ++t) {
        Thread &thread = fibers[t].thread;
        if (thread.state == Wait::done) ++left;
        if (thread.state == Wait::done || counted[t]) continue;
        unsigned same = 0;
        for (unsigned u = t; u < count; ++u) {
            Thread &other = fibers[u].thread;
            if (other.state == thread.state && other.line == thread.line && other.at == thread.at) ++same, counted[u] = true;
        }
        if (used < sizeof where)
            used += snprintf(where + used, sizeof where - used, "%s%u wait at %s, line %d", used ? "; " : "", same, thread.at,
                             thread.line);
    }
    fail("divergent barrier: of %u threads %s; %u have left the kernel", count, where, left);
}

static void run_fibers(bool reverse) {
    unsigned warps = (count + 31) / 32;
    for (;;) {
        for (unsigned w = 0; w < warps; ++w) {
            unsigned warp = reverse ? warps - 1 - w : w;
            do
                for (unsigned l = 0; l < 32; ++l) {
                    unsigned t = warp * 32 + (reverse ? 31 - l : l);
                    if (t < count && fibers[t].thread.state == Wait::ready) resume(fibers + t);
                }
            while (release(warp));
        }
        unsigned at_barrier = 0, left = 0;
        for (unsigned t = 0; t < count; ++t) {
            at_barrier += fibers[t].thread.state == Wait::block && fibers[t].thread.line == fibers[0].thread.line;
            left += fibers[t].thread.state == Wait::done;
        }
        if (left == count) return;
        if (at_barrier != count) diverged();
        for (unsigned t = 0; t < count; ++t) fibers[t].thread.state = Wait::ready;
    }
}

static void start_fibers() {
    if (!fibers) {
        fibers = static_cast<Fiber *>(calloc(most_threads, sizeof(Fiber)));
        if (!fibers) fail("no memory for the threads of a block");
    }
    unsigned t = 0;
    for (unsigned z = 0; z < blockDim.z; ++z)
        for (unsigned y = 0; y < blockDim.y; ++y)
            for (unsigned x = 0; x < blockDim.x; ++x, ++t) {
                Fiber &fiber = fibers[t];
                if (!fiber.stack && !(fiber.stack = static_cast<unsigned char *>(malloc(stack_size))))
                    fail("no memory for the stack of a thread");
                fiber.index = uint3{x, y, z};
                fiber.thread.state = Wait::ready;
                fiber.started = false;
                getcontext(&fiber.start);
                fiber.start.uc_stack.ss_sp = fiber.stack;
                fiber.start.uc_stack.ss_size = stack_size;
                fiber.start.uc_link = nullptr;
                makecontext(&fiber.start, enter, 0);
            }
}

static void run_block(size_t shared, bool reverse) {
    memset(__start_gg_shared, 0xff, __stop_gg_shared - __start_gg_shared);
    memset(dynamic_shared, 0xff, shared);
    memset(dynamic_shared + shared, 0xa5, beyond);
    if (uses_fibers) {
        start_fibers();
        run_fibers(reverse);
    } else {
        for (unsigned t = 0; t < count; ++t) {
            unsigned u = reverse ? count - 1 - t : t;
            threadIdx = uint3{u % blockDim.x, u / blockDim.x % blockDim.y, u / blockDim.x / blockDim.y};
            body();
        }
    }
    for (size_t i = 0; i < beyond; ++i)
        if (dynamic_shared[shared + i] != 0xa5)
            fail("wrote beyond the dynamic shared memory: byte %zu of %zu", shared + i, shared);
}

static void on_signal(int number, siginfo_t *info, void *) {
    if (number == SIGILL)
        fail("undefined behaviour: a misaligned address, an index beyond a fixed array, a signed overflow or a division by zero");
    fail("memory that is not the kernel's was touched, or a misaligned address: %p", info->si_addr);
}

// Arithmetic that takes and gives zero for float32 subnormals, as -ftz=true does.
struct FlushToZero {
#if defined(__x86_64__)
    unsigned saved = _mm_getcsr();
    explicit FlushToZero(bool on) { if (on) _mm_setcsr(saved | 0x8040); }
    ~FlushToZero() { _mm_setcsr(saved); }
#elif defined(__aarch64__)
    unsigned long saved;
    explicit FlushToZero(bool on) {
        asm volatile("mrs %0, fpcr" : "=r"(saved));
        if (on) asm volatile("msr fpcr, %0" ::"r"(saved | 1ul << 24));
    }
    ~FlushToZero() { asm volatile("msr fpcr, %0" ::"r"(saved)); }
#else
#error "flush-to-zero is known for x86-64 and AArch64 only"
#endif
};

struct Signals {
    static constexpr int numbers[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
    struct sigaction before[4];
    Signals() {
        struct sigaction ours = {};
        ours.sa_sigaction = on_signal;
        ours.sa_flags = SA_SIGINFO | SA_NODEFER;
        for (int i = 0; i < 4; ++i) sigaction(numbers[i], &ours, &before[i]);
    }
    ~Signals() {
        for (int i = 0; i < 4; ++i) sigaction(numbers[i], &before[i], nullptr);
    }
};

struct Launch {
    unsigned grid[3], block[3];
    unsigned long long first, stop;  // blocks to run, in linear order
    unsigned long long shared;
    int flush, fibers, reverse, worst;
};

static bool run_blocks(const Launch *launch) {
    if (_setjmp(landing) != 0) return false;
    for (unsigned long long b = launch->first; b < launch->stop; ++b) {
        unsigned long long i = launch->reverse ? launch->first + (launch->stop - 1 - b) : b;
        blockIdx = uint3{unsigned(i % gridDim.x), unsigned(i / gridDim.x % gridDim.y), unsigned(i / gridDim.x / gridDim.y)};
        run_block(launch->shared, launch->reverse);
    }
    return true;
}

template <class... P>
struct Kernel {
    static inline void (*function)(P...);
    static inline void **args;

    template <size_t... I>
    static void call(std::index_sequence<I...>) {
        function(*static_cast<typename std::remove_cv<P>::type *>(args[I])...);
    }
    static void thread() { call(std::index_sequence_for<P...>()); }
};

template <class... P>
static const char *launch(void (*function)(P...), const Launch *what, void **args) {
    using K = Kernel<P...>;
    K::function = function, K::args = args;
    body = K::thread;
    gridDim = dim3(what->grid[0], what->grid[1], what->grid[2]);
    blockDim = dim3(what->block[0], what->block[1], what->block[2]);
    count = blockDim.x * blockDim.y * blockDim.z;
    uses_fibers = what->fibers;
    worst_rounding = what->worst;
    message[0] = 0;
    Signals signals;
    FlushToZero flush(what->flush);
    run_blocks(what);
    return message;
}

// The sizes of the parameters and what they are: p(ointer), f(loat), i(nteger), s(tructure).
template <class... P>
static int signature(void (*)(P...), int *sizes, char *kinds) {
    int all_sizes[] = {0, int(sizeof(P))...};
    char all_kinds[] = {0, (std::is_pointer<P>::value ? 'p' : std::is_floating_point<P>::value ? 'f'
                            : std::is_integral<P>::value ? 'i' : 's')...};
    memcpy(sizes, all_sizes + 1, sizeof...(P) * sizeof(int));
    memcpy(kinds, all_kinds + 1, sizeof...(P));
    return sizeof...(P);
}

}  // namespace gg

#define GG_EXPORT(name)                                                                                                   \
    extern "C" __attribute__((visibility("default"))) const char *gg_launch(const gg::Launch *what, void **args) {       \
        return gg::launch(&name, what, args);                                                                             \
    }                                                                                                                     \
    extern "C" __attribute__((visibility("default"))) int gg_signature(int *sizes, char *kinds) {                        \
        return gg::signature(&name, sizes, kinds);                                                                        \
    }
