// FlashAttention-2 (Dao 2023), algorithm 1, in TF32 on tensor cores: one block per BLOCK_M query rows of a head.
#include "fp32_tf32.cuh"

constexpr int M = BLOCK_M / (16 * WARPS), N = BLOCK_N / 8, D = BLOCK_D / 8;
constexpr int STAGE = BLOCK_N * PITCH;
// m_i is a maximum of the row's logits so far, not always the latest: it follows when they have grown by more than this,
// in the log2 domain. Until then weights are up to 2^GROWTH, as exact as others, and no tile waits for its row maxima.
constexpr float GROWTH = 8.0f;
constexpr float LOWEST = -3.402823466e38f;  // m_i of a row that saw no key yet: finite, so that exp2(-inf - m_i) = 0
static_assert(M * 16 * WARPS == BLOCK_M && N % 2 == 0, "a tile of whole mma blocks");
static_assert(SHARED == 4 * (BLOCK_M * PITCH + STAGES * STAGE), "as fp32.py says");

struct OfK {
    int start;
};
struct OfV {
    int start;
};

// Of each tile of keys: K, then V. Beside a piece that is taken, the one STAGES - 1 on is loaded.
struct Loader {
    const Params &p;
    Head k, v;
    int hi, start;  // of the first pieces, which nobody takes
    bool of_v;
    __device__ __forceinline__ void arrived(float *stage, OfK) { round_in_place<BLOCK_N, false>(stage); }
    __device__ __forceinline__ void arrived(float *stage, OfV) { round_in_place<BLOCK_N, true>(stage); }
    __device__ __forceinline__ void operator()(float *stage, OfK at) {
        copy<STAGES % 2 == 0>(stage, at.start + (STAGES - 1) / 2 * BLOCK_N);
    }
    __device__ __forceinline__ void operator()(float *stage, OfV at) {
        copy<STAGES % 2 != 0>(stage, at.start + STAGES / 2 * BLOCK_N);
    }
    __device__ __forceinline__ void operator()(float *stage) {
        if (of_v) copy<true>(stage, start), start += BLOCK_N;
        else copy<false>(stage, start);
        of_v = !of_v;
    }
    template <bool V>
    __device__ __forceinline__ void copy(float *stage, int start) {
        if (start < hi) load_tile<BLOCK_N, BLOCK_D, PITCH, 0, 0, V>(stage, V ? v : k, start, p.seq_kv, 0, p.head_dim);
    }
};

extern "C" __global__ void __launch_bounds__(THREADS) cuda_attention_forward(const __grid_constant__ Params p) {
    const int tiles = cdiv(p.seq_q, BLOCK_M), index = blockIdx.x / tiles;  // of one head are neighbours: its k, v stay in L2
    const int start_m = (tiles - 1 - blockIdx.x % tiles) * BLOCK_M;  // under a causal mask the longest rows start first
    const int batch = index / p.heads, head = index % p.heads, own = threadIdx.x / 32 * 16 * M;
    const Range keys = keys_of<BLOCK_N>(p, start_m, BLOCK_M);
    const float slope = slope_of(p, batch, head);
    const Lane lane;
    const int i0 = start_m + own + lane.g + p.seq_kv - p.seq_q;  // this thread's first row, on the diagonal

    float *q_tile = reinterpret_cast<float *>(memory);
    load_tile<BLOCK_M, BLOCK_D, PITCH>(q_tile, head_of(p.q, p.sq, batch, head), start_m, p.seq_q, 0, p.head_dim);
    Loader loader = {p, head_of(p.k, p.sk, batch, head / p.group), head_of(p.v, p.sv, batch, head / p.group), keys.hi, keys.lo, false};
    Ring<STAGE, Loader> ring(q_tile + BLOCK_M * PITCH, loader);
    ring.prepare(OfK{});
    round_own<BLOCK_M>(q_tile);

    float acc[M][D][4] = {}, m_i[M][2], l_i[M][2];  // l_i: of this thread's columns, summed over the row at the end
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) m_i[m][h] = LOWEST, l_i[m][h] = 0.0f;

    for (int start_n = keys.lo; start_n < keys.hi; start_n += BLOCK_N) {
        float s[M][N][4];
        const float *k_tile = ring.take(OfK{start_n});
        multiply_nt(s, shared_address(q_tile + own * PITCH), shared_address(k_tile), lane);
        if (STAGES > 2) ring.prepare(OfV{});  // beside that product, if V's copy began before it
#if !FOLD
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    float t;
                    s[m][n][e] = logit(p, s[m][n][e], i0 + 16 * m + e / 2 * 8, start_n + lane.column(n, e), slope, t);
                }
#endif
        if (start_n < keys.full_lo || start_n >= keys.full_hi) {
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int n = 0; n < N; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        if (!visible(p, i0 + 16 * m + e / 2 * 8, start_n + lane.column(n, e))) s[m][n][e] = -INF;
        }
        float high[M][2];  // of this thread's columns
        bool fits = true;
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                high[m][h] = s[m][0][2 * h];
#pragma unroll
                for (int n = 0; n < N; n++) high[m][h] = fmaxf(high[m][h], fmaxf(s[m][n][2 * h], s[m][n][2 * h + 1]));
                fits = fits && !(fmaf(high[m][h], FOLD ? p.scale : 1.0f, -GROWTH) > m_i[m][h]);
            }
        if (!__all_sync(~0u, fits)) {
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    float most = high[m][h];
#pragma unroll
                    for (int far = 1; far < 4; far *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, far));
                    // Its own maximum alone decides: a row's result does not depend on its neighbours.
                    const bool grew = fmaf(most, FOLD ? p.scale : 1.0f, -GROWTH) > m_i[m][h];
                    most = grew ? FOLD ? most * p.scale : most : m_i[m][h];
                    const float alpha = exp2_approx(m_i[m][h] - most);
                    m_i[m][h] = most;
                    l_i[m][h] *= alpha;
#pragma unroll
                    for (int d = 0; d < D; d++) acc[m][d][2 * h] *= alpha, acc[m][d][2 * h + 1] *= alpha;
                }
        }
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int h = 0; h < 2; h++)
#pragma unroll
                for (int n = 0; n < N; n++)
#pragma unroll
                    for (int e = 2 * h; e < 2 * h + 2; e++) {
                        // One formula for masked and full tiles: a row's result does not depend on where tiles fall.
                        const float weight = exp2_approx(FOLD ? fmaf(s[m][n][e], p.scale, -m_i[m][h]) : s[m][n][e] - m_i[m][h]);
                        l_i[m][h] += weight;
                        s[m][n][e] = __uint_as_float(__float_as_uint(weight) + 0x1000u);  // rounded(); l_i keeps a NaN
                    }
        if (STAGES == 2) ring.prepare(OfV{});
        const float *v_tile = ring.take(OfV{start_n});
        multiply_nn<true>(acc, s, shared_address(v_tile), lane);
        ring.prepare(OfK{});  // past the last tile: of what is never taken
    }
    copy_wait<0>();

    float *lse = p.lse + static_cast<long long>(index) * p.seq_q;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float sum = l_i[m][h];
#pragma unroll
            for (int far = 1; far < 4; far *= 2) sum += __shfl_xor_sync(~0u, sum, far);
            const bool none = sum == 0.0f;  // a row that saw no key: o = 0, lse = -inf
            sum = none ? 1.0f : sum;
            const int row = start_m + own + 16 * m + 8 * h + lane.g;
            if (lane.t == 0 && row < p.seq_q) lse[row] = none ? -INF : (m_i[m][h] + log2_approx(sum)) * LN2;
            const float factor = 1.0f / sum;
#pragma unroll
            for (int d = 0; d < D; d++) acc[m][d][2 * h] *= factor, acc[m][d][2 * h + 1] *= factor;
        }
    store_rows(p.o, p.so, batch, head, start_m + own, p.seq_q, 0, p.head_dim, acc, 1.0f, lane);
}
