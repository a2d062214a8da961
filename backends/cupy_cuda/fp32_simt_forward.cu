// FlashAttention-2 (Dao 2023), algorithm 1, in IEEE float32: one block per ROWS query rows of a head.
constexpr int CHUNK = BLOCK_D == 256 ? 16 : 32;
#include "fp32_simt.cuh"

static_assert(BLOCK_M == ROWS && BLOCK_N == BLOCK_D && SHARED == 4 * (2 * ROWS * PITCH + STAGES * STAGE), "fp32.py");

// The pieces of K and V in the order of the loop: CHUNKS of K's columns, then CHUNKS of V's rows, of each tile.
struct Loader {
    Head k, v;
    int start, hi, seq_kv, head_dim, piece;
    DEVICE void operator()(float *stage) {
        if (start >= hi) return;
        if (piece < CHUNKS) {
            copy_tile<BLOCK_D, CHUNK, CHUNK, 4>(stage, k, start, seq_kv, piece * CHUNK, head_dim);
        } else {
            copy_tile<CHUNK, BLOCK_D, BLOCK_D, 0>(stage, v, start + (piece - CHUNKS) * CHUNK, seq_kv, 0, head_dim);
        }
        if (++piece == 2 * CHUNKS) piece = 0, start += BLOCK_D;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS) cuda_attention_forward(const __grid_constant__ Params p) {
    extern __shared__ __align__(16) float shared[];
    float *q_tile = shared, *p_tile = shared + ROWS * PITCH;

    const int tiles = (p.seq_q + ROWS - 1) / ROWS;  // of one head are neighbours, so that its k and v stay in L2
    int tile = blockIdx.x % tiles;
    if (p.right < p.seq_q) tile = tiles - 1 - tile;  // the longest rows start first and the short ones fill the end
    const int index = blockIdx.x / tiles, batch = index / p.heads, head = index % p.heads;
    const int start_m = tile * ROWS, offset = p.seq_kv - p.seq_q;
    const int first = start_m + offset, last = min(start_m + ROWS, p.seq_q) - 1 + offset;
    const Range keys = range_of<BLOCK_D>(first, last, p.left, p.right, p.seq_kv);
    const float slope = slope_of(p, batch, head);
    const Place at;

    copy_tile<ROWS, BLOCK_D, PITCH, 0>(q_tile, head_of(p.q, p.sq, batch, head), start_m, p.seq_q, 0, p.head_dim);
    Loader loader = {head_of(p.k, p.sk, batch, head / p.group), head_of(p.v, p.sv, batch, head / p.group),
                     keys.lo, keys.hi, p.seq_kv, p.head_dim, 0};
    Ring<Loader> ring(shared + 2 * ROWS * PITCH, loader);

    Tile acc, s;
    float m_i[8], l_i[8];  // l_i: of this thread's columns alone, until the end
    clear(acc);
#pragma unroll
    for (int r = 0; r < 8; r++) m_i[r] = -INFINITE, l_i[r] = 0.0f;

    for (int start_n = keys.lo; start_n < keys.hi; start_n += BLOCK_D) {
        const bool masked = start_n < keys.full_lo || start_n + BLOCK_D > keys.full_hi;
        clear(s);
#pragma unroll 1
        for (int n = 0; n < CHUNKS; n++) {
            const float *k_piece = ring.next();
            multiply_rows(s, q_tile + at.row * PITCH + n * CHUNK, k_piece + at.tx * (4 * CHUNK + 4));
        }

        unsigned long long hidden = 0;
#if !FOLD
#pragma unroll
        for (int n = 0; n < 64; n++) {
            float t;
            s[n / 8][n % 8] = logit(s[n / 8][n % 8], first + at.row + n / 8 * TY, start_n + at.column(n % 8), slope, p, t);
        }
#endif
        if (masked) {
#pragma unroll
            for (int n = 0; n < 64; n++) {
                if (!visible(first + at.row + n / 8 * TY, start_n + at.column(n % 8), p)) {
                    s[n / 8][n % 8] = -INFINITE;
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
            for (int d = 1; d < TX; d *= 2) m = fmaxf(m, __shfl_xor_sync(~0u, m, d));
            m = fmaxf(m_i[r], FOLD ? m * p.scale : m);
            const float safe = m == -INFINITE ? 0.0f : m;  // a row that saw no key yet stays finite
            const float alpha = exp2_fast(m_i[r] - safe);
            m_i[r] = m;
            float sum = 0.0f;
#pragma unroll
            for (int c = 0; c < 8; c++) {
                // One formula for masked and full tiles, so that a row's result does not depend on where tiles fall.
                s[r][c] = exp2_fast(FOLD ? fmaf(s[r][c], p.scale, -safe) : s[r][c] - safe);
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
        store_tile(p_tile + at.row * PITCH + 4 * at.tx, s);
        __syncwarp();  // a warp reads its own rows alone
#pragma unroll 1
        for (int n = 0; n < CHUNKS; n++) {
            const float *v_piece = ring.next();
            multiply_tile(masked, acc, p_tile + at.row * PITCH + n * CHUNK, v_piece + 4 * at.tx);
        }
    }
    copies_wait<0>();

    float *lse = p.lse + (long long)index * p.seq_q;
#pragma unroll
    for (int r = 0; r < 8; r++) {
#pragma unroll
        for (int d = 1; d < TX; d *= 2) l_i[r] += __shfl_xor_sync(~0u, l_i[r], d);
        const float sum = l_i[r] == 0.0f ? 1.0f : l_i[r];  // a row that saw no key: o = 0, and lse = m_i = -inf
        const int row = start_m + at.row + r * TY;
        if (at.tx == 0 && row < p.seq_q) lse[row] = (m_i[r] + log2f(sum)) * 0.6931471805599453f;
#pragma unroll
        for (int c = 0; c < 8; c++) acc[r][c] *= 1.0f / sum;
    }
    store_output(p.o, p.so, batch, head, start_m, p.seq_q, p.head_dim, at, acc, 1.0f);
}
