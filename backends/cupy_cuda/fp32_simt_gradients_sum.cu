// FlashAttention-2 in IEEE float32: dQ from what each part of the keys adds to it, in their order.
#include "fp32.cuh"

// dq[i] = dscale * sum_part shares[part, i]
extern "C" __global__ void __launch_bounds__(THREADS) cuda_gradients_sum(const __grid_constant__ Params p) {
    constexpr int ACROSS = BLOCK_D / 4;
    const int tiles = cdiv(p.seq_q, BLOCK_M), index = blockIdx.x / tiles, column = threadIdx.x % ACROSS * 4;
    const long long step = static_cast<long long>(p.rows_padded) * BLOCK_D;
    float *dq = static_cast<float *>(p.dq) + index / p.heads * p.sdq.batch + index % p.heads * p.sdq.head;
    for (int r = threadIdx.x / ACROSS; r < BLOCK_M; r += THREADS / ACROSS) {
        const int row = blockIdx.x % tiles * BLOCK_M + r;
        if (row >= p.seq_q) break;
        const float *share = p.shares + index * step * p.parts + row * BLOCK_D + column;
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
        for (int n = 0; n < p.parts; n++, share += step) {
            const float4 x = *reinterpret_cast<const float4 *>(share);
            sum = make_float4(sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w);
        }
        store_part(dq + row * p.sdq.row, column, p.head_dim, sum.x * p.dscale, sum.y * p.dscale, sum.z * p.dscale, sum.w * p.dscale);
    }
}
