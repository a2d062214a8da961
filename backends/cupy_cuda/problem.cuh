// What the kernels of every class share: which keys a tile of queries sees, the mask, the logits.
#pragma once
#include "params.cuh"
#include "ptx.cuh"

#define INF __int_as_float(0x7f800000)
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

__device__ __forceinline__ int cdiv(int a, int b) { return (a + b - 1) / b; }

// tanh to a few ulp. Small arguments by a polynomial (Cephes tanhf), where 1 - exp(-2x) cancels.
__device__ __forceinline__ float tanh_exact(float x) {
    float z = x * x;
    float small = ((((-5.70498872745e-3f * z + 2.06390887954e-2f) * z - 5.37397155531e-2f) * z + 1.33314422036e-1f) * z -
                   3.33332819422e-1f) * z * x + x;
    float e = exp2_approx(fabsf(x) * -2.8853900817779268f);  // exp(-2|x|)
    float large = copysignf(__fdividef(1.0f - e, 1.0f + e), x);
    return z < 0.390625f ? small : large;
}

// Keys [lo, hi) are visible to some of the query rows start .. start + rows - 1, of which [full_lo, full_hi) to every
// one. All but hi are multiples of BLOCK.
struct Range {
    int lo, full_lo, full_hi, hi;
};

template <int BLOCK>
__device__ __forceinline__ Range keys_of(const Params &p, int start, int rows) {
    int offset = p.seq_kv - p.seq_q;  // bottom-right: row i sees keys up to i + offset (flash-attention >= 2.1)
    int first = start + offset, last = min(start + rows, p.seq_q) - 1 + offset;
    Range r;
    r.lo = max(first - p.left, 0) / BLOCK * BLOCK;
    r.hi = min(p.seq_kv, max(last + p.right + 1, 0));
    r.full_lo = min(cdiv(max(last - p.left, 0), BLOCK), cdiv(r.hi, BLOCK)) * BLOCK;
    r.full_hi = max(r.full_lo, min(p.seq_kv, max(first + p.right + 1, 0)) / BLOCK * BLOCK);
    return r;
}

// The same for query rows, seen from the keys start .. start + keys - 1. Rows past seq_q need no mask: their lse2 is
// +inf. Nor do keys past seq_kv: what they gather is not stored.
template <int BLOCK>
__device__ __forceinline__ Range queries_of(const Params &p, int start, int keys) {
    int offset = p.seq_kv - p.seq_q, last = min(start + keys, p.seq_kv) - 1;
    Range r;
    r.lo = max(start - offset - p.right, 0) / BLOCK * BLOCK;
    r.hi = min(p.seq_q, max(last - offset + p.left + 1, 0));
    int end = cdiv(r.hi, BLOCK) * BLOCK;
    r.full_lo = min(cdiv(max(last - offset - p.right, 0), BLOCK) * BLOCK, end);
    int below = max(start - offset + p.left + 1, 0);
    r.full_hi = max(r.full_lo, below >= p.seq_q ? end : min(below / BLOCK * BLOCK, end));
    return r;
}

// The logit of q.k product s in the log2 domain, for a query at diagonal place i and key j; with SOFTCAP, t = its tanh.
__device__ __forceinline__ float logit(const Params &p, float s, int i, int j, float slope, float &t) {
    float x = s * p.scale;
#if SOFTCAP
    t = tanh_exact(x);
    x = p.cap * t;
#endif
#if ALIBI
    x -= slope * static_cast<float>(abs(i - j));
#endif
    return x;
}

__device__ __forceinline__ float slope_of(const Params &p, int batch, int head) {
#if ALIBI
    return p.slopes[batch * p.slopes_batch + head * p.slopes_head] * LOG2E;
#else
    return 0.0f;
#endif
}

// p = exp2(logit - lse2) in place of the product s; what is returned is d(softcap)/ds.
__device__ __forceinline__ float weigh(const Params &p, float &s, int i, int j, float slope, float lse2) {
    float t = 0.0f;
    s = exp2_approx(logit(p, s, i, j, slope, t) - lse2);
#if SOFTCAP
    return 1.0f - t * t;
#else
    return 1.0f;
#endif
}
