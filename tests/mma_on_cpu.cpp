// Runs a .cu file of backends/cupy_cuda on a CPU, thread by thread: what ptx.cuh has from the machine, and what CUDA
// brings to the language. Compile with -DON_CPU -DSOURCE='"half_forward.cu"' -DENTRY=... and the kernel's own defines.
//
// A CUDA thread is a fiber that runs until it must wait: for the other lanes of its warp (mma, ldmatrix, shuffles), or
// at __syncthreads. The order of the warps turns round at every barrier. A copy to shared memory is made as late as
// copy_wait allows (EAGER 0) or at once (EAGER 1): a wait or a barrier that is missing shows in one or the other.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <type_traits>
#include <unordered_map>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__
#define __align__(n) __attribute__((aligned(n)))
using std::max;
using std::min;

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static float __int_as_float(int x) { float y; memcpy(&y, &x, 4); return y; }
static float __uint_as_float(unsigned x) { float y; memcpy(&y, &x, 4); return y; }
static unsigned __float_as_uint(float x) { unsigned y; memcpy(&y, &x, 4); return y; }
static float __fdividef(float x, float y) { return x / y; }

struct Index {
    unsigned x;
};
static Index threadIdx, blockIdx, gridDim;

// ---- fibers

struct Barrier {
    int size, arrived = 0;
    long rounds = 0;
};
struct Copy {
    unsigned to;
    const void *from;
    int bytes;
    int group;
};
struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    std::function<bool()> ready;  // may it go on? empty: yes
    bool done = false;
    std::vector<Copy> copies;
    int groups = 0;
};
struct Warp {
    Barrier barrier{32};
    unsigned in[32][8], out[32][4];
};

static constexpr int LANES = 32 * WARPS;
extern unsigned char memory[];
alignas(1024) unsigned char memory[SHARED ? SHARED : 1024];
static Fiber fibers[LANES];
static Warp warps[WARPS];
static Barrier everyone{LANES};
static ucontext_t scheduler;
static int current;
static int eager;
static char failure[200];  // empty while all is well

// The end of the launch, which returns the text.
static void fail(const char *what) {
    snprintf(failure, sizeof failure, "thread %d of block %u: %s", current, blockIdx.x, what);
    swapcontext(&fibers[current].context, &scheduler);
}

static void wait_until(std::function<bool()> ready) {
    if (ready()) return;
    fibers[current].ready = ready;
    swapcontext(&fibers[current].context, &scheduler);
}

// Wait until nobody else can go on.
static int patient;   // how many wait so
static long at_rest;  // how often nobody could
static void wait_for_others() {
    patient++;
    wait_until([until = at_rest + 1] { return at_rest >= until; });
    patient--;
}

// Wait until all of the barrier have come; the last one first does `work` for all.
template <class Work>
static void meet(Barrier &barrier, Work work) {
    if (++barrier.arrived == barrier.size) {
        work();
        barrier.arrived = 0;
        barrier.rounds++;
        return;
    }
    wait_until([&barrier, until = barrier.rounds + 1] { return barrier.rounds >= until; });
}

static void __syncthreads() {
    meet(everyone, [] {});
}

// All lanes bring 8 words and take 4: exchange(in, out).
template <class Exchange>
static void collective(const unsigned *in, unsigned *out, Exchange exchange) {
    Warp &warp = warps[current / 32];
    int lane = current % 32;
    memcpy(warp.in[lane], in, 32);
    meet(warp.barrier, [&] { exchange(warp.in, warp.out); });
    memcpy(out, warp.out[lane], 16);
}

static void __syncwarp() {
    meet(warps[current / 32].barrier, [] {});
}

static float __shfl_xor_sync(unsigned, float x, int far) {
    unsigned in[8] = {__float_as_uint(x), unsigned(far)}, out[4];
    collective(in, out, [](auto &in, auto &out) {
        for (int lane = 0; lane < 32; lane++) out[lane][0] = in[lane ^ in[lane][1]][0];
    });
    return __uint_as_float(out[0]);
}

static unsigned __shfl_xor_sync(unsigned mask, unsigned x, int far) {
    return __float_as_uint(__shfl_xor_sync(mask, __uint_as_float(x), far));
}

static bool __all_sync(unsigned, bool x) {
    unsigned in[8] = {x}, out[4];
    collective(in, out, [](auto &in, auto &out) {
        unsigned all = 1;
        for (int lane = 0; lane < 32; lane++) all &= in[lane][0];
        for (int lane = 0; lane < 32; lane++) out[lane][0] = all;
    });
    return out[0];
}

// ---- ptx.cuh

typedef unsigned u32;
typedef unsigned short half_bits;

static float exp2_approx(float x) { return exp2f(x); }
static float log2_approx(float x) { return log2f(x); }
static u32 shared_address(const void *x) { return u32(static_cast<const unsigned char *>(x) - memory); }

static void forget(u32 &) {}
static int anew(u32 x) { return x; }

static std::unordered_map<float *, int> adding;  // thread of the launch that adds to an address: another's order is open
static void add4(float *to, float a, float b, float c, float d) {
    if (reinterpret_cast<size_t>(to) % 16) fail("an addition to an address that is not aligned");
    const int self = blockIdx.x * LANES + current;
    if (adding.emplace(to, self).first->second != self) fail("an addition where another thread adds");
    to[0] += a, to[1] += b, to[2] += c, to[3] += d;
}

static float widen(half_bits x) {
#if PRECISION == 0
    _Float16 y;
    memcpy(&y, &x, 2);
    return float(y);
#else
    return __uint_as_float(unsigned(x) << 16);
#endif
}

static half_bits narrow(float x) {
#if PRECISION == 0
    _Float16 y = _Float16(x);
    half_bits z;
    memcpy(&z, &y, 2);
    return z;
#else
    unsigned bits = __float_as_uint(x);
    if (x != x) return 0x7FFF;
    return half_bits((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
#endif
}

static u32 pack(float low, float high) { return narrow(low) | u32(narrow(high)) << 16; }

static void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    unsigned in[8] = {a[0], a[1], a[2], a[3], b0, b1}, out[4];
    collective(in, out, [](auto &in, auto &out) {
        float a[16][16], b[16][8];
        for (int lane = 0; lane < 32; lane++)
            for (int e = 0; e < 2; e++) {
                int g = lane / 4, t = lane % 4 * 2 + e;
                for (int r = 0; r < 4; r++) a[g + 8 * (r % 2)][t + 8 * (r / 2)] = widen(half_bits(in[lane][r] >> 16 * e));
                for (int r = 0; r < 2; r++) b[t + 8 * r][g] = widen(half_bits(in[lane][4 + r] >> 16 * e));
            }
        for (int lane = 0; lane < 32; lane++)
            for (int r = 0; r < 4; r++) {
                double sum = 0;
                for (int k = 0; k < 16; k++) sum += double(a[lane / 4 + 8 * (r / 2)][k]) * b[k][lane % 4 * 2 + r % 2];
                float s = float(sum);
                memcpy(&out[lane][r], &s, 4);
            }
    });
    for (int r = 0; r < 4; r++) c[r] += __uint_as_float(out[r]);
}

static void add_to_number(u32 &x, u32 add) {
    if (float y = __uint_as_float(x); y == y) x += add;
}

// Operands are cut to 10 bits behind the point, as the tensor cores do.
static void mma_tf32(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    unsigned in[8] = {a[0], a[1], a[2], a[3], b0, b1}, out[4];
    collective(in, out, [](auto &in, auto &out) {
        float a[16][8], b[8][8];
        for (int lane = 0; lane < 32; lane++) {
            int g = lane / 4, t = lane % 4;
            for (int r = 0; r < 4; r++) a[g + 8 * (r % 2)][t + 4 * (r / 2)] = __uint_as_float(in[lane][r] & 0xFFFFE000u);
            for (int r = 0; r < 2; r++) b[t + 4 * r][g] = __uint_as_float(in[lane][4 + r] & 0xFFFFE000u);
        }
        for (int lane = 0; lane < 32; lane++)
            for (int r = 0; r < 4; r++) {
                double sum = 0;
                for (int k = 0; k < 8; k++) sum += double(a[lane / 4 + 8 * (r / 2)][k]) * b[k][lane % 4 * 2 + r % 2];
                float s = float(sum);
                memcpy(&out[lane][r], &s, 4);
            }
    });
    for (int r = 0; r < 4; r++) c[r] += __uint_as_float(out[r]);
}

static void check(u32 address, int bytes) {
    if (address % bytes || address + bytes > SHARED) fail("shared memory address out of bounds or not aligned");
}

static void ldmatrix_any(u32 (&x)[4], u32 from, bool turned) {
    check(from, 16);
    unsigned in[8] = {from, turned}, out[4];
    collective(in, out, [](auto &in, auto &out) {
        for (int lane = 0; lane < 32; lane++)
            for (int r = 0; r < 4; r++) {
                half_bits pair[2];
                for (int e = 0; e < 2; e++) {
                    int row = lane / 4, column = lane % 4 * 2 + e;
                    if (in[0][1]) std::swap(row, column);
                    memcpy(&pair[e], memory + in[8 * r + row][0] + 2 * column, 2);
                }
                out[lane][r] = pair[0] | u32(pair[1]) << 16;
            }
    });
    memcpy(x, out, 16);
}
static void ldmatrix(u32 (&x)[4], u32 from) { ldmatrix_any(x, from, false); }
static void ldmatrix_turned(u32 (&x)[4], u32 from) { ldmatrix_any(x, from, true); }

static void store_shared(u32 to, u32 x) { check(to, 4); memcpy(memory + to, &x, 4); }
static void load_shared(u32 (&x)[4], u32 from) { check(from, 16); memcpy(x, memory + from, 16); }
static void store_shared(u32 to, const u32 (&x)[4]) { check(to, 16); memcpy(memory + to, x, 16); }
static float load_one(u32 from) { check(from, 4); float x; memcpy(&x, memory + from, 4); return x; }
static float2 load_pair(u32 from) { check(from, 8); float2 x; memcpy(&x, memory + from, 8); return x; }

static void copy_now(const Copy &copy) {
    memset(memory + copy.to, 0, 16);
    memcpy(memory + copy.to, copy.from, copy.bytes);
}
static void copy_async(u32 to, const void *from, int bytes) {
    check(to, 16);
    if (bytes < 0 || bytes > 16 || reinterpret_cast<size_t>(from) % 16) fail("a copy of unaligned or too many bytes");
    Copy copy{to, from, bytes, fibers[current].groups};
    if (eager) copy_now(copy); else fibers[current].copies.push_back(copy);
}
static void copy_commit() { fibers[current].groups++; }
template <int PENDING>
static void copy_wait() {
    Fiber &self = fibers[current];
    auto late = std::stable_partition(self.copies.begin(), self.copies.end(), [&](auto &c) { return c.group < self.groups - PENDING; });
    std::for_each(self.copies.begin(), late, copy_now);
    self.copies.erase(self.copies.begin(), late);
}

#ifdef Q_SLOTS
typedef unsigned long long u64;
#include "hopper_on_cpu.hpp"
#else
static void reset_hopper() {}
static bool copy_one_box() { return false; }
#endif

#include SOURCE

// ---- the launch

static const void *params;

template <class T>
static void call(void (*kernel)(T)) { kernel(*static_cast<const T *>(params)); }

static void run_fiber() {
    call(ENTRY);
    Fiber &self = fibers[current];
    if (!self.copies.empty()) fail("a copy that nobody waited for");
    self.done = true;
    swapcontext(&self.context, &scheduler);
}

static void run_block(bool reversed) {
    memset(memory, 0xFF, sizeof memory);  // NaN in every type
    for (auto &warp : warps) warp.barrier = {32};
    everyone = {LANES};
    patient = 0;
    reset_hopper();
    for (int n = 0; n < LANES; n++) {
        Fiber &fiber = fibers[n];
        fiber.stack.resize(1 << 17);
        fiber.done = false, fiber.ready = nullptr, fiber.groups = 0;
        fiber.copies.clear();
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, run_fiber, 0);
    }
    for (int left = LANES; left > 0 && !*failure;) {
        bool moved = false;
        for (int w = 0; w < WARPS; w++) {
            int warp = reversed ? WARPS - 1 - w : w;
            for (bool again = true; again;) {  // a warp runs as far as it can
                again = false;
                for (int lane = 0; lane < 32; lane++) {
                    Fiber &fiber = fibers[32 * warp + lane];
                    if (fiber.done || (fiber.ready && !fiber.ready())) continue;
                    fiber.ready = nullptr;
                    current = 32 * warp + lane;
                    threadIdx.x = current;
                    swapcontext(&scheduler, &fiber.context);
                    if (*failure) return;
                    left -= fiber.done;
                    moved = again = true;
                }
            }
        }
        reversed = !reversed;
        if (moved) continue;
        if (patient) at_rest++;
        else if (!copy_one_box()) snprintf(failure, sizeof failure, "block %u: every thread waits at a barrier that not all of them reach", blockIdx.x);
    }
}

// Every thread of every block, one after the other. What went wrong, or an empty text.
extern "C" const char *launch(const void *p, int grid, int copies_at_once) {
    params = p, gridDim.x = grid;
    eager = copies_at_once;
    adding.clear();
    *failure = 0;
    for (int n = 0; n < grid && !*failure; n++) {
        blockIdx.x = n;
        run_block(n % 2);
    }
    return failure;
}
