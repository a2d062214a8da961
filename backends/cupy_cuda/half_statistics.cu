// fp16 and bf16: what the backward needs of every query row.
#include "half.cuh"

// delta[i] = o[i].do[i], and lse in the log2 domain, both padded to rows_padded rows a head. lse2 is +inf where there is
// no row and where a row saw no key: exp2(s - lse2) is 0 there, without a mask.
extern "C" __global__ void __launch_bounds__(THREADS) cuda_row_statistics(const __grid_constant__ Params p) {
    constexpr int LANES = CHUNKS >= 32 ? 32 : CHUNKS > 8 ? 16 : CHUNKS > 4 ? 8 : 4;  // of a row
    int tiles = p.rows_padded / BLOCK_M, pid = blockIdx.x, start = pid % tiles * BLOCK_M;
    int batch = pid / tiles / p.heads, head = pid / tiles % p.heads;
    const half_bits *o = static_cast<const half_bits *>(p.o) + batch * p.so.batch + head * p.so.head;
    const half_bits *go = static_cast<const half_bits *>(p.go) + batch * p.sgo.batch + head * p.sgo.head;
    for (int r = threadIdx.x / LANES; r < BLOCK_M; r += THREADS / LANES) {
        int row = start + r;
        float sum = 0.0f;
        if (row < p.seq_q) {
            for (int chunk = threadIdx.x % LANES; chunk < CHUNKS; chunk += LANES) {
                int width = min(p.head_dim - 8 * chunk, 8);
                const half_bits *x = o + row * p.so.row + 8 * chunk, *y = go + row * p.sgo.row + 8 * chunk;
                if (width == 8) {
                    uint4 a = *reinterpret_cast<const uint4 *>(x), b = *reinterpret_cast<const uint4 *>(y);
                    u32 u[4] = {a.x, a.y, a.z, a.w}, w[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
                    for (int e = 0; e < 8; e++)
                        sum = fmaf(widen(half_bits(u[e / 2] >> (16 * (e % 2)))), widen(half_bits(w[e / 2] >> (16 * (e % 2)))), sum);
                } else {
                    for (int e = 0; e < width; e++) sum = fmaf(widen(x[e]), widen(y[e]), sum);
                }
            }
        }
#pragma unroll
        for (int far = LANES / 2; far > 0; far /= 2) sum += __shfl_xor_sync(~0u, sum, far);
        if (threadIdx.x % LANES == 0) {
            float lse = row < p.seq_q ? p.lse[static_cast<long long>(pid / tiles) * p.seq_q + row] : -INF;
            long long to = static_cast<long long>(pid / tiles) * p.rows_padded + row;
            p.lse2[to] = lse == -INF ? INF : lse * LOG2E;
            p.delta[to] = sum;
        }
    }
}
