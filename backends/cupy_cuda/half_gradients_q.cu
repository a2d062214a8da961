// fp16 and bf16, backward: the second kernel, for dQ. half_gradients_kv.cu is the first.
#include "half.cuh"

extern __shared__ __align__(1024) unsigned char memory[];

constexpr int TILE_M = BLOCK_M * PITCH, TILE_N = BLOCK_N * PITCH, D = BLOCK_D / 8;
constexpr int M = BLOCK_M / (16 * WARPS), N = BLOCK_N / 8;
static_assert(M * 16 * WARPS == BLOCK_M && N % 2 == 0 && STAGES >= 2, "a tile of whole mma blocks");
static_assert(SHARED == 2 * TILE_M + STAGES * 2 * TILE_N + 2 * 4 * BLOCK_M, "the host and this file agree on shared memory");

// dq[i] = sum_j ds[i,j] k[j], for BLOCK_M rows of one head
extern "C" __global__ void __launch_bounds__(THREADS) cuda_gradients_q(const __grid_constant__ Params p) {
    int tiles = cdiv(p.seq_q, BLOCK_M), pid = blockIdx.x;
    int start = (tiles - 1 - pid % tiles) * BLOCK_M;  // under a causal mask the longest rows start first
    int batch = pid / tiles / p.heads, head = pid / tiles % p.heads, head_kv = head / p.group;
    const half_bits *k = static_cast<const half_bits *>(p.k) + batch * p.sk.batch + head_kv * p.sk.head;
    const half_bits *v = static_cast<const half_bits *>(p.v) + batch * p.sv.batch + head_kv * p.sv.head;
    int lane = threadIdx.x % 32, own_row = threadIdx.x / 32 * 16 * M;
    int offset = p.seq_kv - p.seq_q, i0 = start + own_row + lane / 4 + offset;
    float slope = slope_of(p, batch, head);
    Range range = keys_of<BLOCK_N>(p, start, BLOCK_M);

    u32 q_tile = shared_address(memory), ring = q_tile + 2 * TILE_M;
    load_tile<BLOCK_M>(q_tile, static_cast<const half_bits *>(p.q) + batch * p.sq.batch + head * p.sq.head, p.sq.row, start, p.seq_q, p.head_dim);
    load_tile<BLOCK_M>(q_tile + TILE_M, static_cast<const half_bits *>(p.go) + batch * p.sgo.batch + head * p.sgo.head, p.sgo.row, start, p.seq_q, p.head_dim);
    u32 lse2 = ring + STAGES * 2 * TILE_N, delta = lse2 + 4 * BLOCK_M;
    load_floats<BLOCK_M>(lse2, p.lse2 + static_cast<long long>(pid / tiles) * p.rows_padded + start);
    load_floats<BLOCK_M>(delta, p.delta + static_cast<long long>(pid / tiles) * p.rows_padded + start);
    lse2 += 4 * (own_row + lane / 4), delta += 4 * (own_row + lane / 4);  // this thread's rows
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
        int j = range.lo + s * BLOCK_N;
        if (j < range.hi) {
            load_tile<BLOCK_N>(ring + s * 2 * TILE_N, k, p.sk.row, j, p.seq_kv, p.head_dim);
            load_tile<BLOCK_N>(ring + s * 2 * TILE_N + TILE_N, v, p.sv.row, j, p.seq_kv, p.head_dim);
        }
        copy_commit();
    }
    float dq[M][D][4] = {};
    u32 of_a = lane_a(), of_b = lane_b(), of_q = of_a + own_row * PITCH;
    u32 here = 0;
    for (int j0 = range.lo; j0 < range.hi; j0 += BLOCK_N) {
        forget(of_b);
        copy_wait<STAGES - 2>();
        __syncthreads();  // the tile of this round is there, and the one of the last is read
        int ahead = j0 + (STAGES - 1) * BLOCK_N;
        if (ahead < range.hi) {
            u32 next = ring + (here == 0 ? (STAGES - 1) * 2 * TILE_N : here - 2 * TILE_N);
            load_tile<BLOCK_N>(next, k, p.sk.row, ahead, p.seq_kv, p.head_dim);
            load_tile<BLOCK_N>(next + TILE_N, v, p.sv.row, ahead, p.seq_kv, p.head_dim);
        }
        copy_commit();

        float s[M][N][4] = {}, dp[M][N][4];  // dp - delta
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float base = -load_one(delta + 4 * (16 * m + 8 * h));
#pragma unroll
                for (int n = 0; n < N; n++) dp[m][n][2 * h] = dp[m][n][2 * h + 1] = base;
            }
        multiply_nt(s, q_tile, of_q, ring + here, of_b);
        multiply_nt(dp, q_tile + TILE_M, of_q, ring + here + TILE_N, of_b);
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float base = load_one(lse2 + 4 * (16 * m + 8 * h));
#pragma unroll
                for (int n = 0; n < N; n++)
#pragma unroll
                    for (int e = 2 * h; e < 2 * h + 2; e++) {
                        int i = i0 + 16 * m + 8 * h, j = j0 + 8 * n + lane % 4 * 2 + e % 2;
                        float factor = weigh(p, s[m][n][e], i, j, slope, base);
                        s[m][n][e] *= factor * dp[m][n][e];
                    }
            }
        if (j0 < range.full_lo || j0 >= range.full_hi) {  // p of a hidden key may be inf, and its dp inf or nan
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    int i = i0 + 16 * m + 8 * h, low = i - p.left - j0 - lane % 4 * 2;
                    int high = min(i + p.right, p.seq_kv - 1) - j0 - lane % 4 * 2;
#pragma unroll
                    for (int n = 0; n < N; n++)
#pragma unroll
                        for (int e = 0; e < 2; e++)
                            if (8 * n + e < low || 8 * n + e > high) s[m][n][2 * h + e] = 0.0f;
                }
        }
        u32 ds[M][N][2];
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int n = 0; n < N; n++) {
                ds[m][n][0] = pack(s[m][n][0], s[m][n][1]);
                ds[m][n][1] = pack(s[m][n][2], s[m][n][3]);
            }
        multiply_nn(dq, ds, ring + here, of_a);
        here = here == (STAGES - 1) * 2 * TILE_N ? 0 : here + 2 * TILE_N;
    }
    copy_wait<0>();
    __syncthreads();  // no copy is on its way into the rows that are written now, also where there was no key
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int d = 0; d < D; d++)
#pragma unroll
            for (int e = 0; e < 4; e++) dq[m][d][e] *= p.dscale;
    half_bits *dq_head = static_cast<half_bits *>(p.dq) + batch * p.sdq.batch + head * p.sdq.head;
    store_rows(dq_head, p.sdq.row, dq, q_tile + own_row * PITCH, start + own_row, p.seq_q, p.head_dim);
}
