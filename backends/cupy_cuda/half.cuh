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
    constexpr int PASSES = (ROWS * CHUNKS + THREADS - 1) / THREADS;
#pragma unroll
    for (int pass = 0; pass < PASSES; pass++) {
        int index = pass * THREADS + threadIdx.x;
        int row, chunk;
        if constexpr (THREADS % CHUNKS == 0) {  // a thread stays in its column
            row = pass * (THREADS / CHUNKS) + threadIdx.x / CHUNKS;
            chunk = threadIdx.x % CHUNKS;
        } else {
            row = index / CHUNKS;
            chunk = index % CHUNKS;
        }
        if (ROWS * CHUNKS % THREADS != 0 && index >= ROWS * CHUNKS) break;
        int bytes = start + row < seq ? min(max(2 * (head_dim - 8 * chunk), 0), 16) : 0;
        const half_bits *from = head + (bytes ? (start + row) * stride + 8 * chunk : 0);
        copy_async(to + at(row, chunk), from, bytes);
    }
}

// Where this lane reads 16 rows by 16 columns of a tile from, row and column being multiples of 16. `own` is the lane's
// place in the first such block: the columns flip bits of it, the rows are added.
__device__ __forceinline__ u32 block(u32 own, int row, int step) {
    constexpr int TURNS = SPREAD / 2;
    return (own ^ ((step % TURNS) << 5)) + (step / TURNS) * (SPREAD * 16) + row * PITCH;
}

__device__ __forceinline__ u32 own_a(u32 tile) {  // a of mma, and b of a tile whose rows are the sum's index
    int lane = threadIdx.x & 31;
    return tile + at(lane & 15, lane >> 4);
}

__device__ __forceinline__ u32 own_b(u32 tile) {  // b of mma: rows are the columns of the product
    int lane = threadIdx.x & 31;
    return tile + at((lane & 7) | ((lane >> 4) << 3), (lane >> 3) & 1);
}

// ---- products of tiles

// c[m][n] += a b^T, both with rows of BLOCK_D in shared memory; a's rows from row_a on are this warp's.
template <int M, int N>
__device__ __forceinline__ void multiply_nt(float (&c)[M][N][4], u32 own_of_a, int row_a, u32 own_of_b) {
#pragma unroll
    for (int step = 0; step < BLOCK_D / 16; step++) {
        u32 a[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) ldmatrix(a[m], block(own_of_a, row_a + 16 * m, step));
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            u32 b[4];
            ldmatrix(b, block(own_of_b, 8 * n, step));
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma(c[m][n], a[m], b[0], b[1]);
                mma(c[m][n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// c[m] += a b for the columns from `first` on; a [16 M, 8 N] in registers as another product left it, b [8 N, BLOCK_D].
template <int M, int N, int D>
__device__ __forceinline__ void multiply_nn(float (&c)[M][D][4], const u32 (&a)[M][N][2], u32 own_of_b, int first = 0) {
#pragma unroll
    for (int k = 0; k < N; k += 2) {
#pragma unroll
        for (int d = 0; d < D; d += 2) {
            u32 b[4];
            ldmatrix_turned(b, block(own_of_b, 8 * k, first / 16 + d / 2));
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
