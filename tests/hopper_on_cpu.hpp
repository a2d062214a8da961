// What hopper.cuh has from the machine, for mma_on_cpu.cpp: tensor maps, mbarriers, named barriers, wgmma.
//
// EAGER 0: boxes arrive as late as they can, when every thread waits, and products are made at once. EAGER 1: boxes
// arrive at once, and products are made when products_wait asks for them and nobody else can go on. A buffer that is read before it is full shows
// in the first, one that is given back while it is read in the second.
#include <deque>
#include <map>

struct TensorMap;
struct Box {
    u32 to, barrier;
    const unsigned long long *map;
    int at[4];
};
struct Bytes {  // an mbarrier
    int phase = 0, arrivals = 1, bytes = 0;
};
struct Product {
    float *c[128];
    const u32 *a[128];
    unsigned long long a_tile, b_tile;
    bool add, a_in_registers, b_rows;
    int n;
    long group;
};
struct Group {  // of four warps
    Barrier barrier{128};
    std::deque<Product> products;
    Product next;
    long groups = 0;
};
static std::map<u32, Bytes> mbarriers;
static std::deque<Box> boxes;
static Barrier named[16];
static Group groups[LANES / 128];

static void reset_hopper() {
    mbarriers.clear(), boxes.clear();
    for (auto &barrier : named) barrier = {0};
    for (auto &group : groups) group = Group();
}

static int same_in_warp(int x) { return x; }
template <int COUNT>
static void take_registers() {}
template <int COUNT>
static void give_registers() {}

// ---- mbarriers and boxes

static Bytes &mbarrier_at(u32 address) {
    if (!mbarriers.count(address)) fail("an mbarrier that is not initialised");
    return mbarriers[address];
}
static void mbarrier_init(u32 address) {
    check(address, 8);
    mbarriers[address] = {};
}
static void mbarriers_ready() {}
static void count_bytes(Bytes &barrier, int bytes, int arrivals) {
    barrier.bytes += bytes, barrier.arrivals -= arrivals;
    if (barrier.arrivals < 0) fail("an mbarrier met twice in a phase");
    if (barrier.arrivals == 0 && barrier.bytes == 0) barrier.phase ^= 1, barrier.arrivals = 1;
}
static void mbarrier_expect(u32 address, int bytes) { count_bytes(mbarrier_at(address), bytes, 1); }
static void mbarrier_wait(u32 address, int parity) {
    Bytes &barrier = mbarrier_at(address);
    wait_until([&barrier, parity] { return barrier.phase != parity; });
}

static u32 swizzled(u32 address) { return address ^ (address >> 7 & 7) << 4; }

// The map as tests/cuda_on_cpu.py writes it: base, extents of column, row, head, batch, bytes between rows, heads,
// batches, rows of a box.
static void copy_now(const Box &box) {
    const auto *map = box.map;
    for (int r = 0; r < int(map[8]); r++)
        for (int c = 0; c < 64; c++) {
            long at[4] = {box.at[0] + c, box.at[1] + r, box.at[2], box.at[3]};
            half_bits x = 0;
            bool inside = true;
            for (int n = 0; n < 4; n++) inside = inside && at[n] >= 0 && at[n] < long(map[1 + n]);
            if (inside) memcpy(&x, reinterpret_cast<const char *>(map[0]) + 2 * at[0] + at[1] * map[5] + at[2] * map[6] + at[3] * map[7], 2);
            memcpy(memory + swizzled(box.to + r * 128 + 2 * c), &x, 2);
        }
    count_bytes(mbarriers[box.barrier], -int(map[8]) * 128, 0);
}
static void copy_box(u32 to, const TensorMap &map, u32 barrier, int d, int row, int head, int batch) {
    check(to, 1024);
    mbarrier_at(barrier);
    Box box{to, barrier, reinterpret_cast<const unsigned long long *>(&map), {d, row, head, batch}};
    if (eager) copy_now(box);
    else boxes.push_back(box);
}
static bool copy_one_box() {
    if (boxes.empty()) return false;
    copy_now(boxes.front());
    boxes.pop_front();
    return true;
}

// ---- named barriers

static void bar_arrive(int id, int threads) {
    if (id < 1 || id > 15) fail("no such named barrier");
    Barrier &barrier = named[id];
    if (barrier.arrived == 0) barrier.size = threads;
    if (barrier.size != threads) fail("a named barrier met with two counts");
    if (++barrier.arrived == threads) barrier.arrived = 0, barrier.rounds++;
}
static void bar_sync(int id, int threads) {
    long until = named[id & 15].rounds + 1;
    bar_arrive(id, threads);
    wait_until([id, until] { return named[id].rounds >= until; });
}
static void bar_arrive_after(float, float, int id, int threads) { bar_arrive(id, threads); }

// ---- products

static float element(u32 address) {
    check(address, 2);
    half_bits x;
    memcpy(&x, memory + swizzled(address), 2);
    return widen(x);
}
static void multiply(const Product &p) {
    float a[64][16];
    static float b[16][256];
    u32 a_from = (p.a_tile & 0x3FFF) << 4, b_from = (p.b_tile & 0x3FFF) << 4;
    u32 columns = (p.b_tile >> 16 & 0x3FFF) << 4, eight = (p.b_tile >> 32 & 0x3FFF) << 4;
    if (p.b_tile >> 62 != 1 || (!p.a_in_registers && p.a_tile >> 62 != 1)) fail("a descriptor of another swizzle");
    for (int m = 0; m < 64; m++)
        for (int k = 0; k < 16; k++)
            if (p.a_in_registers) {
                int lane = m % 8 * 4 + k % 8 / 2, word = m % 16 / 8 + k / 8 * 2;
                a[m][k] = widen(half_bits(p.a[m / 16 * 32 + lane][word] >> 16 * (k % 2)));
            } else {
                a[m][k] = element(a_from + m / 8 * ((p.a_tile >> 32 & 0x3FFF) << 4) + m % 8 * 128 + 2 * k);
            }
    for (int k = 0; k < 16; k++)
        for (int n = 0; n < p.n; n++)
            b[k][n] = p.b_rows ? element(b_from + n / 64 * columns + k / 8 * eight + k % 8 * 128 + n % 64 * 2)
                               : element(b_from + n / 8 * eight + n % 8 * 128 + 2 * k);
    for (int m = 0; m < 64; m++)
        for (int n = 0; n < p.n; n++) {
            float &c = p.c[m / 16 * 32 + m % 8 * 4 + n % 8 / 2][n / 8 * 4 + m % 16 / 8 * 2 + n % 2];
            double sum = 0;
            for (int k = 0; k < 16; k++) sum += double(a[m][k]) * b[k][n];
            c = p.add ? c + float(sum) : float(sum);
        }
}

template <class Work>
static void together(Work work) {
    Group &group = groups[current / 128];
    meet(group.barrier, [&] { work(group); });
}
static void begin_product(float *c, int n, bool add, const u32 *a, u64 a_tile, u64 b, bool b_rows) {
    Product &next = groups[current / 128].next;
    next.c[current % 128] = c, next.a[current % 128] = a;
    next.add = add, next.a_in_registers = a, next.a_tile = a_tile, next.b_tile = b, next.b_rows = b_rows, next.n = n;
    together([](Group &group) {
        group.next.group = group.groups;
        if (eager) group.products.push_back(group.next);
        else multiply(group.next);
    });
}
static void products_begin() {}
static void products_commit() {
    together([](Group &group) { group.groups++; });
}
template <int PENDING>
static void products_wait() {
    if (eager) wait_for_others();
    together([](Group &group) {
        for (; !group.products.empty() && group.products.front().group < group.groups - PENDING; group.products.pop_front())
            multiply(group.products.front());
    });
}
template <class T>
static void pin_down(T &) {}
template <bool ADD, bool B_ROWS, int N>
static void product(float (&c)[N][4], u64 a, u64 b) { begin_product(c[0], 8 * N, ADD, nullptr, a, b, B_ROWS); }
template <bool ADD, bool B_ROWS, int N>
static void product(float (&c)[N][4], const u32 (&a)[4], u64 b) { begin_product(c[0], 8 * N, ADD, a, 0, b, B_ROWS); }
