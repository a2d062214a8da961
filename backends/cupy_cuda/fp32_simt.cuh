// IEEE float32 products of a thread block, without tensor cores.
//
// A warp owns 8 * TY rows, a thread 8 x 8 elements of them: rows ty, ty + TY, .. and columns 4 tx .. 4 tx + 3 of each
// half of BLOCK_D columns. BLOCK_D is also the length of the other side's tile, so that products over head_dim (S, dP)
// and over that tile (O, dQ, dK, dV) have one layout. Either takes 4 loads of 16 bytes, 16 floats, for 64 FFMA:
// 4 FFMA a float. Of the 32 lanes of a load 8 or more read one address, and the others' banks differ: no conflicts.
#pragma once

#include "fp32.cuh"

constexpr int TX = BLOCK_D / 8, TY = 32 / TX;
constexpr int ROWS = 8 * TY * WARPS;
constexpr int PITCH = BLOCK_D + 4;  // of a tile that stays: rows TY apart in one load lie on different banks
// A stage of the ring: CHUNK columns of BLOCK_D rows, with a gap of 16 bytes every 4 rows, or CHUNK whole rows.
constexpr int STAGE = BLOCK_D * CHUNK + BLOCK_D;
constexpr int CHUNKS = BLOCK_D / CHUNK;  // in a tile
// What stands in a tile of weights for a pair that is hidden: 0 would not do, for 0 * nan is nan.
constexpr unsigned HIDDEN = 0x7fdead00u;

typedef float Tile[8][8];

DEVICE float4 load4(const float *x) { return *(const float4 *)x; }
DEVICE void clear(Tile &x) {
#pragma unroll
    for (int n = 0; n < 64; n++) x[n / 8][n % 8] = 0.0f;
}
DEVICE float part(const float4 &x, int n) { return n == 0 ? x.x : n == 1 ? x.y : n == 2 ? x.z : x.w; }

struct Place {  // of a thread
    int tx, row;  // its first row in the block's tile; the others follow TY apart
    DEVICE Place() {
        const int lane = threadIdx.x % 32;
        tx = lane % TX;
        row = threadIdx.x / 32 * 8 * TY + lane / TX;
    }
    DEVICE int column(int c) const { return 4 * tx + c % 4 + c / 4 * 4 * TX; }
};

// acc += a . b^T over CHUNK columns: a at the thread's first row, b a stage at the thread's first column.
DEVICE void multiply_rows(Tile &acc, const float *a, const float *b) {
#pragma unroll 2
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

// acc += a . b over CHUNK of a's columns, which are b's rows. With CAREFUL a has pairs that are HIDDEN.
template <bool CAREFUL>
DEVICE void multiply(Tile &acc, const float *a, const float *b) {
#pragma unroll 2
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
DEVICE void multiply_tile(bool careful, Tile &acc, const float *a, const float *b) {
    if (careful) {
        multiply<true>(acc, a, b);
    } else {
        multiply<false>(acc, a, b);
    }
}

DEVICE void store_tile(float *to, const Tile &x) {  // at the thread's first row and column
#pragma unroll
    for (int r = 0; r < 8; r++)
#pragma unroll
        for (int h = 0; h < 2; h++)
            *(float4 *)(to + r * TY * PITCH + h * 4 * TX) =
                make_float4(x[r][4 * h], x[r][4 * h + 1], x[r][4 * h + 2], x[r][4 * h + 3]);
}

// An output's rows from `start` on, times `factor`.
DEVICE void store_output(void *out, const Strides &s, int batch, int head, int start, int seq, int head_dim,
                         const Place &at, const Tile &x, float factor) {
    float *rows = (float *)out + batch * s.batch + head * s.head;
#pragma unroll
    for (int r = 0; r < 8; r++) {
        const int row = start + at.row + r * TY;
        if (row >= seq) break;
#pragma unroll
        for (int h = 0; h < 2; h++)
            store_row(rows + row * s.row, at.column(4 * h), head_dim,
                      make_float4(x[r][4 * h] * factor, x[r][4 * h + 1] * factor, x[r][4 * h + 2] * factor,
                                  x[r][4 * h + 3] * factor));
    }
}

// The stages of the tiles that a loop reads, copied STAGES - 1 ahead.
template <class Loader>
struct Ring {
    float *stages;
    Loader &load;  // load(stage): starts the copies of the next piece, if there is one
    int slot = 0;
    DEVICE Ring(float *stages, Loader &load) : stages(stages), load(load) {
#pragma unroll
        for (int n = 0; n < STAGES - 1; n++) {
            load(stages + n * STAGE);
            copies_commit();
        }
    }
    // The next piece, which everybody may read until everybody calls again.
    DEVICE const float *next() {
        copies_wait<STAGES - 2>();
        __syncthreads();
        const int freed = slot == 0 ? STAGES - 1 : slot - 1;
        load(stages + freed * STAGE);
        copies_commit();
        const float *piece = stages + slot * STAGE;
        slot = slot == STAGES - 1 ? 0 : slot + 1;
        return piece;
    }
};
