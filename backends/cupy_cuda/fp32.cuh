// What the float32 kernels share: copies into shared memory, the mask, the logits.
//
// Indices: `i` is a query's place on the bottom-right diagonal (row + seq_kv - seq_q), `j` a key. Logits live in the
// log2 domain, since exp2 is one instruction and exp is two.
#pragma once

#include "params.cuh"

// tests/compile/simt_on_cpu.cpp defines these itself and runs the kernels on a CPU.
#ifndef ON_CPU
#define DEVICE __device__ __forceinline__

DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 16 bytes to shared memory, behind the program's back; those past `bytes` become 0.
DEVICE void copy_async(float *to, const float *from, int bytes) {
    unsigned address = (unsigned)__cvta_generic_to_shared(to);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
}
DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
DEVICE void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
#endif

constexpr int THREADS = 32 * WARPS;
constexpr float INFINITE = __builtin_huge_valf();

// One head of a tensor: rows `stride` elements apart.
struct Head {
    const float *rows;
    long long stride;
};
DEVICE Head head_of(const void *x, const Strides &s, int batch, int head) {
    return {(const float *)x + batch * s.batch + head * s.head, s.row};
}

// Rows start.. of a head, columns d.., as ROWS x COLUMNS floats; 0 past `seq` and past head_dim. In shared memory rows
// are `PITCH` floats apart, and every GAP_ROWS rows 4 more.
template <int ROWS, int COLUMNS, int PITCH, int GAP_ROWS>
DEVICE void copy_tile(float *to, Head head, int start, int seq, int d, int head_dim) {
    constexpr int ACROSS = COLUMNS / 4, PIECES = ROWS * ACROSS;
    const int column = threadIdx.x % ACROSS * 4;
    const int wide = 4 * min(max(head_dim - d - column, 0), 4);
#pragma unroll
    for (int n = 0; n < (PIECES + THREADS - 1) / THREADS; n++) {
        const int row = (threadIdx.x + n * THREADS) / ACROSS;
        static_assert(THREADS % ACROSS == 0, "a thread copies one column of pieces");
        if (PIECES % THREADS && row >= ROWS) break;
        const bool inside = start + row < seq && wide > 0;
        const float *from = inside ? head.rows + (start + row) * head.stride + d + column : head.rows;
        copy_async(to + row * PITCH + (GAP_ROWS ? row / GAP_ROWS * 4 : 0) + column, from, inside ? wide : 0);
    }
}

// Four neighbouring floats of an output row at once where its address allows it.
DEVICE void store_row(float *row, int column, int head_dim, const float4 &x) {
    float *to = row + column;
    if (column + 4 <= head_dim && (unsigned long long)to % 16 == 0) {
        *(float4 *)to = x;
    } else {
        if (column < head_dim) to[0] = x.x;
        if (column + 1 < head_dim) to[1] = x.y;
        if (column + 2 < head_dim) to[2] = x.z;
        if (column + 3 < head_dim) to[3] = x.w;
    }
}

// One side's tile against the other's: `first` to `last` are its outermost indices (queries as i, or keys), seen from
// which the other side is visible from x - before to x + after. lo .. hi in whole tiles of STEP cover what somebody
// sees; full_lo .. full_hi is what everybody sees.
struct Range {
    int lo, hi, full_lo, full_hi;
};
template <int STEP>
DEVICE Range range_of(int first, int last, int before, int after, int length) {
    Range r;
    r.lo = max(first - before, 0) / STEP * STEP;
    r.hi = min(length, max(last + after + 1, 0));
    r.full_lo = max(last - before, 0);
    r.full_hi = min(length, first + after + 1);
    return r;
}

DEVICE bool visible(int i, int j, const Params &p) { return j <= i + p.right && j >= i - p.left && j < p.seq_kv; }

// tanh to a few ulp. Small arguments by a polynomial (Cephes tanhf), where 1 - exp(-2x) cancels.
DEVICE float tanh_exact(float x) {
    const float z = x * x;
    const float small =
        ((((-5.70498872745e-3f * z + 2.06390887954e-2f) * z - 5.37397155531e-2f) * z + 1.33314422036e-1f) * z -
         3.33332819422e-1f) * z * x + x;
    const float e = exp2_fast(fabsf(x) * -2.8853900817779268f);  // exp(-2|x|)
    const float large = (1.0f - e) / (1.0f + e);
    return z < 0.390625f ? small : x < 0.0f ? -large : large;
}

// The logit of a product s = q.k. `t` gets the tanh that a softcap took.
DEVICE float logit(float s, int i, int j, float slope, const Params &p, float &t) {
    s *= p.scale;
#if SOFTCAP
    t = tanh_exact(s);
    s = p.cap * t;
#endif
#if ALIBI
    s -= slope * fabsf((float)(i - j));
#endif
    return s;
}
// Its weight, shift being the row's maximum or lse.
DEVICE float weight(float s, float shift, int i, int j, float slope, const Params &p, float &t) {
#if FOLD  // a plain positive factor: one fma
    return exp2_fast(fmaf(s, p.scale, -shift));
#else
    return exp2_fast(logit(s, i, j, slope, p, t) - shift);
#endif
}

DEVICE float slope_of(const Params &p, int batch, int head) {
#if ALIBI
    return p.slopes[batch * p.slopes_batch + head * p.slopes_head] * 1.4426950408889634f;
#else
    return 0.0f;
#endif
}
