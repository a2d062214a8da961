// The machine's own instructions (PTX ISA, section 9.7), and nothing else: tests/mma_on_cpu.cpp has its own of each, and
// runs the kernels on a CPU.
#pragma once

typedef unsigned u32;
typedef unsigned short half_bits;

#ifndef ON_CPU

__device__ __forceinline__ float exp2_approx(float x) {  // 2 ulp, exp2(-inf) = 0
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float log2_approx(float x) {
    float y;
    asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ u32 shared_address(const void *x) { return static_cast<u32>(__cvta_generic_to_shared(x)); }

// x, of which the compiler forgets what it knows: what is computed from it is not kept over a loop in registers that are
// needed for more.
__device__ __forceinline__ void forget(u32 &x) { asm volatile("" : "+r"(x)); }
__device__ __forceinline__ int anew(u32 x) {
    forget(x);
    return x;
}

// ---- 16-bit numbers: PRECISION 0 is fp16, 1 bf16

#if PRECISION == 0 || PRECISION == 1
__device__ __forceinline__ u32 pack(float low, float high) {  // rounded to nearest even
    u32 x;
#if PRECISION == 0
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
#endif
    return x;
}

__device__ __forceinline__ float widen(half_bits x) {
#if PRECISION == 0
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
#else
    return __uint_as_float(static_cast<u32>(x) << 16);
#endif
}

// c += a b for a 16x16, b 16x8, c 16x8. A thread of lane 4g + t has rows g and g + 8, columns 2t and 2t + 1 of c.
__device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if PRECISION == 0
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#endif

// ---- global memory to shared memory

__device__ __forceinline__ void copy_async(u32 to, const void *from, int bytes) {  // the rest of 16 is filled with 0
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int PENDING>
__device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// ---- registers to global memory

// to[0..3] += a, b, c, d. One thread's additions to an address come in its order.
__device__ __forceinline__ void add4(float *to, float a, float b, float c, float d) {
#if __CUDA_ARCH__ >= 900
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(to), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
#else
    asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;\n\tred.relaxed.gpu.global.add.f32 [%0+4], %2;\n\t"
                 "red.relaxed.gpu.global.add.f32 [%0+8], %3;\n\tred.relaxed.gpu.global.add.f32 [%0+12], %4;"
                 ::"l"(to), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
#endif
}

// ---- shared memory

__device__ __forceinline__ void ldmatrix(u32 (&x)[4], u32 from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(from) : "memory");
}

__device__ __forceinline__ void ldmatrix_turned(u32 (&x)[4], u32 from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(from) : "memory");
}

__device__ __forceinline__ void store_shared(u32 to, u32 x) { asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(x) : "memory"); }

__device__ __forceinline__ void load_shared(u32 (&x)[4], u32 from) {
    asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(from) : "memory");
}

__device__ __forceinline__ void store_shared(u32 to, const u32 (&x)[4]) {
    asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]) : "memory");
}

__device__ __forceinline__ float load_one(u32 from) {
    float x;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(from) : "memory");
    return x;
}

// Two neighbouring floats.
__device__ __forceinline__ float2 load_pair(u32 from) {
    float2 x;
    asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(from) : "memory");
    return x;
}

#endif
