// fp16 and bf16, forward, on Hopper: FlashAttention-2's algorithm 1, warp-specialised as FlashAttention-3 (Shah et al.
// 2024) has it. One warp copies tiles by TMA, GROUPS warpgroups of 64 query rows each multiply by wgmma; S and P stay in
// registers, and the softmax of one key tile runs beside the product of the last one's P with V. Blocks are persistent:
// the rings of K, V and Q run on from one row tile to the next. Keys go from right to left, so that a causal mask is met
// first.
#include "hopper.cuh"

constexpr int GROUPS = BLOCK_M / 64, THREADS = 128 * (GROUPS + 1), HALVES = BLOCK_D / 64;
constexpr int N = BLOCK_N / 8, D = BLOCK_D / 8;
constexpr int COLUMN_Q = BLOCK_M * 128, COLUMN_KV = BLOCK_N * 128;  // bytes of 64 columns
constexpr int TILE_Q = HALVES * COLUMN_Q, TILE_KV = HALVES * COLUMN_KV;
constexpr int K_RING = 0, V_RING = STAGES * TILE_KV, Q_RING = 2 * STAGES * TILE_KV, BARRIERS = Q_RING + Q_SLOTS * TILE_Q;
constexpr int K_FULL = BARRIERS, V_FULL = K_FULL + 8 * STAGES, Q_FULL = V_FULL + 8 * STAGES;
static_assert(SHARED == Q_FULL + 8 * Q_SLOTS, "the host and this file agree on shared memory");
static_assert(WARPS * 32 == THREADS && BLOCK_M % 64 == 0 && BLOCK_N % 16 == 0 && BLOCK_D % 64 == 0, "whole warpgroups");
// Named barriers. Each has one open phase: whoever arrives twice before the other side has come once corrupts it, so
// every slot of a ring has its own.
constexpr int K_FREE = 1, V_FREE = K_FREE + STAGES, Q_FREE = V_FREE + STAGES, TURN = Q_FREE + Q_SLOTS;
static_assert(TURN + (TURNS ? GROUPS : 0) <= 15, "a block has 16 named barriers, and ORDERED names one more");
constexpr int RING_THREADS = 32 + 128 * GROUPS;

extern __shared__ __align__(1024) unsigned char memory[];

struct Hopper {
    TensorMap q, k, v;
    Params p;
    const int *order;  // [rounds, blocks]: which row tile a block computes in a round, -1: none; null: one after the other
    int rounds, tiles;
};

// The row tile of this block's round, or -1 at the end.
__device__ __forceinline__ int tile_of(const Hopper &h, int round) {
    int place = round * gridDim.x + blockIdx.x;
    if (h.order != nullptr) return round < h.rounds ? h.order[place] : -1;
    return place < h.tiles ? place : -1;
}

struct Work {  // a row tile
    int index, batch, head, start;
    Range keys;
    __device__ __forceinline__ Work(const Params &p, int tile) {
        int tiles = cdiv(p.seq_q, BLOCK_M);
        index = tile / tiles, batch = index / p.heads, head = index % p.heads, start = tile % tiles * BLOCK_M;
        keys = keys_of<BLOCK_N>(p, start, BLOCK_M);
    }
    __device__ __forceinline__ int last() const { return (keys.hi - 1) / BLOCK_N * BLOCK_N; }  // the key tile to begin with
};

__device__ __forceinline__ void copy_tile(u32 to, u32 barrier, const TensorMap &map, int column, int row, int head, int batch) {
    mbarrier_expect(barrier, HALVES * column);
#pragma unroll
    for (int c = 0; c < HALVES; c++) copy_box(to + c * column, map, barrier, 64 * c, row, head, batch);
}

// One warp: every tile, as soon as its buffer is free. Its lanes meet at every barrier; the first one copies.
__device__ __forceinline__ void produce(const Hopper &h, u32 base) {
    const Params &p = h.p;
    bool first = threadIdx.x % 32 == 0;
    int count = 0, q_count = 0;  // tiles that went through the rings
    for (int round = 1, tile = tile_of(h, 0), after; tile >= 0; round++, tile = after) {
        after = tile_of(h, round);  // read one ahead
        Work work(p, tile);
        if (work.keys.hi <= work.keys.lo) continue;
        int head_kv = work.head / p.group;
        for (int j = work.last(); j >= work.keys.lo; j -= BLOCK_N, count++) {
            int slot = count % STAGES;
            __syncwarp();
            if (count >= STAGES) bar_sync(K_FREE + slot, RING_THREADS);
            if (first) copy_tile(base + K_RING + slot * TILE_KV, base + K_FULL + 8 * slot, h.k, COLUMN_KV, j, head_kv, work.batch);
            if (j == work.last()) {  // K first: Q may have to wait
                int q_slot = q_count % Q_SLOTS;
                __syncwarp();
                if (q_count >= Q_SLOTS) bar_sync(Q_FREE + q_slot, RING_THREADS);
                if (first) copy_tile(base + Q_RING + q_slot * TILE_Q, base + Q_FULL + 8 * q_slot, h.q, COLUMN_Q, work.start, work.head, work.batch);
                q_count++;
            }
            __syncwarp();
            if (count >= STAGES) bar_sync(V_FREE + slot, RING_THREADS);
            if (first) copy_tile(base + V_RING + slot * TILE_KV, base + V_FULL + 8 * slot, h.v, COLUMN_KV, j, head_kv, work.batch);
        }
    }
}

struct Row {  // two of a thread, 8 apart
    float m[2], l[2];  // l: of this thread's columns, summed over the row at the end
};

// s becomes p, and the rows' maxima and sums what they are with it; alpha: by what earlier sums shrink.
__device__ __forceinline__ void soften(const Params &p, float (&s)[N][4], Row &row, float (&alpha)[2], bool masked, int i, int j) {
    if (masked) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int low = i + 8 * r - p.left - j, high = min(i + 8 * r + p.right, p.seq_kv - 1) - j;
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int e = 0; e < 2; e++)
                    if (8 * n + e < low || 8 * n + e > high) s[n][2 * r + e] = -INF;
        }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float top = fmaxf(s[0][2 * r], s[0][2 * r + 1]);
#pragma unroll
        for (int n = 1; n < N; n++) top = fmaxf(top, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
        top = fmaxf(row.m[r], top * p.scale);  // scale > 0 commutes with max
        float safe = top == -INF ? 0.0f : top;  // a row that saw no key yet stays finite
        alpha[r] = exp2_approx(row.m[r] - safe);
        row.m[r] = top;
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 2 * r; e < 2 * r + 2; e++) {
                s[n][e] = exp2_approx(fmaf(s[n][e], p.scale, -safe));
                sum += s[n][e];
            }
        row.l[r] = fmaf(row.l[r], alpha[r], sum);
    }
}

__device__ __forceinline__ void pack_all(u32 (&w)[N / 2][4], const float (&s)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int r = 0; r < 2; r++) w[n / 2][n % 2 * 2 + r] = pack(s[n][2 * r], s[n][2 * r + 1]);
}

#if Q_REGISTERS
typedef u32 Query[BLOCK_D / 16][4];
#else
typedef u32 Query;  // its address
#endif

// Begin s = q k^T.
__device__ __forceinline__ void begin_scores(float (&s)[N][4], const Query &q, u32 k) {
#pragma unroll
    for (int d = 0; d < BLOCK_D / 16; d++) {
        u64 b = descriptor(k + d / 4 * COLUMN_KV + d % 4 * 32, 16);
#if Q_REGISTERS
        if (d == 0) product<false, false>(s, q[d], b);
        else product<true, false>(s, q[d], b);
#else
        u64 a = descriptor(q + d / 4 * COLUMN_Q + d % 4 * 32, 16);
        if (d == 0) product<false, false>(s, a, b);
        else product<true, false>(s, a, b);
#endif
    }
    products_commit();
}

// Begin o += p v.
__device__ __forceinline__ void begin_output(float (&o)[D][4], const u32 (&w)[N / 2][4], u32 v) {
#pragma unroll
    for (int n = 0; n < N / 2; n++) product<true, true>(o, w[n], descriptor(v + n * 2048, COLUMN_KV));
    products_commit();
}

// What four neighbouring threads have of 4 x 4 words, turned: word i of thread t becomes word t of thread i.
__device__ __forceinline__ void turn_words(u32 (&x)[4]) {
#pragma unroll
    for (int far = 1; far < 4; far *= 2) {
        bool upper = threadIdx.x & far;
#pragma unroll
        for (int n = 0; n < 4; n++) {
            if (n & far) continue;
            u32 other = __shfl_xor_sync(~0u, upper ? x[n] : x[n + far], far);
            if (upper) x[n] = other;
            else x[n + far] = other;
        }
    }
}

// Rows `row` and `row` + 8 of a head, 16 bytes a thread.
__device__ __forceinline__ void store_rows(const Params &p, const Work &work, const float (&o)[D][4], const float (&factor)[2], int row) {
    half_bits *out = static_cast<half_bits *>(p.o) + work.batch * p.so.batch + work.head * p.so.head;
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
        for (int d = 0; d < D; d += 4) {
            u32 x[4];
#pragma unroll
            for (int n = 0; n < 4; n++) x[n] = pack(o[d + n][2 * r] * factor[r], o[d + n][2 * r + 1] * factor[r]);
            turn_words(x);
            int column = 8 * (d + threadIdx.x % 4);
            if (row + 8 * r < p.seq_q && column < p.head_dim)
                *reinterpret_cast<uint4 *>(out + (row + 8 * r) * p.so.row + column) = make_uint4(x[0], x[1], x[2], x[3]);
        }
}

// One warpgroup: its 64 rows of every row tile of the block.
__device__ __forceinline__ void consume(const Hopper &h, u32 base, int group) {
    const Params &p = h.p;
    const int own = group * 64 + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;  // this thread's first row in a tile
    const int offset = p.seq_kv - p.seq_q, column = threadIdx.x % 4 * 2;
    const int mine = TURN + group, next = TURN + (group + 1) % GROUPS;
    int count = 0, q_count = 0;
    if (TURNS && group == GROUPS - 1) bar_arrive(next, 256);  // group 0 begins

    for (int round = 1, tile = tile_of(h, 0), after; tile >= 0; round++, tile = after) {
        after = tile_of(h, round);  // read one ahead
        Work work(p, tile);
        float o[D][4];
        Row row = {{-INF, -INF}, {0.0f, 0.0f}};
#pragma unroll
        for (int d = 0; d < D; d++)
#pragma unroll
            for (int e = 0; e < 4; e++) o[d][e] = 0.0f;

        if (work.keys.hi > work.keys.lo) {
            int j = work.last(), i = work.start + own + offset, slot = count % STAGES, q_slot = q_count % Q_SLOTS;
            float s[N][4], alpha[2];
            u32 w[N / 2][4];
            const int sees = work.start + group * 64 + 63 + offset + p.right;  // the last key of the last row
            for (; j > sees && j - BLOCK_N >= work.keys.lo; j -= BLOCK_N) {  // tiles for the groups below alone
                if (TURNS) bar_sync(mine, 256), bar_arrive(next, 256);
                mbarrier_wait(base + K_FULL + 8 * slot, count / STAGES & 1);
                bar_arrive(K_FREE + slot, RING_THREADS);
                mbarrier_wait(base + V_FULL + 8 * slot, count / STAGES & 1);
                bar_arrive(V_FREE + slot, RING_THREADS);
                slot = ++count % STAGES;
            }
            mbarrier_wait(base + Q_FULL + 8 * q_slot, q_count / Q_SLOTS & 1);
            u32 q_tile = base + Q_RING + q_slot * TILE_Q + group * 8192;
#if Q_REGISTERS
            Query q;
#pragma unroll
            for (int d = 0; d < BLOCK_D / 16; d++) {
                int r = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 16, chunk = d % 4 * 2 + threadIdx.x % 32 / 16;
                ldmatrix(q[d], q_tile + d / 4 * COLUMN_Q + r * 128 + ((chunk ^ (r & 7)) << 4));
            }
#else
            const Query q = q_tile;
#endif
            mbarrier_wait(base + K_FULL + 8 * slot, count / STAGES & 1);
            if (TURNS) bar_sync(mine, 256);
            products_begin();
            begin_scores(s, q, base + K_RING + slot * TILE_KV);
            if (TURNS) bar_arrive(next, 256);
            products_wait<0>();
            pin_down(s);
            bar_arrive(K_FREE + slot, RING_THREADS);
            soften(p, s, row, alpha, j < work.keys.full_lo || j >= work.keys.full_hi, i, j + column);
            pack_all(w, s);

            for (j -= BLOCK_N; j >= work.keys.lo; j -= BLOCK_N) {
                int before = slot;
                int parity = count / STAGES & 1;
                slot = ++count % STAGES;
                mbarrier_wait(base + K_FULL + 8 * slot, count / STAGES & 1);
                if (TURNS) bar_sync(mine, 256);
                pin_down(o), pin_down(w);
                products_begin();
                begin_scores(s, q, base + K_RING + slot * TILE_KV);
                mbarrier_wait(base + V_FULL + 8 * before, parity);
                products_begin();  // again, for the wait that came between
                begin_output(o, w, base + V_RING + before * TILE_KV);
                if (TURNS) bar_arrive(next, 256);
                products_wait<1>();
                pin_down(s);
                if (!ORDERED) bar_arrive(K_FREE + slot, RING_THREADS);
                soften(p, s, row, alpha, j < work.keys.full_lo || j >= work.keys.full_hi, i, j + column);
                // The wait for o, which the assembler would put before the exponentials, stays behind this one.
                if (ORDERED) bar_arrive_after(row.l[0], row.l[1], K_FREE + slot, RING_THREADS);
                products_wait<0>();
                pin_down(o), pin_down(w);
                bar_arrive(V_FREE + before, RING_THREADS);
                pack_all(w, s);
                if (!__all_sync(~0u, alpha[0] == 1.0f && alpha[1] == 1.0f)) {  // seldom, once the maxima have settled
#pragma unroll
                    for (int d = 0; d < D; d++)
#pragma unroll
                        for (int e = 0; e < 4; e++) o[d][e] *= alpha[e / 2];
                }
            }
            bar_arrive(Q_FREE + q_slot, RING_THREADS);
            q_count++;
            mbarrier_wait(base + V_FULL + 8 * slot, count / STAGES & 1);
            pin_down(o), pin_down(w);
            products_begin();
            begin_output(o, w, base + V_RING + slot * TILE_KV);
            products_wait<0>();
            pin_down(o), pin_down(w);
            bar_arrive(V_FREE + slot, RING_THREADS);
            count++;
        }

        float factor[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float sum = row.l[r];
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            float safe = sum == 0.0f ? 1.0f : sum;  // a row that saw no key: o = 0, lse = -inf
            factor[r] = 1.0f / safe;
            int at = work.start + own + 8 * r;
            if (threadIdx.x % 4 == 0 && at < p.seq_q)
                p.lse[static_cast<long long>(work.index) * p.seq_q + at] = (row.m[r] + log2_approx(safe)) * LN2;
        }
        store_rows(p, work, o, factor, work.start + own);
    }
}

// o[i] = sum_j softmax_j(q[i].k[j] * scale) v[j] and lse[i]
extern "C" __global__ void __launch_bounds__(THREADS, 1) cuda_attention_forward(const __grid_constant__ Hopper h) {
    u32 base = shared_address(memory);
    if (threadIdx.x == 0) {
#pragma unroll
        for (int n = 0; n < 2 * STAGES + Q_SLOTS; n++) mbarrier_init(base + BARRIERS + 8 * n);
        mbarriers_ready();
    }
    __syncthreads();
    int group = same_in_warp(threadIdx.x / 128);
    if (group == GROUPS) {
        give_registers<GROUPS == 2 ? 24 : 32>();
        if (threadIdx.x / 32 == 4 * GROUPS) produce(h, base);
    } else {
        take_registers<GROUPS == 2 ? 240 : 160>();
        consume(h, base, group);
    }
}
