// FlashAttention-2 (Dao 2023), algorithm 1, in TF32 on tensor cores: one block per BLOCK_M query rows of a head.
#include "fp32_tf32.cuh"

constexpr int M = BLOCK_M / (16 * WARPS), N = BLOCK_N / 8, D = BLOCK_D / 8;
constexpr int STAGE = BLOCK_N * PITCH;
static_assert(M * 16 * WARPS == BLOCK_M && N % 2 == 0, "a tile of whole mma blocks");
static_assert(SHARED == 4 * (BLOCK_M * PITCH + STAGES * STAGE), "as fp32.py says");

// Of each tile of keys: K, then V.
struct Loader {
    const Params &p;
    Head k, v;
    int start, hi;
    bool of_v;
    __device__ __forceinline__ void arrived(float *stage) { round_own<BLOCK_N>(stage); }
    __device__ __forceinline__ void operator()(float *stage) {
        if (start >= hi) return;
        const Head x = {of_v ? v.rows : k.rows, of_v ? p.sv.row : p.sk.row};  // a choice of structs would go by memory
        load_tile<BLOCK_N, BLOCK_D, PITCH>(stage, x, start, p.seq_kv, 0, p.head_dim);
        if (of_v) start += BLOCK_N;
        of_v = !of_v;
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
    Loader loader = {p, head_of(p.k, p.sk, batch, head / p.group), head_of(p.v, p.sv, batch, head / p.group), keys.lo, keys.hi, false};
    Ring<STAGE, Loader> ring(q_tile + BLOCK_M * PITCH, loader);
    copy_wait<STAGES - 2>();
    round_own<BLOCK_M>(q_tile);

    float acc[M][D][4] = {}, m_i[M][2], l_i[M][2];  // l_i: of this thread's columns, summed over the row at the end
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) m_i[m][h] = -INF, l_i[m][h] = 0.0f;

    for (int start_n = keys.lo; start_n < keys.hi; start_n += BLOCK_N) {
        float s[M][N][4];
        const float *k_tile = ring.next();
        multiply_nt(s, shared_address(q_tile + own * PITCH), shared_address(k_tile), lane);
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
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int h = 0; h < 4; h += 2) {
                float high = s[m][0][h];
#pragma unroll
                for (int n = 0; n < N; n++) high = fmaxf(high, fmaxf(s[m][n][h], s[m][n][h + 1]));
#pragma unroll
                for (int far = 1; far < 4; far *= 2) high = fmaxf(high, __shfl_xor_sync(~0u, high, far));
                high = fmaxf(m_i[m][h / 2], FOLD ? high * p.scale : high);
                const float safe = high == -INF ? 0.0f : high;  // a row that saw no key yet stays finite
                const float alpha = exp2_approx(m_i[m][h / 2] - safe);
                m_i[m][h / 2] = high;
                float sum = 0.0f;
#pragma unroll
                for (int n = 0; n < N; n++)
#pragma unroll
                    for (int e = h; e < h + 2; e++) {
                        // One formula for masked and full tiles: a row's result does not depend on where tiles fall.
                        const float weight = exp2_approx(FOLD ? fmaf(s[m][n][e], p.scale, -safe) : s[m][n][e] - safe);
                        sum += weight;
                        s[m][n][e] = __uint_as_float(__float_as_uint(weight) + 0x1000u);  // rounded(); l_i keeps a NaN
                    }
                l_i[m][h / 2] = l_i[m][h / 2] * alpha + sum;
#pragma unroll
                for (int d = 0; d < D; d++) acc[m][d][h] *= alpha, acc[m][d][h + 1] *= alpha;
            }
        const float *v_tile = ring.next();
        multiply_nn(acc, s, shared_address(v_tile), lane);
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
            sum = sum == 0.0f ? 1.0f : sum;  // a row that saw no key: o = 0, and lse = m_i = -inf
            const int row = start_m + own + 16 * m + 8 * h + lane.g;
            if (lane.t == 0 && row < p.seq_q) lse[row] = (m_i[m][h] + log2_approx(sum)) * LN2;
            const float factor = 1.0f / sum;
#pragma unroll
            for (int d = 0; d < D; d++) acc[m][d][2 * h] *= factor, acc[m][d][2 * h + 1] *= factor;
        }
    store_rows(p.o, p.so, batch, head, start_m + own, p.seq_q, 0, p.head_dim, acc, 1.0f, lane);
}
