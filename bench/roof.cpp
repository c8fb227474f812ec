// What this machine can do at most, printed as one JSON object: multiply-adds, reads, random reads.
// Compiled by bench/roof.py with -O3 -march=native. All threads at once; the best of some repeats.
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <thread>
#include <vector>

#if defined(__AVX512F__)
constexpr int LANES = 16, CHAINS = 24;  // 32 registers
#elif defined(__AVX__)
constexpr int LANES = 8, CHAINS = 12;  // 16 registers
#else
constexpr int LANES = 4, CHAINS = 12;
#endif
typedef float Vector __attribute__((vector_size(LANES * 4)));

static volatile float sink;
static volatile uint64_t sink_int;

static double now() {
  using namespace std::chrono;
  return duration<double>(steady_clock::now().time_since_epoch()).count();
}

// Seconds of the slowest thread of work(thread), all started together; the least of the repeats.
static double seconds(int threads, int repeats, const std::function<void(int)>& work) {
  double best = 1e30;
  for (int r = 0; r < repeats; ++r) {
    std::atomic<int> ready{0};
    std::vector<double> spent(threads);
    std::vector<std::thread> pool;
    for (int i = 0; i < threads; ++i)
      pool.emplace_back([&, i] {
        ++ready;
        while (ready < threads) {
        }
        double start = now();
        work(i);
        spent[i] = now() - start;
      });
    for (auto& t : pool) t.join();
    best = std::min(best, *std::max_element(spent.begin(), spent.end()));
  }
  return best;
}

// CHAINS independent chains of multiply-adds, each in a register: more than latency times width.
static void multiply_add(long n) {
  Vector chain[CHAINS], factor, addend;
  for (int l = 0; l < LANES; ++l) factor[l] = 0.999f, addend[l] = 0.001f;
#pragma GCC unroll 32
  for (int i = 0; i < CHAINS; ++i) chain[i] = addend * static_cast<float>(i);
  for (long k = 0; k < n; ++k) {
#pragma GCC unroll 32
    for (int i = 0; i < CHAINS; ++i) {
      chain[i] = chain[i] * factor + addend;
      asm volatile("" : "+v"(chain[i]));  // in a register, and not combined with the next one
    }
  }
  Vector sum = chain[0];
#pragma GCC unroll 32
  for (int i = 1; i < CHAINS; ++i) sum += chain[i];
  sink = sum[0];
}

// One addition after another: a cycle each.
static void dependent_additions(long n) {
  uint64_t x = n;
  for (long k = 0; k < n; ++k)
    asm volatile("add $1, %0\nadd $1, %0\nadd $1, %0\nadd $1, %0\n"
                 "add $1, %0\nadd $1, %0\nadd $1, %0\nadd $1, %0" : "+r"(x));
  sink_int = x;
}

static void read_all(const Vector* data, long n) {
  Vector a[8] = {};
  for (long k = 0; k + 8 <= n; k += 8)
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) a[i] += data[k + i];
  for (int i = 1; i < 8; ++i) a[0] += a[i];
  sink = a[0][0];
}

// Independent 8-byte reads of random rows of a table; 1024 row numbers are made at a time.
static void gather(const uint64_t* table, uint32_t rows, long n, uint32_t seed) {
  static thread_local uint32_t index[1024];
  uint64_t sum[8] = {};
  for (long k = 0; k < n; k += 1024) {
    for (uint32_t i = 0; i < 1024; ++i) {
      uint32_t h = (seed + static_cast<uint32_t>(k) + i) * 0x9E3779B1u;
      h = (h ^ (h >> 15)) * 0x846CA68Bu;
      index[i] = (h ^ (h >> 13)) & (rows - 1);
    }
    for (int i = 0; i < 1024; i += 8)
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) sum[j] += table[index[i + j]];
  }
  sink_int = sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7];
}

static void* memory(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) {
    std::perror("mmap");
    std::exit(1);
  }
  madvise(p, bytes, MADV_HUGEPAGE);
  for (size_t i = 0; i < bytes; i += 4096) static_cast<char*>(p)[i] = 1;
  return p;
}

int main(int count, char** arguments) {
  int threads = count > 1 ? std::atoi(arguments[1]) : 1;
  double scale = count > 2 ? std::atof(arguments[2]) : 1.0;  // of the work, for quick tests
  long n = std::max(1000L, static_cast<long>(2e6 * scale));  // some milliseconds
  double fma = seconds(threads, 60, [&](int) { multiply_add(n); });
  double additions = seconds(1, 20, [&](int) { dependent_additions(n); });

  size_t bytes = std::max(size_t(1) << 20, static_cast<size_t>((256 << 20) * scale));
  std::vector<void*> blocks;
  for (int i = 0; i < threads; ++i) blocks.push_back(memory(bytes));
  double read = seconds(threads, 9, [&](int i) {
    read_all(static_cast<const Vector*>(blocks[i]), bytes / sizeof(Vector));
  });
  for (void* p : blocks) munmap(p, bytes);

  std::printf("{\"fma_gflops\": %.4f, \"lanes\": %d, \"clock_ghz\": %.4f, \"read_gbs\": %.4f, "
              "\"gather\": [",
              threads * 2e-9 * LANES * CHAINS * n / fma, LANES, 8e-9 * n / additions,
              threads * 1e-9 * bytes / read);
  for (int shift = 14; shift <= 26; shift += 2) {
    auto* table = static_cast<uint64_t*>(memory(size_t(1) << shift));
    long reads = std::max(4096L, static_cast<long>((shift < 23 ? 4e6 : 1e6) * scale));
    double time = seconds(threads, 15, [&](int i) {
      gather(table, 1u << (shift - 3), reads, 0x51ED270Bu * (i + 1));
    });
    std::printf("%s{\"bytes\": %lu, \"g_per_s\": %.5f}", shift > 14 ? ", " : "", 1ul << shift,
                threads * 1e-9 * ((reads + 1023) / 1024 * 1024) / time);
    munmap(table, size_t(1) << shift);
  }
  std::printf("]}\n");
}
