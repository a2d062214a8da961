// FlashAttention-2 (Dao 2023), algorithm 2, in IEEE float32: dK and dV, one block per BLOCK_N keys of a head.
constexpr int CHUNK = BLOCK_D == 256 ? 8 : 32;
constexpr int UNROLL = 1;
#include "fp32_simt.cuh"

static_assert(BLOCK_N == ROWS && BLOCK_M == BLOCK_D && SHARED == 4 * (3 * TILE + STAGES * STAGE), "as fp32.py says");

// The four products over a tile of queries and what they read of it, in this order. Registers hold dk, dv and one tile
// more, so p waits in shared memory, and what a softcap needs of S beside p is computed by S once more.
enum Step { S_OF_Q, DV_OF_GO, AGAIN_OF_Q, DP_OF_GO, DK_OF_Q, STEPS };

struct Loader {
    const Params &p;
    int batch, head, end, start, lo, hi, piece;
    __device__ __forceinline__ void arrived(float *) {}
    __device__ __forceinline__ void operator()(float *stage) {
        if (head == end) return;
        const int step = piece / CHUNKS, n = piece % CHUNKS * CHUNK;
        const bool of_go = step == DV_OF_GO || step == DP_OF_GO;
        const Strides &strides = of_go ? p.sgo : p.sq;
        const Head x = head_of(of_go ? p.go : p.q, strides, batch, head);
        if (step == DV_OF_GO || step == DK_OF_Q) {
            load_tile<CHUNK, BLOCK_D, BLOCK_D>(stage, x, start + n, p.seq_q, 0, p.head_dim);
        } else {
            load_tile<BLOCK_D, CHUNK, CHUNK, 4>(stage, x, start, p.seq_q, n, p.head_dim);
        }
        piece++;
        if (!SOFTCAP && piece == AGAIN_OF_Q * CHUNKS) piece += CHUNKS;
        if (piece < STEPS * CHUNKS) return;
        piece = 0, start += BLOCK_D;
        if (start < hi) return;
        start = lo, head++;
    }
};

// dv[j] = sum_i p[i,j] do[i] and dk[j] = sum_i ds[i,j] q[i], on transposed tiles: rows are keys, columns queries.
extern "C" __global__ void __launch_bounds__(THREADS) cuda_gradients_kv(const __grid_constant__ Params p) {
    const int tiles = cdiv(p.seq_kv, ROWS), index = blockIdx.x / tiles, heads_kv = p.heads / p.group;
    const int start_n = blockIdx.x % tiles * ROWS;  // under a causal mask the first keys are seen by the most rows
    const int batch = index / heads_kv, head_kv = index % heads_kv, offset = p.seq_kv - p.seq_q;
    const Range queries = queries_of<BLOCK_D>(p, start_n, ROWS);
    const Place at;

    float *shared = reinterpret_cast<float *>(memory), *own = shared + at.start(), *weights = own + 2 * TILE;
    load_tile<ROWS, BLOCK_D, PITCH, 0, ODD>(shared, head_of(p.k, p.sk, batch, head_kv), start_n, p.seq_kv, 0, p.head_dim);
    load_tile<ROWS, BLOCK_D, PITCH, 0, ODD>(shared + TILE, head_of(p.v, p.sv, batch, head_kv), start_n, p.seq_kv, 0, p.head_dim);
    const int head_0 = head_kv * p.group;  // the first of the query heads that see these keys
    Loader loader = {p, batch, head_0, queries.lo < queries.hi ? head_0 + p.group : head_0, queries.lo, queries.lo, queries.hi, 0};
    Ring<STAGE, Loader> ring(shared + 3 * TILE, loader);

    Tile dk, dv, x;
    clear(dk);
    clear(dv);
    for (int head = head_0; head < head_0 + p.group; head++) {  // in one fixed order
        const float slope = slope_of(p, batch, head);
        for (int start_m = queries.lo; start_m < queries.hi; start_m += BLOCK_D) {
            const bool masked = start_m < queries.full_lo || start_m >= queries.full_hi;
            const auto statistics = [&](const float *of, int column, float past) {  // of four queries
                const int row = start_m + column;
                const long long index = batch * p.heads + head;
                return row < p.rows_padded ? load4(of + index * p.rows_padded + row) : make_float4(past, past, past, past);
            };
            clear(x);
#pragma unroll 1
            for (int n = 0; n < CHUNKS; n++) multiply_nt(x, own + n * CHUNK, ring.next(), at);
#pragma unroll
            for (int h = 0; h < 8; h += 4) {
                const float4 lse2 = statistics(p.lse2, at.column(h), INF);
#pragma unroll
                for (int n = 0; n < 32; n++) {
                    const int r = n / 4, c = n % 4, i = start_m + at.column(h) + c + offset, j = start_n + at.row + r * TY;
                    weigh(p, x[r][h + c], i, j, slope, part(lse2, c));
                    if (masked && !visible(p, i, j)) x[r][h + c] = __uint_as_float(HIDDEN);
                }
            }
            __syncwarp();  // the last tile's weights are read
            put(weights + 4 * at.tx, x);
            __syncwarp();  // a warp reads its own rows alone
#pragma unroll 1
            for (int n = 0; n < CHUNKS; n++) multiply_nn(masked, dv, weights + n * CHUNK, ring.next(), at);
            __syncwarp();
#if SOFTCAP
            clear(x);
#pragma unroll 1
            for (int n = 0; n < CHUNKS; n++) multiply_nt(x, own + n * CHUNK, ring.next(), at);
#pragma unroll
            for (int n = 0; n < 64; n++) {
                float &weight = weights[n / 8 * TY * PITCH + at.column(n % 8)], t = tanh_exact(x[n / 8][n % 8] * p.scale);
                if (!masked || __float_as_uint(weight) != HIDDEN) weight *= 1.0f - t * t;
            }
#endif
            clear(x);
#pragma unroll 1
            for (int n = 0; n < CHUNKS; n++) multiply_nt(x, own + TILE + n * CHUNK, ring.next(), at);
#pragma unroll
            for (int h = 0; h < 8; h += 4) {
                const float4 delta = statistics(p.delta, at.column(h), 0.0f);
#pragma unroll
                for (int r = 0; r < 8; r++) {
                    const float4 weight = load4(weights + r * TY * PITCH + at.column(h));
#pragma unroll
                    for (int c = 0; c < 4; c++) {
                        float &ds = x[r][h + c];
                        ds = part(weight, c) * (ds - part(delta, c));
                        if (masked && __float_as_uint(part(weight, c)) == HIDDEN) ds = part(weight, c);
                    }
                }
            }
            put(weights + 4 * at.tx, x);
            __syncwarp();
#pragma unroll 1
            for (int n = 0; n < CHUNKS; n++) multiply_nn(masked, dk, weights + n * CHUNK, ring.next(), at);
        }
    }
#pragma unroll
    for (int n = 0; n < 64; n++) dk[n / 8][n % 8] *= p.dscale;
    store_rows(p.dk, p.sdk, batch, head_kv, start_n, p.seq_kv, p.head_dim, at, dk);
    store_rows(p.dv, p.sdv, batch, head_kv, start_n, p.seq_kv, p.head_dim, at, dv);
    copy_wait<0>();
}
