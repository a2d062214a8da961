// FlashAttention-2 (Dao 2023), algorithm 2, in IEEE float32: dQ, one block per BLOCK_M query rows of a head.
constexpr int CHUNK = BLOCK_D == 256 ? 16 : 32;
constexpr int UNROLL = 1;
#include "fp32_simt.cuh"

static_assert(BLOCK_M == ROWS && BLOCK_N == BLOCK_D && SHARED == 4 * (3 * TILE + STAGES * STAGE), "as fp32.py says");

// Of each tile of keys: K's columns piece by piece, V's columns, K's rows.
struct Loader {
    const Params &p;
    Head k, v;
    int start, hi, piece;
    __device__ __forceinline__ void arrived(float *) {}
    __device__ __forceinline__ void operator()(float *stage) {
        if (start >= hi) return;
        if (piece < 2 * CHUNKS) {
            const Head x = {piece < CHUNKS ? k.rows : v.rows, piece < CHUNKS ? p.sk.row : p.sv.row};
            load_tile<BLOCK_D, CHUNK, CHUNK, 4>(stage, x, start, p.seq_kv, piece % CHUNKS * CHUNK, p.head_dim);
        } else {
            load_tile<CHUNK, BLOCK_D, BLOCK_D>(stage, k, start + piece % CHUNKS * CHUNK, p.seq_kv, 0, p.head_dim);
        }
        if (++piece == 3 * CHUNKS) piece = 0, start += BLOCK_D;
    }
};

// dq[i] = sum_j ds[i,j] k[j]
extern "C" __global__ void __launch_bounds__(THREADS) cuda_gradients_q(const __grid_constant__ Params p) {
    const int tiles = cdiv(p.seq_q, ROWS), index = blockIdx.x / tiles;
    const int start_m = (tiles - 1 - blockIdx.x % tiles) * ROWS;  // under a causal mask the longest rows start first
    const int batch = index / p.heads, head = index % p.heads;
    const int first = start_m + p.seq_kv - p.seq_q;
    const Range keys = keys_of<BLOCK_D>(p, start_m, ROWS);
    const float slope = slope_of(p, batch, head);
    const Place at;

    float *shared = reinterpret_cast<float *>(memory), *own = shared + at.start(), *weights = own + 2 * TILE;
    load_tile<ROWS, BLOCK_D, PITCH, 0, ODD>(shared, head_of(p.q, p.sq, batch, head), start_m, p.seq_q, 0, p.head_dim);
    load_tile<ROWS, BLOCK_D, PITCH, 0, ODD>(shared + TILE, head_of(p.go, p.sgo, batch, head), start_m, p.seq_q, 0, p.head_dim);
    Loader loader = {p, head_of(p.k, p.sk, batch, head / p.group), head_of(p.v, p.sv, batch, head / p.group), keys.lo, keys.hi, 0};
    Ring<STAGE, Loader> ring(shared + 3 * TILE, loader);

    Tile acc, x;
    float lse2[8], delta[8];
    clear(acc);
#pragma unroll
    for (int r = 0; r < 8; r++) {
        const int row = start_m + at.row + r * TY;
        const long long from = static_cast<long long>(index) * p.rows_padded + row;
        lse2[r] = row < p.seq_q ? p.lse2[from] : INF;
        delta[r] = row < p.seq_q ? p.delta[from] : 0.0f;
    }

    for (int start_n = keys.lo; start_n < keys.hi; start_n += BLOCK_D) {
        const bool masked = start_n < keys.full_lo || start_n >= keys.full_hi;
        clear(x);
#pragma unroll 1
        for (int n = 0; n < CHUNKS; n++) multiply_nt(x, own + n * CHUNK, ring.next(), at);
        __syncwarp();  // the last tile's weights are read
        put(weights + 4 * at.tx, x);  // the registers are needed; nobody else reads it so
        clear(x);
#pragma unroll 1
        for (int n = 0; n < CHUNKS; n++) multiply_nt(x, own + TILE + n * CHUNK, ring.next(), at);
#pragma unroll
        for (int n = 0; n < 64; n += 4) {
            const int r = n / 8, i = first + at.row + r * TY;
            const float4 s4 = load4(weights + r * TY * PITCH + at.column(n % 8));
#pragma unroll
            for (int c = 0; c < 4; c++) {
                const int j = start_n + at.column(n % 8) + c;
                float s = part(s4, c), &ds = x[r][n % 8 + c];
                const float factor = weigh(p, s, i, j, slope, lse2[r]);
                ds = s * factor * (ds - delta[r]);
                if (masked && !visible(p, i, j)) ds = __uint_as_float(HIDDEN);
            }
        }
        put(weights + 4 * at.tx, x);
        __syncwarp();  // a warp reads its own rows alone
#pragma unroll 1
        for (int n = 0; n < CHUNKS; n++) multiply_nn(masked, acc, weights + n * CHUNK, ring.next(), at);
    }
#pragma unroll
    for (int n = 0; n < 64; n++) acc[n / 8][n % 8] *= p.dscale;
    store_rows(p.dq, p.sdq, batch, head, start_m, p.seq_q, p.head_dim, at, acc);
    copy_wait<0>();
}
