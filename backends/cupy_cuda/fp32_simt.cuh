// IEEE float32 products of a thread block, without tensor cores.
//
// A warp owns 8 * TY rows, a thread 8 x 8 elements of them: rows ty, ty + TY, .. and columns 4 tx .. 4 tx + 3 of each
// half of BLOCK_D columns. BLOCK_D is also the length of the other side's tile, so that products over head_dim (S, dP)
// and over that tile (O, dQ, dK, dV) have one layout. Either takes 16 loads of 16 bytes for 256 FFMA, 4 FFMA a float.
// Lanes 2 n and 2 n + 1 read the same of the other side's tile, lanes n and n ^ 2 the same rows of their own one: only
// so is a load of 16 bytes a thread served for 16 lanes at once, and both are free of bank conflicts.
#pragma once
#include "fp32.cuh"

constexpr int TX = BLOCK_D / 8, TY = 32 / TX;
constexpr int NEAR = TX == 32 ? 1 : 2;  // lanes of one row differ in the bits NEAR, 2 NEAR .. TX / 2 NEAR
constexpr int ROWS = 8 * TY * WARPS;
// A tile that stays has its odd rows after its even ones, 16 bytes on, so that neighbours start on different banks.
constexpr int PITCH = TY > 1 ? BLOCK_D / 2 : BLOCK_D, ODD = TY > 1 ? ROWS * PITCH + 4 - PITCH : 0;
constexpr int TILE = ROWS * BLOCK_D + (TY > 1 ? 4 : 0);
// What a loop reads comes in pieces of CHUNK columns of a tile's BLOCK_D rows, with a gap of 16 bytes every 4 rows, or of
// CHUNK whole rows.
constexpr int STAGE = BLOCK_D * CHUNK + BLOCK_D;
constexpr int CHUNKS = BLOCK_D / CHUNK;  // in a tile
// Stands in a tile of weights for a pair that is hidden: 0 would not do, for 0 * nan is nan. No arithmetic makes this one.
constexpr u32 HIDDEN = 0x7fdead00u;
static_assert(TX % 8 == 0 && TX <= 32 && STAGES >= 2, "a warp has whole rows; a copy runs beside the reading");

typedef float Tile[8][8];

__device__ __forceinline__ float4 load4(const float *x) { return *reinterpret_cast<const float4 *>(x); }
__device__ __forceinline__ float part(const float4 &x, int n) { return n == 0 ? x.x : n == 1 ? x.y : n == 2 ? x.z : x.w; }

struct Place {  // of a thread
    int tx, row;  // its first row in the block's tile; the others follow TY apart
    __device__ __forceinline__ Place() {
        const u32 thread = THREAD, lane = thread % 32;
        if (TX == 8) {  // lane's bits, from the highest: ty 1, tx 0, tx 2, tx 1, ty 0. So a quarter of put() fills all banks.
            tx = (lane >> 3 & 1) | (lane & 6);
            row = (lane & 1) | (lane >> 3 & 2);
        } else {  // TX == 16: tx 3, tx 0, tx 2, tx 1, ty 0
            tx = TX == 32 ? lane : (lane >> 3 & 1) | (lane & 6) | (lane >> 1 & 8);
            row = TX == 32 ? 0 : lane & 1;
        }
        row += thread / 32 * 8 * TY;
    }
    __device__ __forceinline__ int start() const { return row * PITCH + row % 2 * ODD; }  // of its rows in a tile that stays
    __device__ __forceinline__ int column(int c) const { return 4 * tx + c % 4 + c / 4 * 4 * TX; }
};

__device__ __forceinline__ void clear(Tile &x) {
#pragma unroll
    for (int n = 0; n < 64; n++) x[n / 8][n % 8] = 0.0f;
}

// acc += a b^T over CHUNK columns: a at the thread's first row, b a piece of columns.
__device__ __forceinline__ void multiply_nt(Tile &acc, const float *a, const float *b, const Place &at) {
    b += at.tx * (4 * CHUNK + 4);
#pragma unroll UNROLL
    for (int d = 0; d < CHUNK; d += 4) {
        float4 x[8];
#pragma unroll
        for (int r = 0; r < 8; r++) x[r] = load4(a + r * TY * PITCH + d);
#pragma unroll
        for (int c = 0; c < 8; c++) {
            const float4 y = load4(b + c / 4 * TX * (4 * CHUNK + 4) + c % 4 * CHUNK + d);
#pragma unroll
            for (int n = 0; n < 4; n++)
#pragma unroll
                for (int r = 0; r < 8; r++) acc[r][c] = fmaf(part(x[r], n), part(y, n), acc[r][c]);
        }
    }
}

// acc += a b over CHUNK of a's columns, b being a piece of rows. With CAREFUL a has pairs that are HIDDEN.
template <bool CAREFUL>
__device__ __forceinline__ void multiply_nn(Tile &acc, const float *a, const float *b) {
#pragma unroll UNROLL
    for (int k = 0; k < CHUNK; k += 4) {
        float4 x[8];
#pragma unroll
        for (int r = 0; r < 8; r++) x[r] = load4(a + r * TY * PITCH + k);
#pragma unroll
        for (int n = 0; n < 4; n++) {
            const float4 y[2] = {load4(b + (k + n) * BLOCK_D), load4(b + (k + n) * BLOCK_D + 4 * TX)};
#pragma unroll
            for (int r = 0; r < 8; r++) {
                const float w = part(x[r], n);
                if (!CAREFUL || __float_as_uint(w) != HIDDEN) {
#pragma unroll
                    for (int c = 0; c < 8; c++) acc[r][c] = fmaf(w, part(y[c / 4], c % 4), acc[r][c]);
                }
            }
        }
    }
}
__device__ __forceinline__ void multiply_nn(bool careful, Tile &acc, const float *a, const float *b, const Place &at) {
    if (careful) {
        multiply_nn<true>(acc, a, b + 4 * at.tx);
    } else {
        multiply_nn<false>(acc, a, b + 4 * at.tx);
    }
}

// acc += a^T b over BLOCK_D rows of two tiles that stay: a at the thread's first column, b at its tx.
template <bool CAREFUL>
__device__ __forceinline__ void multiply_tn(Tile &acc, const float *a, const float *b) {
#pragma unroll 1
    for (int k = 0; k < BLOCK_D; k += 4, a += 4 * PITCH, b += 4 * PITCH) {
#pragma unroll
        for (int n = 0; n < 4; n++) {
            const int row = n * PITCH + n % 2 * ODD;
            const float4 x[2] = {load4(a + row), load4(a + row + 4 * TY)};
            const float4 y[2] = {load4(b + row), load4(b + row + 4 * TX)};
#pragma unroll
            for (int r = 0; r < 8; r++) {
                const float w = part(x[r / 4], r % 4);
                if (!CAREFUL || __float_as_uint(w) != HIDDEN) {
#pragma unroll
                    for (int c = 0; c < 8; c++) acc[r][c] = fmaf(w, part(y[c / 4], c % 4), acc[r][c]);
                }
            }
        }
    }
}

// A thread's elements of a tile in shared memory, whose `own` they start at.
__device__ __forceinline__ void put(float *own, const Tile &x) {
#pragma unroll
    for (int r = 0; r < 8; r++)
#pragma unroll
        for (int h = 0; h < 8; h += 4)
            *reinterpret_cast<float4 *>(own + r * TY * PITCH + h * TX) = make_float4(x[r][h], x[r][h + 1], x[r][h + 2], x[r][h + 3]);
}

// An output's rows from `start` on.
__device__ __forceinline__ void store_rows(void *out, const Strides &s, int batch, int head, int start, int seq, int head_dim,
                                           const Place &at, const Tile &x) {
    float *rows = static_cast<float *>(out) + batch * s.batch + head * s.head;
#pragma unroll
    for (int r = 0; r < 8; r++) {
        const int row = start + at.row + r * TY;
        if (row >= seq) break;
#pragma unroll
        for (int h = 0; h < 8; h += 4)
            store_part(rows + row * s.row, at.column(h), head_dim, x[r][h], x[r][h + 1], x[r][h + 2], x[r][h + 3]);
    }
}
