// March on the GPU: a thread a ray, which walks its ray twice, first to count and then to fill; in
// between, its warp takes rows for all its rays by one addition to a counter on the device.
//
// No size is ever read back: rows end at the fixed capacity, the counter goes on counting. Warps
// come to the counter in any order, so rays' ranges lie in any order; each range is whole, and no
// two overlap. Ranges follow one another without gaps, so at most one of them reaches across the
// capacity: where it begins, the rows in use end (counter[1]). Its ray and all behind it are
// dropped, and the last kernel clears what is not in use: nothing is written twice.
#include "gpu.h"
#include "march.h"

namespace df {
namespace DF_ISA {
namespace {

constexpr int THREADS = 128;
using Counter = unsigned long long;  // what 64-bit atomics take

template <class T> __global__ void __launch_bounds__(THREADS) march_blocks_kernel(MarchArgs<T> a) {
  const int64_t i = global_thread();
  if (i == 0) {
    a.counter[0] = 0;
    a.counter[1] = a.capacity;
  }
  const OccupancyGrid<T> grid = load_grid(a);
  if (i < int64_t(grid.n_blocks) * grid.n_blocks * grid.n_blocks)
    a.blocks[i] = find_block(grid, int(i));
}

// The first of `n` rows for each lane, taken by the whole warp at once: n of the lanes before it
// past the warp's first row. A warp that wants none leaves the counter alone.
__device__ inline int64_t take_rows(int64_t* counter, int n) {
  int end = n;  // at most 32 * MAX_BINS
#pragma unroll
  for (int offset = 1; offset < WARP; offset *= 2) {
    const int below = __shfl_up_sync(FULL_WARP, end, offset);
    if (lane_id() >= offset) end += below;
  }
  int64_t start = 0;
  if (lane_id() == WARP - 1 && end > 0)
    start = int64_t(atomicAdd(reinterpret_cast<Counter*>(counter), Counter(end)));
  return __shfl_sync(FULL_WARP, start, WARP - 1) + end - n;
}

// Calls f(i, sample) for each sample of ray number `ray`, from bin `begin`, until f returns false.
template <class T, class F>
__device__ inline void for_samples(const Ray<T>& r, const OccupancyGrid<T>& g, bool jitter,
                                   uint64_t seed, uint32_t ray, int begin, int end, const F& f) {
  for (int i = begin; i < end;) {
    const T u = jitter ? T(uniform01(seed, ray, uint32_t(i))) : T(0.5);
    const Sample<T> s = bin_sample(r, i, u);
    Cell c;
    if (!find_cell(g, s.position, c)) {
      ++i;
    } else if (!block_occupied(g, c)) {
      const Cell corner{c.x & -EDGE, c.y & -EDGE, c.z & -EDGE};
      i = next_bin(r, g, i, s.position, corner, EDGE, end);
    } else if (!occupied(g, c)) {
      i = next_bin(r, g, i, s.position, c, 1, end);
    } else {
      if (!f(i, s)) return;
      ++i;
    }
  }
}

template <class T> __global__ void __launch_bounds__(THREADS) march_kernel(MarchArgs<T> a) {
  const int64_t ray = global_thread();
  const bool inside = ray < a.n;
  const OccupancyGrid<T> grid = load_grid(a);
  const uint64_t seed = uint64_t(*a.seed);
  Ray<T> r{};
  int begin = 0, end = 0, n = 0;
  if (inside) {
    r = load_ray(a, ray);
    bin_range(r, grid, begin, end);  // empty for a ray that is not finite or has too many bins
    const int limit = sample_limit(a, ray);
    if (limit <= 0) end = begin;
    int first = end;
    for_samples(r, grid, a.jitter, seed, ray_number(a, ray), begin, end,
                [&](int i, const Sample<T>&) {
      if (n++ == 0) first = i;
      return n < limit;
    });
    begin = first;
  }
  int64_t row = take_rows(a.counter, n);
  if (!inside) return;
  const int64_t stop = row + n;
  const bool fits = stop <= a.capacity;
  if (!fits && row < a.capacity) a.counter[1] = row;
  reinterpret_cast<int2*>(a.packed)[ray] = make_int2(int(min(row, a.capacity)), fits ? n : 0);
  if (!fits || n == 0) return;
  for_samples(r, grid, a.jitter, seed, ray_number(a, ray), begin, end,
              [&](int, const Sample<T>& s) {
    store3(a.positions + 3 * row, s.position);
    a.t[row] = s.t;
    a.dt[row] = s.dt;
    return ++row < stop;
  });
}

// Clears the rows that no ray has, and tells what was demanded.
template <class T> __global__ void __launch_bounds__(THREADS) march_finish_kernel(MarchArgs<T> a) {
  const int64_t row = global_thread(), used = min(a.counter[0], a.counter[1]);
  if (row == 0)
    a.count[0] = int32_t(min<int64_t>(a.counter[0], INT32_MAX));
  if (row >= used && row < a.capacity) a.t[row] = a.dt[row] = T(0);
  const int64_t first = 3 * (row - threadIdx.x) + threadIdx.x;  // of a block's 3 * THREADS numbers
#pragma unroll
  for (int k = 0; k < 3; ++k) {
    const int64_t i = first + k * THREADS;
    if (i >= 3 * used && i < 3 * a.capacity) a.positions[i] = T(0);
  }
}

}  // namespace

template <class T> void march(const MarchArgs<T>& a, Stream stream) {
  const int64_t edge = (a.resolution + EDGE - 1) / EDGE;
  launch("march_blocks_kernel", march_blocks_kernel<T>, blocks_for(edge * edge * edge, THREADS),
         THREADS, 0, stream, a);
  launch("march_kernel", march_kernel<T>, blocks_for(a.n, THREADS), THREADS, 0, stream, a);
  launch("march_finish_kernel", march_finish_kernel<T>, blocks_for(a.capacity, THREADS), THREADS, 0,
         stream, a);
}

DF_INSTANTIATE(march, MarchArgs)

}  // namespace DF_ISA
}  // namespace df
