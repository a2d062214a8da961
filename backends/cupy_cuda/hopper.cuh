// What Hopper adds to the machine: tensor maps, mbarriers, named barriers, matrix products of a warpgroup. 16-bit only.
#pragma once
#include "problem.cuh"

typedef unsigned long long u64;

struct alignas(64) TensorMap {  // CUtensorMap: what cuTensorMapEncodeTiled makes of a tensor
    u64 opaque[16];
};

#ifndef ON_CPU  // tests/hopper_on_cpu.cpp has its own

__device__ __forceinline__ int same_in_warp(int x) { return __shfl_sync(~0u, x, 0); }

template <int COUNT>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// ---- mbarriers, of one arrival and the bytes that it expects

__device__ __forceinline__ void mbarrier_init(u32 barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void mbarriers_ready() {  // for the copies, which are not of this thread
    asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_expect(u32 barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void mbarrier_wait(u32 barrier, int parity) {
    asm volatile(
        "{ .reg .pred done;\n\t"
        "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
        "@!done bra again; }" ::"r"(barrier), "r"(parity) : "memory");
}

// The box of a map at column d, row, head, batch into shared memory; zeros past the tensor's end.
__device__ __forceinline__ void copy_box(u32 to, const TensorMap &map, u32 barrier, int d, int row, int head, int batch) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
                 ::"r"(to), "l"(&map), "r"(barrier), "r"(d), "r"(row), "r"(head), "r"(batch) : "memory");
}

// ---- named barriers

__device__ __forceinline__ void bar_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void bar_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// bar_arrive behind x and y >= 0, whose sign bits enter the id: an order that the assembler cannot undo.
__device__ __forceinline__ void bar_arrive_after(float x, float y, int id, int threads) {
    bar_arrive(id + static_cast<int>((__float_as_uint(x) | __float_as_uint(y)) >> 31), threads);
}

// ---- products of a warpgroup (wgmma), asynchronous: c, and a in registers, may be touched again after the wait

__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// Neither reads nor writes of x move over this.
template <int N>
__device__ __forceinline__ void pin_down(float (&x)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) asm volatile("" : "+f"(x[n][e])::"memory");
}
template <int N>
__device__ __forceinline__ void pin_down(u32 (&x)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) asm volatile("" : "+r"(x[n][e])::"memory");
}

#if PRECISION == 0
#define PRODUCT(n) "wgmma.mma_async.sync.aligned.m64n" n "k16.f32.f16.f16 "
#else
#define PRODUCT(n) "wgmma.mma_async.sync.aligned.m64n" n "k16.f32.bf16.bf16 "
#endif
#define C32                                                                                                      \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28," \
    "%29,%30,%31"
#define C64                                                                                                           \
    C32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58," \
        "%59,%60,%61,%62,%63"
#define R4(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define R32 R4(0), R4(1), R4(2), R4(3), R4(4), R4(5), R4(6), R4(7)
#define R64 R32, R4(8), R4(9), R4(10), R4(11), R4(12), R4(13), R4(14), R4(15)

// c (+)= a b for a 64x16, b 16 x 8 N; a and b by descriptors. Of c a thread has what mma.sync's layout says, warps one
// below the other. ADD false: c is overwritten. B_ROWS: b's rows are the index of the sum.
template <bool ADD, bool B_ROWS, int N>
__device__ __forceinline__ void product(float (&c)[N][4], u64 a, u64 b) {
    static_assert(N == 8 || N == 16, "64 or 128 columns");
    if constexpr (N == 8)
        asm volatile("{ .reg .pred add; setp.ne.b32 add, %34, 0; " PRODUCT("64") C32 "}, %32, %33, add, 1, 1, 0, %35; }"
                     : R32 : "l"(a), "l"(b), "n"(int(ADD)), "n"(int(B_ROWS)));
    else
        asm volatile("{ .reg .pred add; setp.ne.b32 add, %66, 0; " PRODUCT("128") C64 "}, %64, %65, add, 1, 1, 0, %67; }"
                     : R64 : "l"(a), "l"(b), "n"(int(ADD)), "n"(int(B_ROWS)));
}
// The same with a in registers, as mma.sync has it.
template <bool ADD, bool B_ROWS, int N>
__device__ __forceinline__ void product(float (&c)[N][4], const u32 (&a)[4], u64 b) {
    static_assert(N == 8 || N == 16, "64 or 128 columns");
    if constexpr (N == 8)
        asm volatile("{ .reg .pred add; setp.ne.b32 add, %37, 0; " PRODUCT("64") C32 "}, {%32,%33,%34,%35}, %36, add, 1, 1, %38; }"
                     : R32 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(int(ADD)), "n"(int(B_ROWS)));
    else
        asm volatile("{ .reg .pred add; setp.ne.b32 add, %69, 0; " PRODUCT("128") C64 "}, {%64,%65,%66,%67}, %68, add, 1, 1, %70; }"
                     : R64 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(int(ADD)), "n"(int(B_ROWS)));
}

#endif

// A tile in shared memory is columns of 64, one after the other; a row of one is 128 bytes, whose 16-byte chunks c stand
// at c ^ (row % 8), as TMA's 128-byte swizzle puts them. Its address is a multiple of 1024.
//
// Descriptor of a piece of one (PTX ISA, "Shared Memory Matrix Layout"): 8 rows are 1024 bytes, columns of 64 `columns`
// bytes apart, where a product takes several at once.
__device__ __forceinline__ u64 descriptor(u32 address, int columns) {
    return u64((address & 0x3FFFF) >> 4) | u64(columns >> 4) << 16 | u64(1024 >> 4) << 32 | u64(1) << 62;
}
