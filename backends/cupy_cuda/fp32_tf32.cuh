// float32 products of a warp on tensor cores, in TF32: mma.sync m16n8k8, its operands rounded to nearest.
//
// A tile is rounded once, in shared memory, by the thread that copied it: the tensor cores cut what a float has beyond
// TF32's 10 bits, and cutting alone would make every product too small. Rows are BLOCK_D + 4 floats apart, so that
// neither the 8 rows of an ldmatrix nor the rows 2 t of the second product's loads meet in one bank.
#pragma once
#include "fp32.cuh"

constexpr int PITCH = BLOCK_D + 4;
static_assert(BLOCK_D % 32 == 0, "a thread loads 4 columns of 32 at once");

#ifndef ON_CPU  // tests/mma_on_cpu.cpp has its own
// c += a b for a 16x8, b 8x8, c 16x8. A thread of lane 4g + t has rows g and g + 8, columns 2t and 2t + 1 of c;
// of a the elements (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4), of b (t, g) and (t + 4, g).
__device__ __forceinline__ void mma_tf32(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// x += add, x being the bits of a float, if that is a number: two instructions, where a choice of summands takes three.
__device__ __forceinline__ void add_to_number(u32 &x, u32 add) {
    asm("{ .reg .pred p; setp.num.f32 p, %1, %1; @p add.u32 %0, %0, %2; }" : "+r"(x) : "f"(__uint_as_float(x)), "r"(add));
}
#endif

// x with half a unit of TF32's last place added: cut, it is rounded to nearest, ties away from 0 (cvt.rna, which would
// cut as well). NaN, whose bits would overflow, stays.
__device__ __forceinline__ u32 rounded(float x) { return __float_as_uint(x) + (fabsf(x) < INF ? 0x1000u : 0u); }

// Rounds what this thread copied by load_tile<ROWS, BLOCK_D, PITCH>.
template <int ROWS>
__device__ __forceinline__ void round_own(float *tile) {
    constexpr int ACROSS = BLOCK_D / 4 < THREADS ? BLOCK_D / 4 : THREADS, STEP = THREADS / ACROSS;
    static_assert(ROWS % STEP == 0, "every thread has as many pieces");
#pragma unroll
    for (int n = 0; n < ROWS / STEP; n++)
#pragma unroll
        for (int part = 0; part < BLOCK_D; part += 4 * ACROSS) {
            const int row = threadIdx.x / ACROSS + n * STEP, column = part + threadIdx.x % ACROSS * 4;
            uint4 &piece = *reinterpret_cast<uint4 *>(tile + row * PITCH + column);
            const uint4 x = piece;
            piece = make_uint4(rounded(__uint_as_float(x.x)), rounded(__uint_as_float(x.y)), rounded(__uint_as_float(x.z)),
                               rounded(__uint_as_float(x.w)));
        }
}

// The same for load_tile<ROWS, BLOCK_D, PITCH, 0, 0, TWOS>, where it stands among other work: loads and stores keep their
// place. With TWOS the elements of an even row and of the next come in turns: rows x0 x1 x2 x3 x4.. and y0 y1 y2 y3 y4..
// become x0 y0 x1 y1 x4 y4.. and x2 y2 x3 y3 x6 y6..
template <int ROWS, bool TWOS>
__device__ __forceinline__ void round_in_place(float *tile) {
    constexpr int ACROSS = BLOCK_D / 4 < THREADS ? BLOCK_D / 4 : THREADS, STEP = THREADS / ACROSS, ROW = TWOS ? 2 : 1;
    static_assert(ROWS % (ROW * STEP) == 0, "every thread has as many pieces");
#pragma unroll
    for (int n = 0; n < ROWS / STEP; n += ROW)
#pragma unroll
        for (int part = 0; part < BLOCK_D; part += 4 * ACROSS) {
            const int row = threadIdx.x / ACROSS * ROW + n * STEP, column = part + threadIdx.x % ACROSS * 4;
            const u32 address = shared_address(tile) + 4 * (row * PITCH + column);
            u32 x[ROW][4];
#pragma unroll
            for (int r = 0; r < ROW; r++) load_shared(x[r], address + r * 4 * PITCH);
#pragma unroll
            for (int r = 0; r < ROW; r++)
#pragma unroll
                for (int e = 0; e < 4; e++) add_to_number(x[r][e], 0x1000u);  // rounded()
            if (TWOS) {
                constexpr int Y = ROW - 1;
                store_shared(address, {x[0][0], x[Y][0], x[0][1], x[Y][1]});
                store_shared(address + 4 * PITCH, {x[0][2], x[Y][2], x[0][3], x[Y][3]});
            } else {
                store_shared(address, x[0]);
            }
        }
}

struct Lane {
    int g, t;
    u32 of_a, of_b;  // where it reads an operand of 16 rows by 8 columns from, in bytes: a of mma; two b
    __device__ __forceinline__ Lane() {
        const int lane = threadIdx.x % 32;
        g = lane / 4, t = lane % 4;
        of_a = 4 * (lane % 16 * PITCH + lane / 16 * 4);
        of_b = 4 * ((lane % 8 + lane / 16 * 8) * PITCH + lane / 8 % 2 * 4);
    }
    // Column of c[m][n][e] of a product over head_dim, and of multiply_nn's c[m][d][e].
    __device__ __forceinline__ int column(int n, int e) const { return 8 * n + 2 * t + e % 2; }
    __device__ __forceinline__ int output_column(int d, int e) const { return d / 4 * 32 + 8 * t + e % 2 * 4 + d % 4; }
};

// c = a b^T over head_dim: 16 M rows at a, 8 N rows at b, both in shared memory.
template <int M, int N>
__device__ __forceinline__ void multiply_nt(float (&c)[M][N][4], u32 a, u32 b, const Lane &lane) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) c[m][n][e] = 0.0f;
#pragma unroll
    for (int d = 0; d < BLOCK_D; d += 8) {
        u32 x[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) ldmatrix(x[m], a + lane.of_a + 4 * (16 * m * PITCH + d));
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            u32 y[4];
            ldmatrix(y, b + lane.of_b + 4 * (8 * n * PITCH + d));
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_tf32(c[m][n], x[m], y[0], y[1]);
                mma_tf32(c[m][n + 1], x[m], y[2], y[3]);
            }
        }
    }
}

// c += a b: a is what multiply_nt left, rounded, b its 8 N rows in shared memory from the columns wanted on. That sum may
// run in any order: a's column 2 t counts as t and 2 t + 1 as t + 4, and no element changes threads. TWOS: b as
// round_in_place left it, so that what one mma takes was loaded to neighbouring registers, where it must be.
template <bool TWOS = false, int M, int N, int D>
__device__ __forceinline__ void multiply_nn(float (&c)[M][D][4], const float (&a)[M][N][4], u32 b, const Lane &lane) {
    b += 4 * (2 * lane.t * PITCH + 4 * lane.g);
#pragma unroll
    for (int n = 0; n < N; n++) {
#pragma unroll
        for (int d = 0; d < D; d += 4) {
            u32 even[4], odd[4];
            load_shared(even, b + 4 * (8 * n * PITCH + 8 * d));
            load_shared(odd, b + 4 * ((8 * n + 1) * PITCH + 8 * d));
#pragma unroll
            for (int m = 0; m < M; m++) {
                const u32 x[4] = {__float_as_uint(a[m][n][0]), __float_as_uint(a[m][n][2]), __float_as_uint(a[m][n][1]),
                                  __float_as_uint(a[m][n][3])};
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const u32(&two)[4] = e < 2 ? even : odd;
                    mma_tf32(c[m][d + e], x, TWOS ? two[e % 2 * 2] : even[e], TWOS ? two[e % 2 * 2 + 1] : odd[e]);
                }
            }
        }
    }
}

// What multiply_nn summed up, times `factor`, to 16 M rows of an output from `row` on and columns from `first` on.
template <int M, int D>
__device__ __forceinline__ void store_rows(void *out, const Strides &s, int batch, int head, int row, int seq, int first,
                                           int head_dim, const float (&c)[M][D][4], float factor, const Lane &lane) {
    float *rows = static_cast<float *>(out) + batch * s.batch + head * s.head;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int r = row + 16 * m + e / 2 * 8 + lane.g;
            if (r >= seq) continue;
#pragma unroll
            for (int d = 0; d < D; d += 4)
                store_part(rows + r * s.row, first + lane.output_column(d, e), head_dim, c[m][d][e] * factor,
                           c[m][d + 1][e] * factor, c[m][d + 2][e] * factor, c[m][d + 3][e] * factor);
        }
}
