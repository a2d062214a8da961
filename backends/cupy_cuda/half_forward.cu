// fp16 and bf16, forward: FlashAttention-2 (Dao 2023), algorithm 1, on mma.sync. One block per BLOCK_M query rows of a
// head; each warp owns 16 M of them, s and p in its registers. K and V come in a ring of STAGES tiles.
#include "half.cuh"

constexpr int M = BLOCK_M / (16 * WARPS), N = BLOCK_N / 8, D = BLOCK_D / 8;
constexpr int TILE_Q = BLOCK_M * PITCH, TILE_KV = BLOCK_N * PITCH;
static_assert(M * 16 * WARPS == BLOCK_M && N % 2 == 0 && STAGES >= 2, "a tile of whole mma blocks");
static_assert(SHARED == TILE_Q + STAGES * 2 * TILE_KV, "the host and this file agree on shared memory");

extern __shared__ __align__(1024) unsigned char memory[];

// o[i] = sum_j softmax_j(logit(q[i].k[j])) v[j] and lse[i]
extern "C" __global__ void __launch_bounds__(THREADS) cuda_attention_forward(const __grid_constant__ Params p) {
    int tiles = cdiv(p.seq_q, BLOCK_M), pid = blockIdx.x;  // tiles of one head are neighbours: its K and V stay in L2
    int start = (tiles - 1 - pid % tiles) * BLOCK_M;       // under a causal mask the longest rows start first
    int batch = pid / tiles / p.heads, head = pid / tiles % p.heads, head_kv = head / p.group;
    const half_bits *q = static_cast<const half_bits *>(p.q) + batch * p.sq.batch + head * p.sq.head;
    const half_bits *k = static_cast<const half_bits *>(p.k) + batch * p.sk.batch + head_kv * p.sk.head;
    const half_bits *v = static_cast<const half_bits *>(p.v) + batch * p.sv.batch + head_kv * p.sv.head;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, own_row = warp * 16 * M;
    int offset = p.seq_kv - p.seq_q, i0 = start + own_row + lane / 4 + offset;  // this thread's first row, on the diagonal
    float slope = slope_of(p, batch, head);
    Range range = keys_of<BLOCK_N>(p, start, BLOCK_M);

    u32 q_tile = shared_address(memory), ring = q_tile + TILE_Q;
    load_tile<BLOCK_M>(q_tile, q, p.sq.row, start, p.seq_q, p.head_dim);
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
        int j = range.lo + s * BLOCK_N;
        if (j < range.hi) {
            load_tile<BLOCK_N>(ring + s * 2 * TILE_KV, k, p.sk.row, j, p.seq_kv, p.head_dim);
            load_tile<BLOCK_N>(ring + s * 2 * TILE_KV + TILE_KV, v, p.sv.row, j, p.seq_kv, p.head_dim);
        }
        copy_commit();
    }

    float acc[M][D][4] = {}, m_i[M][2], l_i[M][2];  // l_i: of this thread's columns, summed over the row at the end
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) m_i[m][h] = -INF, l_i[m][h] = 0.0f;

    u32 of_a = lane_a(), of_b = lane_b(), of_q = of_a + own_row * PITCH, here = 0;
    for (int j0 = range.lo; j0 < range.hi; j0 += BLOCK_N) {
        copy_wait<STAGES - 2>();
        __syncthreads();  // the tile of this round is there, and the one of the last is read
        int ahead = j0 + (STAGES - 1) * BLOCK_N;
        if (ahead < range.hi) {
            u32 next = ring + (here == 0 ? (STAGES - 1) * 2 * TILE_KV : here - 2 * TILE_KV);
            load_tile<BLOCK_N>(next, k, p.sk.row, ahead, p.seq_kv, p.head_dim);
            load_tile<BLOCK_N>(next + TILE_KV, v, p.sv.row, ahead, p.seq_kv, p.head_dim);
        }
        copy_commit();

        float s[M][N][4] = {};
        multiply_nt(s, q_tile, of_q, ring + here, of_b);
#if !FOLD
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    float t;
                    s[m][n][e] = logit(p, s[m][n][e], i0 + 16 * m + e / 2 * 8, j0 + 8 * n + lane % 4 * 2 + e % 2, slope, t);
                }
#endif
        if (j0 < range.full_lo || j0 >= range.full_hi) {
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
                            if (8 * n + e < low || 8 * n + e > high) s[m][n][2 * h + e] = -INF;
                }
        }

        // One formula for masked and full tiles, so that a row's result does not depend on where tiles fall.
        const float scale = FOLD ? p.scale : 1.0f;
        u32 weights[M][N][2];
        bool same = true;
        float alpha[M][2];
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float top = fmaxf(s[m][0][2 * h], s[m][0][2 * h + 1]);
#pragma unroll
                for (int n = 1; n < N; n++) top = fmaxf(top, fmaxf(s[m][n][2 * h], s[m][n][2 * h + 1]));
                top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
                top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
                top = fmaxf(m_i[m][h], top * scale);  // scale > 0 commutes with max
                float safe = top == -INF ? 0.0f : top;  // a row that saw no key yet stays finite
                alpha[m][h] = exp2_approx(m_i[m][h] - safe);
                same = same && alpha[m][h] == 1.0f;
                m_i[m][h] = top;
                float sum = 0.0f;
#pragma unroll
                for (int n = 0; n < N; n++) {
                    float p0 = exp2_approx(fmaf(s[m][n][2 * h], scale, -safe));
                    float p1 = exp2_approx(fmaf(s[m][n][2 * h + 1], scale, -safe));
                    sum += p0 + p1;
                    weights[m][n][h] = pack(p0, p1);
                }
                l_i[m][h] = fmaf(l_i[m][h], alpha[m][h], sum);
            }
        if (!__all_sync(~0u, same)) {  // multiplying by 1 is no work worth doing, once the maxima have settled
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int d = 0; d < D; d++)
#pragma unroll
                    for (int e = 0; e < 4; e++) acc[m][d][e] *= alpha[m][e / 2];
        }
        multiply_nn(acc, weights, ring + here + TILE_KV, of_a);
        here = here == (STAGES - 1) * 2 * TILE_KV ? 0 : here + 2 * TILE_KV;
    }
    copy_wait<0>();
    __syncthreads();  // no copy is on its way into the rows that are written now, also where there was no key

#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float sum = l_i[m][h];
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            float safe = sum == 0.0f ? 1.0f : sum;  // a row that saw no key: o = 0, lse = -inf
            float inverse = 1.0f / safe;
#pragma unroll
            for (int d = 0; d < D; d++) acc[m][d][2 * h] *= inverse, acc[m][d][2 * h + 1] *= inverse;
            int row = start + own_row + 16 * m + 8 * h + lane / 4;
            if (lane % 4 == 0 && row < p.seq_q)
                p.lse[static_cast<long long>(pid / tiles) * p.seq_q + row] = (m_i[m][h] + log2_approx(safe)) * LN2;
        }
    half_bits *o = static_cast<half_bits *>(p.o) + batch * p.so.batch + head * p.so.head;
    store_rows(o, p.so.row, acc, q_tile + own_row * PITCH, start + own_row, p.seq_q, p.head_dim);
}
