// FlashAttention-2 (Dao 2023), algorithm 1, in IEEE float32: one block per BLOCK_M query rows of a head.
constexpr int CHUNK = BLOCK_D == 256 ? 16 : 32;
constexpr int UNROLL = 2;
#include "fp32_simt.cuh"

static_assert(BLOCK_M == ROWS && BLOCK_N == BLOCK_D && SHARED == 4 * (2 * TILE + STAGES * STAGE), "as fp32.py says");

// Of each tile of keys: K's columns piece by piece, then V's rows.
struct Loader {
    const Params &p;
    Head k, v;
    int start, hi, piece;
    __device__ __forceinline__ void arrived(float *) {}
    __device__ __forceinline__ void operator()(float *stage) {
        if (start >= hi) return;
        if (piece < CHUNKS) {
            load_tile<BLOCK_D, CHUNK, CHUNK, 4>(stage, k, start, p.seq_kv, piece * CHUNK, p.head_dim);
        } else {
            load_tile<CHUNK, BLOCK_D, BLOCK_D>(stage, v, start + (piece - CHUNKS) * CHUNK, p.seq_kv, 0, p.head_dim);
        }
        if (++piece == 2 * CHUNKS) piece = 0, start += BLOCK_D;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS) cuda_attention_forward(const __grid_constant__ Params p) {
    const int tiles = cdiv(p.seq_q, ROWS), index = blockIdx.x / tiles;  // of one head are neighbours: its k, v stay in L2
    const int start_m = (tiles - 1 - blockIdx.x % tiles) * ROWS;  // under a causal mask the longest rows start first
    const int batch = index / p.heads, head = index % p.heads;
    const int first = start_m + p.seq_kv - p.seq_q;
    const Range keys = keys_of<BLOCK_D>(p, start_m, ROWS);
    const float slope = slope_of(p, batch, head);
    const Place at;

    float *shared = reinterpret_cast<float *>(memory), *weights = shared + TILE + at.start();
    load_tile<ROWS, BLOCK_D, PITCH, 0, ODD>(shared, head_of(p.q, p.sq, batch, head), start_m, p.seq_q, 0, p.head_dim);
    Loader loader = {p, head_of(p.k, p.sk, batch, head / p.group), head_of(p.v, p.sv, batch, head / p.group), keys.lo, keys.hi, 0};
    Ring<STAGE, Loader> ring(shared + 2 * TILE, loader);

    Tile acc, s;
    float m_i[8], l_i[8];  // l_i is of this thread's columns alone, until the end
    clear(acc);
#pragma unroll
    for (int r = 0; r < 8; r++) m_i[r] = -INF, l_i[r] = 0.0f;

    for (int start_n = keys.lo; start_n < keys.hi; start_n += BLOCK_D) {
        const bool masked = start_n < keys.full_lo || start_n >= keys.full_hi;
        clear(s);
#pragma unroll 1
        for (int n = 0; n < CHUNKS; n++) multiply_nt(s, shared + at.start() + n * CHUNK, ring.next(), at);

#if !FOLD
#pragma unroll
        for (int n = 0; n < 64; n++) {
            float t;
            s[n / 8][n % 8] = logit(p, s[n / 8][n % 8], first + at.row + n / 8 * TY, start_n + at.column(n % 8), slope, t);
        }
#endif
        unsigned long long hidden = 0;
        if (masked) {
#pragma unroll
            for (int n = 0; n < 64; n++) {
                if (!visible(p, first + at.row + n / 8 * TY, start_n + at.column(n % 8))) {
                    s[n / 8][n % 8] = -INF;
                    hidden |= 1ull << n;
                }
            }
        }
#pragma unroll
        for (int r = 0; r < 8; r++) {
            float m = s[r][0];
#pragma unroll
            for (int c = 1; c < 8; c++) m = fmaxf(m, s[r][c]);
#pragma unroll
            for (int far = NEAR; far < NEAR * TX; far *= 2) m = fmaxf(m, __shfl_xor_sync(~0u, m, far));
            m = fmaxf(m_i[r], FOLD ? m * p.scale : m);
            const float safe = m == -INF ? 0.0f : m;  // a row that saw no key yet stays finite
            const float alpha = exp2_approx(m_i[r] - safe);
            m_i[r] = m;
            float sum = 0.0f;
#pragma unroll
            for (int c = 0; c < 8; c++) {
                // One formula for masked and full tiles, so that a row's result does not depend on where tiles fall.
                s[r][c] = exp2_approx(FOLD ? fmaf(s[r][c], p.scale, -safe) : s[r][c] - safe);
                sum += s[r][c];
                acc[r][c] *= alpha;
            }
            l_i[r] = l_i[r] * alpha + sum;
        }
        if (masked) {
#pragma unroll
            for (int n = 0; n < 64; n++)
                if (hidden >> n & 1) s[n / 8][n % 8] = __uint_as_float(HIDDEN);
        }
        put(weights + 4 * at.tx, s);
        __syncwarp();  // a warp reads its own rows alone
#pragma unroll 1
        for (int n = 0; n < CHUNKS; n++) multiply_nn(masked, acc, weights + n * CHUNK, ring.next(), at);
    }

    float *lse = p.lse + static_cast<long long>(index) * p.seq_q;
#pragma unroll
    for (int r = 0; r < 8; r++) {
#pragma unroll
        for (int far = NEAR; far < NEAR * TX; far *= 2) l_i[r] += __shfl_xor_sync(~0u, l_i[r], far);
        const float sum = l_i[r] == 0.0f ? 1.0f : l_i[r];  // a row that saw no key: o = 0, and lse = m_i = -inf
        const int row = start_m + at.row + r * TY;
        if (at.tx == 0 && row < p.seq_q) lse[row] = (m_i[r] + log2_approx(sum)) * LN2;
        const float factor = 1.0f / sum;
#pragma unroll
        for (int c = 0; c < 8; c++) acc[r][c] *= factor;
    }
    store_rows(p.o, p.so, batch, head, start_m, p.seq_q, p.head_dim, at, acc);
    copy_wait<0>();
}
