// What the float32 kernels share: float tiles on their way between global and shared memory.
#pragma once
#include "problem.cuh"

constexpr int THREADS = 32 * WARPS;
#ifndef THREAD
#define THREAD threadIdx.x  // or anew(threadIdx.x): what follows from it is then worked out where it is used
#endif

extern __shared__ __align__(1024) unsigned char memory[];

// One head of a tensor: rows `stride` elements apart.
struct Head {
    const float *rows;
    long long stride;
};
__device__ __forceinline__ Head head_of(const void *x, const Strides &s, int batch, int head) {
    return {static_cast<const float *>(x) + batch * s.batch + head * s.head, s.row};
}

// Rows start.. of a head, columns d.., as ROWS x COLUMNS floats; 0 past `seq` and past head_dim. In shared memory rows
// are PITCH floats apart, and every GAP_ROWS rows 4 more; odd ones are ODD further. With TWOS a thread's rows are neighbours
// in twos.
template <int ROWS, int COLUMNS, int PITCH, int GAP_ROWS = 0, int ODD = 0, bool TWOS = false>
__device__ __forceinline__ void load_tile(float *to, const Head &head, int start, int seq, int d, int head_dim) {
    constexpr int ACROSS = COLUMNS / 4 < THREADS ? COLUMNS / 4 : THREADS;  // pieces of 16 bytes, side by side
    constexpr int STEP = THREADS / ACROSS;                                // rows at once
    static_assert(THREADS % ACROSS == 0 && COLUMNS % (4 * ACROSS) == 0, "a thread stays in its columns");
    static_assert(ODD == 0 || STEP % 2 == 0, "a thread's rows are all odd or all even");
    static_assert(!TWOS || (ROWS % (2 * STEP) == 0 && GAP_ROWS == 0 && ODD == 0), "whole twos, and nothing between them");
    constexpr bool EVEN = ROWS % STEP == 0 && (GAP_ROWS == 0 || STEP % GAP_ROWS == 0);
    const u32 thread = THREAD;
    const int first = thread / ACROSS * (TWOS ? 2 : 1);
#pragma unroll
    for (int part = 0; part < COLUMNS; part += 4 * ACROSS) {
        const int column = part + thread % ACROSS * 4;
        const u32 address = shared_address(to) + 4 * (first * PITCH + first % 2 * ODD + (GAP_ROWS ? first / GAP_ROWS * 4 : 0) + column);
        const float *from = head.rows + (start + first) * head.stride + d + column;
        if (EVEN && start + ROWS <= seq && d + COLUMNS <= head_dim) {
#pragma unroll
            for (int n = 0; n < ROWS / STEP; n++) {
                const int row = TWOS ? n / 2 * 2 * STEP + n % 2 : n * STEP;  // after the first
                copy_async(address + 4 * (row * PITCH + (GAP_ROWS ? row / GAP_ROWS * 4 : 0)), from, 16);
                from += (!TWOS ? STEP : n % 2 ? 2 * STEP - 1 : 1) * head.stride;
            }
        } else {
            const int bytes = 4 * min(max(head_dim - d - column, 0), 4);
#pragma unroll 1
            for (int row = first, step; row < ROWS; row += step, from += step * head.stride) {
                step = !TWOS ? STEP : row % 2 ? 2 * STEP - 1 : 1;
                const bool inside = start + row < seq && bytes > 0;
                const int gap = GAP_ROWS ? (row / GAP_ROWS - first / GAP_ROWS) * 4 : 0;
                copy_async(address + 4 * ((row - first) * PITCH + gap), inside ? from : head.rows, inside ? bytes : 0);
            }
        }
    }
}

// Four neighbouring floats of an output row, at once where its address allows it.
__device__ __forceinline__ void store_part(float *row, int column, int head_dim, float a, float b, float c, float d) {
    float *to = row + column;
    if (column + 4 <= head_dim && reinterpret_cast<unsigned long long>(to) % 16 == 0) {
        *reinterpret_cast<float4 *>(to) = make_float4(a, b, c, d);
    } else {
        if (column < head_dim) to[0] = a;
        if (column + 1 < head_dim) to[1] = b;
        if (column + 2 < head_dim) to[2] = c;
        if (column + 3 < head_dim) to[3] = d;
    }
}

__device__ __forceinline__ bool visible(const Params &p, int i, int j) {
    return j <= i + p.right && j >= i - p.left && j < p.seq_kv;
}

// The pieces that a loop reads, STAGE floats each, copied STAGES - 1 ahead by load(stage), which knows their order and
// their end; load.arrived(stage) may change what this thread has copied before others see it.
template <int STAGE, class Loader>
struct Ring {
    float *stages;
    Loader &load;
    int slot = 0;
    __device__ __forceinline__ Ring(float *stages, Loader &load) : stages(stages), load(load) {
        static_assert(STAGES >= 2, "a copy runs beside the reading");
#pragma unroll 1
        for (int n = 0; n < STAGES - 1; n++) {
            load(stages + n * STAGE);
            copy_commit();
        }
    }
    // The next piece, which stays until everybody has taken another.
    __device__ __forceinline__ const float *next() {
        float *piece = stages + slot * STAGE;
        copy_wait<STAGES - 2>();
        load.arrived(piece);
        __syncthreads();
        load(stages + (slot == 0 ? STAGES - 1 : slot - 1) * STAGE);
        copy_commit();
        slot = slot == STAGES - 1 ? 0 : slot + 1;
        return piece;
    }
    // next() in two: what a thread does to its part of the piece may come well before it takes it. `kind` tells the loader
    // what piece it is. (As a call of these two next() has other registers, which spill in gradients_kv on sm_100.)
    template <class... Kind>
    __device__ __forceinline__ void prepare(Kind... kind) {
        copy_wait<STAGES - 2>();
        load.arrived(stages + slot * STAGE, kind...);
    }
    template <class... Kind>
    __device__ __forceinline__ const float *take(Kind... kind) {
        float *piece = stages + slot * STAGE;
        __syncthreads();
        load(stages + (slot == 0 ? STAGES - 1 : slot - 1) * STAGE, kind...);
        copy_commit();
        slot = slot == STAGES - 1 ? 0 : slot + 1;
        return piece;
    }
};
