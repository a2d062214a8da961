// FlashAttention-2 (Dao 2023), algorithm 2, in TF32 on tensor cores: dK and dV, one block per BLOCK_N keys of a head.
#include "fp32_tf32.cuh"

// Where dk and dv of whole rows are more than a warp's registers hold, two warps share the rows: each computes all of
// p and ds, and gathers half the columns.
constexpr int SPLIT = BLOCK_D > 128 ? 2 : 1;
constexpr int M = BLOCK_N * SPLIT / (16 * WARPS), N = BLOCK_M / 8, D = BLOCK_D / 8 / SPLIT;
constexpr int TILE = BLOCK_N * PITCH, TILE_M = BLOCK_M * PITCH;
static_assert(M * 16 * WARPS == BLOCK_N * SPLIT && N % 2 == 0, "a tile of whole mma blocks");
static_assert(SHARED == 4 * (2 * TILE + STAGES * 2 * TILE_M), "as fp32.py says");

// Tiles of queries: Q and dO, for one query head after the other.
struct Loader {
    const Params &p;
    int batch, head, members, start, lo, hi;
    __device__ __forceinline__ void arrived(float *stage) { round_own<BLOCK_M>(stage), round_own<BLOCK_M>(stage + TILE_M); }
    __device__ __forceinline__ void operator()(float *stage) {
        if (members == 0) return;
        load_tile<BLOCK_M, BLOCK_D, PITCH>(stage, head_of(p.q, p.sq, batch, head), start, p.seq_q, 0, p.head_dim);
        load_tile<BLOCK_M, BLOCK_D, PITCH>(stage + TILE_M, head_of(p.go, p.sgo, batch, head), start, p.seq_q, 0, p.head_dim);
        start += BLOCK_M;
        if (start < hi) return;
        start = lo, members--, head++;
    }
};

// dv[j] = sum_i p[i,j] do[i] and dk[j] = sum_i ds[i,j] q[i], on transposed tiles: rows are keys, columns queries.
extern "C" __global__ void __launch_bounds__(THREADS) cuda_gradients_kv(const __grid_constant__ Params p) {
    const int tiles = cdiv(p.seq_kv, BLOCK_N), index = blockIdx.x / tiles, heads_kv = p.heads / p.group;
    const int start_n = blockIdx.x % tiles * BLOCK_N;  // under a causal mask the first keys are seen by the most rows
    const int batch = index / heads_kv, head_kv = index % heads_kv, offset = p.seq_kv - p.seq_q;
    const int warp = threadIdx.x / 32, own = warp / SPLIT * 16 * M, columns = warp % SPLIT * 8 * D;
    const Range queries = queries_of<BLOCK_M>(p, start_n, BLOCK_N);
    const Lane lane;

    float *k_tile = reinterpret_cast<float *>(memory);
    load_tile<BLOCK_N, BLOCK_D, PITCH>(k_tile, head_of(p.k, p.sk, batch, head_kv), start_n, p.seq_kv, 0, p.head_dim);
    load_tile<BLOCK_N, BLOCK_D, PITCH>(k_tile + TILE, head_of(p.v, p.sv, batch, head_kv), start_n, p.seq_kv, 0, p.head_dim);
    Loader loader = {p, batch, head_kv * p.group, queries.lo < queries.hi ? p.group : 0, queries.lo, queries.lo, queries.hi};
    Ring<2 * TILE_M, Loader> ring(k_tile + 2 * TILE, loader);
    copy_wait<STAGES - 2>();
    round_own<BLOCK_N>(k_tile), round_own<BLOCK_N>(k_tile + TILE);

    float dk[M][D][4] = {}, dv[M][D][4] = {};
    for (int head = head_kv * p.group; head < (head_kv + 1) * p.group; head++) {  // in one fixed order
        const float slope = slope_of(p, batch, head);
        const long long rows = (static_cast<long long>(batch) * p.heads + head) * p.rows_padded;
        for (int start_m = queries.lo; start_m < queries.hi; start_m += BLOCK_M) {
            const bool masked = start_m < queries.full_lo || start_m >= queries.full_hi;
            float s[M][N][4], dp[M][N][4];
            const float *q_tile = ring.next();
            multiply_nt(s, shared_address(k_tile + own * PITCH), shared_address(q_tile), lane);
            multiply_nt(dp, shared_address(k_tile + TILE + own * PITCH), shared_address(q_tile + TILE_M), lane);
#pragma unroll
            for (int n = 0; n < N; n++) {
                const long long row = rows + start_m + lane.column(n, 0);  // of the first of two queries; padded rows are there
                const float2 lse2 = *reinterpret_cast<const float2 *>(p.lse2 + row);
                const float2 delta = *reinterpret_cast<const float2 *>(p.delta + row);
#pragma unroll
                for (int m = 0; m < M; m++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        const int i = start_m + lane.column(n, e) + offset, j = start_n + own + 16 * m + e / 2 * 8 + lane.g;
                        const float factor = weigh(p, s[m][n][e], i, j, slope, e % 2 ? lse2.y : lse2.x);
                        float ds = s[m][n][e] * factor * (dp[m][n][e] - (e % 2 ? delta.y : delta.x));
                        if (masked && !visible(p, i, j)) s[m][n][e] = ds = 0.0f;
                        s[m][n][e] = __uint_as_float(rounded(s[m][n][e]));
                        dp[m][n][e] = __uint_as_float(rounded(ds));
                    }
            }
            multiply_nn(dv, s, shared_address(q_tile + TILE_M + columns), lane);
            multiply_nn(dk, dp, shared_address(q_tile + columns), lane);
        }
    }
    copy_wait<0>();
    store_rows(p.dk, p.sdk, batch, head_kv, start_n + own, p.seq_kv, columns, p.head_dim, dk, p.dscale, lane);
    store_rows(p.dv, p.sdv, batch, head_kv, start_n + own, p.seq_kv, columns, p.head_dim, dv, 1.0f, lane);
}
