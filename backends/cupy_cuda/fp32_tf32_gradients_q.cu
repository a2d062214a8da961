// FlashAttention-2 (Dao 2023), algorithm 2, in TF32 on tensor cores: dQ, one block per BLOCK_M query rows of a head.
#include "fp32_tf32.cuh"

constexpr int M = BLOCK_M / (16 * WARPS), N = BLOCK_N / 8, D = BLOCK_D / 8;
constexpr int TILE = BLOCK_M * PITCH, TILE_N = BLOCK_N * PITCH;
static_assert(M * 16 * WARPS == BLOCK_M && N % 2 == 0, "a tile of whole mma blocks");
static_assert(SHARED == 4 * (2 * TILE + STAGES * 2 * TILE_N), "as fp32.py says");

// Tiles of keys: K and V.
struct Loader {
    const Params &p;
    Head k, v;
    int start, hi;
    __device__ __forceinline__ void arrived(float *stage) { round_own<BLOCK_N>(stage), round_own<BLOCK_N>(stage + TILE_N); }
    __device__ __forceinline__ void operator()(float *stage) {
        if (start >= hi) return;
        load_tile<BLOCK_N, BLOCK_D, PITCH>(stage, k, start, p.seq_kv, 0, p.head_dim);
        load_tile<BLOCK_N, BLOCK_D, PITCH>(stage + TILE_N, v, start, p.seq_kv, 0, p.head_dim);
        start += BLOCK_N;
    }
};

// dq[i] = sum_j ds[i,j] k[j]
extern "C" __global__ void __launch_bounds__(THREADS) cuda_gradients_q(const __grid_constant__ Params p) {
    const int tiles = cdiv(p.seq_q, BLOCK_M), index = blockIdx.x / tiles;
    const int start_m = (tiles - 1 - blockIdx.x % tiles) * BLOCK_M;  // under a causal mask the longest rows start first
    const int batch = index / p.heads, head = index % p.heads, own = threadIdx.x / 32 * 16 * M;
    const Range keys = keys_of<BLOCK_N>(p, start_m, BLOCK_M);
    const float slope = slope_of(p, batch, head);
    const Lane lane;
    const int i0 = start_m + own + lane.g + p.seq_kv - p.seq_q;

    float *q_tile = reinterpret_cast<float *>(memory);
    load_tile<BLOCK_M, BLOCK_D, PITCH>(q_tile, head_of(p.q, p.sq, batch, head), start_m, p.seq_q, 0, p.head_dim);
    load_tile<BLOCK_M, BLOCK_D, PITCH>(q_tile + TILE, head_of(p.go, p.sgo, batch, head), start_m, p.seq_q, 0, p.head_dim);
    Loader loader = {p, head_of(p.k, p.sk, batch, head / p.group), head_of(p.v, p.sv, batch, head / p.group), keys.lo, keys.hi};
    Ring<2 * TILE_N, Loader> ring(q_tile + 2 * TILE, loader);
    copy_wait<STAGES - 2>();
    round_own<BLOCK_M>(q_tile), round_own<BLOCK_M>(q_tile + TILE);

    float dq[M][D][4] = {}, lse2[M][2], delta[M][2];
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int row = start_m + own + lane.g + 16 * m + 8 * h;
            const long long from = static_cast<long long>(index) * p.rows_padded + row;
            lse2[m][h] = row < p.seq_q ? p.lse2[from] : INF, delta[m][h] = row < p.seq_q ? p.delta[from] : 0.0f;
        }

    for (int start_n = keys.lo; start_n < keys.hi; start_n += BLOCK_N) {
        const bool masked = start_n < keys.full_lo || start_n >= keys.full_hi;
        float s[M][N][4], dp[M][N][4];
        const float *k_tile = ring.next();
        multiply_nt(s, shared_address(q_tile + own * PITCH), shared_address(k_tile), lane);
        multiply_nt(dp, shared_address(q_tile + TILE + own * PITCH), shared_address(k_tile + TILE_N), lane);
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const int i = i0 + 16 * m + e / 2 * 8, j = start_n + lane.column(n, e);
                    const float factor = weigh(p, s[m][n][e], i, j, slope, lse2[m][e / 2]);
                    float ds = s[m][n][e] * factor * (dp[m][n][e] - delta[m][e / 2]);
                    if (masked && !visible(p, i, j)) ds = 0.0f;  // p of a hidden key may be inf, and its dp inf or nan
                    s[m][n][e] = __uint_as_float(rounded(ds));
                }
        multiply_nn(dq, s, shared_address(k_tile), lane);
    }
    copy_wait<0>();
    store_rows(p.dq, p.sdq, batch, head, start_m + own, p.seq_q, 0, p.head_dim, dq, p.dscale, lane);
}
