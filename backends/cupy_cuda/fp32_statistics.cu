// float32: what the backward needs of every query row.
#include "fp32.cuh"

// delta[i] = o[i].do[i], and lse in the log2 domain, both padded to rows_padded rows a head, a warp a row. lse2 is +inf
// where there is no row and where a row saw no key: exp2(s - lse2) is 0 there, without a mask.
extern "C" __global__ void __launch_bounds__(THREADS) cuda_row_statistics(const __grid_constant__ Params p) {
    const int tiles = p.rows_padded / BLOCK_M, index = blockIdx.x / tiles, lane = threadIdx.x % 32;
    const Head o = head_of(p.o, p.so, index / p.heads, index % p.heads);
    const Head go = head_of(p.go, p.sgo, index / p.heads, index % p.heads);
    for (int r = threadIdx.x / 32; r < BLOCK_M; r += WARPS) {
        const int row = blockIdx.x % tiles * BLOCK_M + r;
        float sum = 0.0f;
        if (row < p.seq_q)
            for (int d = lane; d < p.head_dim; d += 32) sum = fmaf(o.rows[row * o.stride + d], go.rows[row * go.stride + d], sum);
#pragma unroll
        for (int far = 16; far > 0; far /= 2) sum += __shfl_xor_sync(~0u, sum, far);
        if (lane == 0) {
            const float lse = row < p.seq_q ? p.lse[static_cast<long long>(index) * p.seq_q + row] : -INF;
            const long long to = static_cast<long long>(index) * p.rows_padded + row;
            p.lse2[to] = lse == -INF ? INF : lse * LOG2E;
            p.delta[to] = sum;
        }
    }
}
