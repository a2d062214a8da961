// fp16 and bf16, backward: FlashAttention-2 (Dao 2023), algorithm 2, on mma.sync, without atomics. One kernel owns
// BLOCK_N keys and goes through the queries for dK and dV, one owns BLOCK_M queries and goes through the keys for dQ:
// 7 products where one fused kernel has 5, and every sum has one fixed order.
// This is the first.
#include "half.cuh"

extern __shared__ __align__(1024) unsigned char memory[];

constexpr int TILE_M = BLOCK_M * PITCH, TILE_N = BLOCK_N * PITCH, D = BLOCK_D / 8;
constexpr int M = BLOCK_N / (16 * WARPS), N = BLOCK_M / 8;  // tiles are transposed: a warp has 16 M keys as rows
constexpr int STAGE = 2 * TILE_M + 2 * 4 * BLOCK_M;         // Q, dO, lse2, delta
constexpr bool APART = BLOCK_D >= 192;  // dK and dV together are more than the registers hold: one after the other
// Where a few registers are what it lacks: what can be found again is not kept.
constexpr bool LEAN = STAGES == 2 && BLOCK_D == 128 && BLOCK_M == 64;
static_assert(M * 16 * WARPS == BLOCK_N && N % 2 == 0 && STAGES >= 2, "a tile of whole mma blocks");
static_assert(SHARED == 2 * TILE_N + STAGES * STAGE, "the host and this file agree on shared memory");

__device__ __forceinline__ void load_queries(const Params &p, u32 to, int batch, int head, int row) {
    load_tile<BLOCK_M>(to, static_cast<const half_bits *>(p.q) + batch * p.sq.batch + head * p.sq.head, p.sq.row, row, p.seq_q, p.head_dim);
    load_tile<BLOCK_M>(to + TILE_M, static_cast<const half_bits *>(p.go) + batch * p.sgo.batch + head * p.sgo.head, p.sgo.row, row, p.seq_q, p.head_dim);
    long long rows = (static_cast<long long>(batch) * p.heads + head) * p.rows_padded + row;
    load_floats<BLOCK_M>(to + 2 * TILE_M, p.lse2 + rows);
    load_floats<BLOCK_M>(to + 2 * TILE_M + 4 * BLOCK_M, p.delta + rows);
}

// What all query rows of the group that see the block's keys add to dk (without the scale) and dv.
template <bool DK, bool DV>
__device__ __forceinline__ void gather(const Params &p, const Range &range, int batch, int head_kv, int start, u32 kv, float (&dk)[M][D][4],
                                       float (&dv)[M][D][4]) {
    u32 ring = kv + 2 * TILE_N;
    int lane = threadIdx.x % 32, own_row = threadIdx.x / 32 * 16 * M;
    int offset = p.seq_kv - p.seq_q, j0 = start + own_row + lane / 4;
    u32 of_a = lane_a(), of_b = lane_b(), of_k = of_a + own_row * PITCH;

    int head = head_kv * p.group, end = range.hi > range.lo ? head + p.group : head, row = range.lo;
    int ahead_head = head, ahead_row = row;  // of the tile that is fetched next
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
        if (ahead_head < end) load_queries(p, ring + s * STAGE, batch, ahead_head, ahead_row);
        copy_commit();
        if ((ahead_row += BLOCK_M) >= range.hi) ahead_row = range.lo, ahead_head++;
    }
    u32 here = 0;
    while (head < end) {
        forget(of_k);
        copy_wait<STAGES - 2>();
        __syncthreads();  // the tile of this round is there, and the one of the last is read
        if (LEAN && (ahead_head = head, ahead_row = row + BLOCK_M) >= range.hi) ahead_row = range.lo, ahead_head++;
        if (ahead_head < end) load_queries(p, ring + (here == 0 ? (STAGES - 1) * STAGE : here - STAGE), batch, ahead_head, ahead_row);
        copy_commit();
        if (!LEAN && (ahead_row += BLOCK_M) >= range.hi) ahead_row = range.lo, ahead_head++;
        int i0 = row + offset + lane % 4 * 2;
        float slope = slope_of(p, batch, head);
        u32 lse2 = ring + here + 2 * TILE_M + lane % 4 * 8, delta = lse2 + 4 * BLOCK_M;

        float s[M][N][4] = {};
        multiply_nt(s, kv, of_k, ring + here, of_b);
        u32 weights[M][N][2];
        float factor[M][N][4];
#pragma unroll
        for (int n = 0; n < N; n++) {
            float2 base = load_pair(lse2 + 32 * n);
#pragma unroll
            for (int m = 0; m < M; m++) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    int i = i0 + 8 * n + e % 2, j = j0 + 16 * m + e / 2 * 8;
                    factor[m][n][e] = weigh(p, s[m][n][e], i, j, slope, e % 2 ? base.y : base.x);
                }
            }
        }
        if (row < range.full_lo || row >= range.full_hi) {
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int n = 0; n < N; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        int i = i0 + 8 * n + e % 2, j = j0 + 16 * m + e / 2 * 8;
                        if (j < i - p.left || j > i + p.right) s[m][n][e] = 0.0f;
                    }
        }
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int n = 0; n < N; n++) {
                weights[m][n][0] = pack(s[m][n][0], s[m][n][1]);
                weights[m][n][1] = pack(s[m][n][2], s[m][n][3]);
#pragma unroll
                for (int e = 0; e < 4; e++) s[m][n][e] *= factor[m][n][e];
            }
        if constexpr (DV) multiply_nn(dv, weights, ring + here + TILE_M, of_a);
        if constexpr (DK) {
            float dp[M][N][4];  // dp - delta
#pragma unroll
            for (int n = 0; n < N; n++) {
                float2 base = load_pair(delta + 32 * n);
#pragma unroll
                for (int m = 0; m < M; m++) dp[m][n][0] = dp[m][n][2] = -base.x, dp[m][n][1] = dp[m][n][3] = -base.y;
            }
            multiply_nt(dp, kv + TILE_N, of_k, ring + here + TILE_M, of_b);
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int n = 0; n < N; n++) {
                    weights[m][n][0] = pack(s[m][n][0] * dp[m][n][0], s[m][n][1] * dp[m][n][1]);
                    weights[m][n][1] = pack(s[m][n][2] * dp[m][n][2], s[m][n][3] * dp[m][n][3]);
                }
            multiply_nn(dk, weights, ring + here, of_a);
        }
        here = here == (STAGES - 1) * STAGE ? 0 : here + STAGE;
        if ((row += BLOCK_M) >= range.hi) row = range.lo, head++;
    }
    copy_wait<0>();
    __syncthreads();  // K and V have arrived also where no query sees them, and the ring is free again
}

// dv[j] = sum_i p[i,j] do[i] and dk[j] = sum_i ds[i,j] q[i], for BLOCK_N keys of one head and all its query heads
extern "C" __global__ void __launch_bounds__(THREADS) cuda_gradients_kv(const __grid_constant__ Params p) {
    int tiles = cdiv(p.seq_kv, BLOCK_N), pid = blockIdx.x, heads_kv = p.heads / p.group;
    int start = pid % tiles * BLOCK_N;  // under a causal mask the first keys are seen by the most rows, and start first
    int batch = pid / tiles / heads_kv, head = pid / tiles % heads_kv;
    Range range = queries_of<BLOCK_M>(p, start, BLOCK_N);
    u32 kv = shared_address(memory);
    load_tile<BLOCK_N>(kv, static_cast<const half_bits *>(p.k) + batch * p.sk.batch + head * p.sk.head, p.sk.row, start, p.seq_kv, p.head_dim);
    load_tile<BLOCK_N>(kv + TILE_N, static_cast<const half_bits *>(p.v) + batch * p.sv.batch + head * p.sv.head, p.sv.row, start, p.seq_kv, p.head_dim);

    void *dk_head = static_cast<half_bits *>(p.dk) + batch * p.sdk.batch + head * p.sdk.head;
    void *dv_head = static_cast<half_bits *>(p.dv) + batch * p.sdv.batch + head * p.sdv.head;
    int own_row = threadIdx.x / 32 * 16 * M;
    float dk[M][D][4] = {}, dv[M][D][4] = {};
    gather<true, !APART>(p, range, batch, head, start, kv, dk, dv);
    if (LEAN) {
        dk_head = static_cast<half_bits *>(p.dk) + batch * p.sdk.batch + head * p.sdk.head;
        dv_head = static_cast<half_bits *>(p.dv) + batch * p.sdv.batch + head * p.sdv.head;
    }
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int d = 0; d < D; d++)
#pragma unroll
            for (int e = 0; e < 4; e++) dk[m][d][e] *= p.dscale;
    // Each warp through its own rows of V, and of K, which nobody reads any more.
    store_rows(dk_head, p.sdk.row, dk, kv + TILE_N + own_row * PITCH, start + own_row, p.seq_kv, p.head_dim);
    if constexpr (APART) gather<false, true>(p, range, batch, head, start, kv, dk, dv);
    store_rows(dv_head, p.sdv.row, dv, kv + own_row * PITCH, start + own_row, p.seq_kv, p.head_dim);
}
