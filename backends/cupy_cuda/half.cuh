// 16-bit tiles in shared memory, and what moves and multiplies them.
#pragma once
#include "problem.cuh"

constexpr int THREADS = 32 * WARPS;
constexpr int CHUNKS = BLOCK_D / 8;  // 16 bytes each, in a row
constexpr int PITCH = BLOCK_D * 2;   // bytes of a row
// Eight neighbouring rows' chunks c lie in different banks: chunk c of row r is stored at c ^ turn(r). A pitch that is
// an odd multiple of 64 bytes spreads two rows over the banks by itself.
constexpr int SPREAD = BLOCK_D % 64 == 0 ? 8 : 4;

__device__ __forceinline__ int turn(int row) { return SPREAD == 8 ? row & 7 : (row >> 1) & 3; }

__device__ __forceinline__ u32 at(int row, int chunk) { return row * PITCH + ((chunk ^ turn(row)) << 4); }

// Rows start .. start + ROWS - 1 of a head into the tile at `to`; 0 past seq and past head_dim.
template <int ROWS>
__device__ __forceinline__ void load_tile(u32 to, const half_bits *head, long long stride, int start, int seq, int head_dim) {
    constexpr int STEP = THREADS / SPREAD;
    static_assert(ROWS % STEP == 0 && STEP % 8 == 0, "the turn of all rows of a thread is that of the first");
    if (start + ROWS <= seq && head_dim == BLOCK_D) {  // the usual case, in few instructions: nothing is left out
        int row = threadIdx.x / SPREAD, chunk = threadIdx.x % SPREAD;
        const half_bits *from = head + (start + row) * stride + 8 * chunk;
        u32 place = to + at(row, chunk);
#pragma unroll
        for (int pass = 0; pass < ROWS / STEP; pass++, from += STEP * stride)
#pragma unroll
            for (int column = 0; column < CHUNKS; column += SPREAD)
                copy_async(place + pass * STEP * PITCH + 16 * column, from + 8 * column, 16);
        return;
    }
#pragma unroll 1
    for (int index = threadIdx.x; index < ROWS * CHUNKS; index += THREADS) {
        int row = index / CHUNKS, chunk = index % CHUNKS;
        int bytes = start + row < seq ? min(max(2 * (head_dim - 8 * chunk), 0), 16) : 0;
        copy_async(to + at(row, chunk), head + (bytes ? (start + row) * stride + 8 * chunk : 0), bytes);
    }
}

// COUNT neighbouring floats, from a place on a multiple of 16 bytes.
template <int COUNT>
__device__ __forceinline__ void load_floats(u32 to, const float *from) {
    static_assert(COUNT / 4 <= THREADS, "16 bytes a thread");
    if (threadIdx.x < COUNT / 4) copy_async(to + 16 * threadIdx.x, from + 4 * threadIdx.x, 16);
}

// ---- products of tiles

// Where a lane reads its part of a tile's first 16x16 block. The tile's address, which all lanes share, is added last.
__device__ __forceinline__ u32 lane_a() {  // a of mma, and b where a tile's rows are the index of the sum
    int lane = threadIdx.x & 31;
    return at(lane & 15, lane >> 4);
}

__device__ __forceinline__ u32 lane_b() {  // b of mma where a tile's rows are the columns of the product
    int lane = threadIdx.x & 31;
    return at((lane & 7) | ((lane >> 4) << 3), (lane >> 3) & 1);
}

// The same in the block `step` columns of 16 further, `row` rows below, which is a multiple of 8.
__device__ __forceinline__ u32 block(u32 tile, u32 lane, int row, int step) {
    constexpr int TURNS = SPREAD / 2;
    return (lane ^ ((step % TURNS) << 5)) + (tile + (step / TURNS) * (SPREAD * 16) + row * PITCH);
}

// c[m][n] += a b^T, both with rows of BLOCK_D in shared memory.
template <int M, int N>
__device__ __forceinline__ void multiply_nt(float (&c)[M][N][4], u32 a_tile, u32 lane_of_a, u32 b_tile, u32 lane_of_b) {
#pragma unroll
    for (int step = 0; step < BLOCK_D / 16; step++) {
        u32 a[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) ldmatrix(a[m], block(a_tile, lane_of_a, 16 * m, step));
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            u32 b[4];
            ldmatrix(b, block(b_tile, lane_of_b, 8 * n, step));
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma(c[m][n], a[m], b[0], b[1]);
                mma(c[m][n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// c[m] += a b; a [16 M, 8 N] in registers as another product left it, b [8 N, BLOCK_D] in shared memory.
template <int M, int N, int D>
__device__ __forceinline__ void multiply_nn(float (&c)[M][D][4], const u32 (&a)[M][N][2], u32 b_tile, u32 lane_of_b) {
#pragma unroll
    for (int k = 0; k < N; k += 2) {
#pragma unroll
        for (int d = 0; d < D; d += 2) {
            u32 b[4];
            ldmatrix_turned(b, block(b_tile, lane_of_b, 8 * k, d / 2));
#pragma unroll
            for (int m = 0; m < M; m++) {
                u32 x[4] = {a[m][k][0], a[m][k][1], a[m][k + 1][0], a[m][k + 1][1]};
                mma(c[m][d], x, b[0], b[1]);
                mma(c[m][d + 1], x, b[2], b[3]);
            }
        }
    }
}

// ---- registers to global memory

// This warp's 16 M rows, from `row` of its head on, through `stage`: M * 16 rows of shared memory of its own.
template <int M, int D>
__device__ __forceinline__ void store_rows(void *head, long long stride, const float (&c)[M][D][4], u32 stage, int row, int seq,
                                           int head_dim) {
    static_assert(D * 8 == BLOCK_D, "whole rows");
    int lane = threadIdx.x & 31;
    __syncwarp();
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int d = 0; d < D; d++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                u32 to = stage + at(16 * m + 8 * h + lane / 4, d) + lane % 4 * 4;
                store_shared(to, pack(c[m][d][2 * h], c[m][d][2 * h + 1]));
            }
    __syncwarp();
    half_bits *out = static_cast<half_bits *>(head);
    bool whole = ((reinterpret_cast<unsigned long long>(out) | (2 * stride)) & 15) == 0;
    for (int index = lane; index < 16 * M * CHUNKS; index += 32) {
        int r = index / CHUNKS, chunk = index % CHUNKS, width = min(head_dim - 8 * chunk, 8);
        if (row + r >= seq || width <= 0) continue;
        u32 x[4];
        load_shared(x, stage + at(r, chunk));
        half_bits *to = out + (row + r) * stride + 8 * chunk;
        if (whole && width == 8) {
            *reinterpret_cast<uint4 *>(to) = make_uint4(x[0], x[1], x[2], x[3]);
        } else {
#pragma unroll
            for (int e = 0; e < 8; e++)
                if (e < width) to[e] = static_cast<half_bits>(x[e / 2] >> (16 * (e % 2)));
        }
    }
}
