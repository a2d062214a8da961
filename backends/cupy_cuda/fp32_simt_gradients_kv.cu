// FlashAttention-2 (Dao 2023), algorithm 2, in IEEE float32: dK and dV, one block per BLOCK_N keys of a head. With SHARES
// a block has several such tiles of keys, one after the other, and adds up what they bring to dQ: five products, not seven.
#ifndef SHARES
#define SHARES 0
#endif
constexpr int CHUNK = BLOCK_D == 256 ? 8 : 32;
constexpr int UNROLL = 1;
#define THREAD anew(threadIdx.x)  // dk, dv and one tile more leave few registers
#include "fp32_simt.cuh"

static_assert(BLOCK_N == ROWS && BLOCK_M == BLOCK_D && SHARED == 4 * (3 * TILE + STAGES * STAGE), "as fp32.py says");

// The four products over a tile of queries and what they read of it, in this order. Registers hold dk, dv and one tile
// more, so p waits in shared memory, and what a softcap needs of S beside p is computed by S once more.
enum Step { S_OF_Q, DV_OF_GO, AGAIN_OF_Q, DP_OF_GO, DK_OF_Q, STEPS };

struct Loader {
    const Params &p;
    int batch, head, start, start_n, piece;  // start: of a tile of queries, -1 after the last one
    __device__ __forceinline__ void arrived(float *) {}
    __device__ __forceinline__ void operator()(float *stage) {
        if (start < 0) return;
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
        const Range queries = queries_of<BLOCK_D>(p, anew(start_n), ROWS);
        if (start < queries.hi) return;
        head++;
        start = head % p.group == 0 ? -1 : queries.lo;  // the last head that sees these keys
    }
};

#if SHARES
// What the weights' own keys bring to a tile of dQ. Each team of warps computes it for BLOCK_D of the keys, a thread 8 x 8
// elements; then a team adds up what all of them have in its part of everybody's rows.
constexpr int TEAMS = ROWS / BLOCK_D, MATES = THREADS / TEAMS, PART = 8 / TEAMS;
static_assert(ROWS % BLOCK_D == 0 && 8 % TEAMS == 0, "a team's warps have a whole tile");

__device__ __forceinline__ void add_share(bool careful, Tile &x, float *weights, const float *k, float *to) {
    const Place at;
    const int thread = THREAD, team = thread / MATES, mate = thread % MATES;
    const int row = at.row / (8 * TY) * (8 * TY) % BLOCK_D + at.row % TY * 4;  // and the 3 after it; again 4 * TY on
    const float *a = weights + team * BLOCK_D * PITCH + row, *b = k + team * BLOCK_D * PITCH + 4 * at.tx;
    clear(x);
    if (careful) {
        multiply_tn<true>(x, a, b);
    } else {
        multiply_tn<false>(x, a, b);
    }
    if (TEAMS > 1) {
        __syncthreads();  // the weights are read
#pragma unroll
        for (int other = 0; other < TEAMS; other++) {
            if (other == team) continue;
#pragma unroll
            for (int n = 0; n < 2 * PART; n++) {
                const float *y = x[other * PART + n / 2] + n % 2 * 4;
                *reinterpret_cast<float4 *>(weights + 4 * (((other * TEAMS + team) * 2 * PART + n) * MATES + mate)) = make_float4(y[0], y[1], y[2], y[3]);
            }
        }
        __syncthreads();
    }
    to += row * BLOCK_D + 4 * at.tx;
#pragma unroll
    for (int own = 0; own < TEAMS; own++) {
        if (own != team) continue;
#pragma unroll
        for (int n = 0; n < 2 * PART; n++) {
            const int r = own * PART + n / 2, c = n % 2 * 4;
            float4 sum = make_float4(x[r][c], x[r][c + 1], x[r][c + 2], x[r][c + 3]);
#pragma unroll
            for (int other = 0; other < TEAMS; other++) {
                if (other == own) continue;
                const float4 y = load4(weights + 4 * (((own * TEAMS + other) * 2 * PART + n) * MATES + mate));
                sum = make_float4(sum.x + y.x, sum.y + y.y, sum.z + y.z, sum.w + y.w);
            }
            add4(to + (r % 4 + r / 4 * 4 * TY) * BLOCK_D + c * TX, sum.x, sum.y, sum.z, sum.w);
        }
    }
}
#define cuda_gradients_kv cuda_gradients
#endif

// dv[j] = sum_i p[i,j] do[i] and dk[j] = sum_i ds[i,j] q[i], on transposed tiles: rows are keys, columns queries.
extern "C" __global__ void __launch_bounds__(THREADS) cuda_gradients_kv(const __grid_constant__ Params p) {
    const auto parts = [&] { return SHARES ? p.parts : cdiv(p.seq_kv, ROWS); };  // blocks of a head
    const auto head_kv = [&] { return anew(blockIdx.x) / parts() % (p.heads / p.group); };
    const int batch = blockIdx.x / parts() / (p.heads / p.group), offset = p.seq_kv - p.seq_q;
    float *shared = reinterpret_cast<float *>(memory), *weights = shared + 2 * TILE;
    int start_n = blockIdx.x % parts() * ROWS;

    do {
        load_tile<ROWS, BLOCK_D, PITCH, 0, ODD>(shared, head_of(p.k, p.sk, batch, head_kv()), start_n, p.seq_kv, 0, p.head_dim);
        load_tile<ROWS, BLOCK_D, PITCH, 0, ODD>(shared + TILE, head_of(p.v, p.sv, batch, head_kv()), start_n, p.seq_kv, 0, p.head_dim);
        const Range queries = queries_of<BLOCK_D>(p, start_n, ROWS);
        Loader loader = {p, batch, head_kv() * p.group, queries.lo < queries.hi ? queries.lo : -1, start_n, 0};
        Ring<STAGE, Loader> ring(shared + 3 * TILE, loader);

        Tile dk, dv, x;
        clear(dk);
        clear(dv);
        const auto x_of = [&](const float *own) {  // its product with columns that the ring brings
            const Place at;
            clear(x);
#pragma unroll 1
            for (int n = 0; n < CHUNKS; n++) multiply_nt(x, own + at.start() + n * CHUNK, ring.next(), at);
        };
        const auto add_to = [&](Tile &acc, bool masked) {  // the weights' product with rows that the ring brings
            const Place at;
#pragma unroll 1
            for (int n = 0; n < CHUNKS; n++) multiply_nn(masked, acc, weights + at.start() + n * CHUNK, ring.next(), at);
        };
        // Until the last product begins, what is loaded is of the tile of queries that is computed.
        static_assert(STAGES <= CHUNKS, "loads are not ahead by a whole product");
        while (loader.start >= 0) {  // over heads in one fixed order
            x_of(shared);
            const int start_m = loader.start;
            const bool masked = start_n + ROWS - 1 > start_m + offset + p.right || start_n < start_m + BLOCK_D - 1 + offset - p.left ||
                                (SHARES && start_n + ROWS > p.seq_kv);
            const auto statistics = [&](const float *of, int column, float past) {  // of four queries
                const int row = loader.start + column;
                const long long index = batch * p.heads + loader.head;
                return row < p.rows_padded ? load4(of + index * p.rows_padded + row) : make_float4(past, past, past, past);
            };
            {
                const Place at;
                const float slope = slope_of(p, batch, loader.head);
#pragma unroll
                for (int h = 0; h < 8; h += 4) {
                    const float4 lse2 = statistics(p.lse2, at.column(h), INF);
#pragma unroll
                    for (int n = 0; n < 32; n++) {
                        const int r = n / 4, c = n % 4, i = start_m + at.column(h) + c + offset, j = start_n + at.row + r * TY;
                        weigh(p, x[r][h + c], i, j, slope, part(lse2, c));
                    }
                }
                if (masked) {  // as visible() says, with constants for all that a thread's pairs differ in
                    const int ahead = start_n + at.row - (start_m + at.column(0) + offset);
                    const int most = p.right - ahead, least = -p.left - ahead, end = p.seq_kv - start_n - at.row;
#pragma unroll
                    for (int n = 0; n < 64; n++) {
                        const int down = n / 8 * TY, more = down - (n % 4 + n % 8 / 4 * 4 * TX);
                        if (more > most || more < least || down >= end) x[n / 8][n % 8] = __uint_as_float(HIDDEN);
                    }
                }
                __syncwarp();  // the last tile's weights are read
                put(weights + at.start() + 4 * at.tx, x);
                __syncwarp();  // a warp reads its own rows alone
            }
            add_to(dv, masked);
            __syncwarp();
#if SOFTCAP
            x_of(shared);
            {
                const Place at;
#pragma unroll
                for (int n = 0; n < 64; n++) {
                    float &weight = weights[at.start() + n / 8 * TY * PITCH + at.column(n % 8)], t = tanh_exact(x[n / 8][n % 8] * p.scale);
                    if (!masked || __float_as_uint(weight) != HIDDEN) weight *= 1.0f - t * t;
                }
            }
#endif
            x_of(shared + TILE);
            {
                const Place at;
                float *own = weights + at.start() + 4 * at.tx;
#pragma unroll
                for (int h = 0; h < 8; h += 4) {
                    const float4 delta = statistics(p.delta, at.column(h), 0.0f);
#pragma unroll
                    for (int r = 0; r < 8; r++) {
                        const float4 weight = load4(own + r * TY * PITCH + h * TX);
#pragma unroll
                        for (int c = 0; c < 4; c++) {
                            float &ds = x[r][h + c];
                            ds = part(weight, c) * (ds - part(delta, c));
                            if (masked && __float_as_uint(part(weight, c)) == HIDDEN) ds = part(weight, c);
                        }
                    }
                }
                put(own, x);
                __syncwarp();
            }
#if SHARES
            const u32 share = ((batch * p.heads + loader.head) * p.parts + anew(blockIdx.x) % p.parts) * p.rows_padded + loader.start;
#endif
            add_to(dk, masked);
#if SHARES
            add_share(masked, x, weights, shared, p.shares + static_cast<long long>(share) * BLOCK_D);
#endif
        }
        const Place at;
#pragma unroll
        for (int n = 0; n < 64; n++) dk[n / 8][n % 8] *= p.dscale;
        store_rows(p.dk, p.sdk, batch, head_kv(), start_n, p.seq_kv, p.head_dim, at, dk);
        store_rows(p.dv, p.sdv, batch, head_kv(), start_n, p.seq_kv, p.head_dim, at, dv);
        copy_wait<0>();
        if (!SHARES) break;
        __syncthreads();  // the tile of keys is read
        // Forth and back: under a causal mask the first keys are seen by the most rows, and each block has as much to do.
        start_n = (2 * (start_n / ROWS / p.parts + 1) * p.parts - 1) * ROWS - start_n;
    } while (start_n < p.seq_kv);
}
