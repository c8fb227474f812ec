// The occupancy grid on the GPU. Points: a thread a cell; a block's coordinates go through shared
// memory, so that they are written in order. The update is two kernels, as the bits need the mean:
// the first writes ema and each chunk's sum, a block a chunk; in the second every block adds up
// those sums for itself, in an order that is always the same, and turns comparisons into bits by
// ballots, 256 cells a warp, so that a warp reads whole lines and writes one sector.
#include "gpu.h"
#include "occupancy.h"

namespace df {
namespace DF_ISA {
namespace {

constexpr int THREADS = 256;
constexpr int EMA_THREADS = 512;  // there are few chunks: 128 for a grid of 128^3
constexpr int WORDS = 8;          // ballots a warp turns into one store
constexpr int MAX_BLOCKS = 2048;  // of those that each add up all sums

// The sum over a block, in every thread; the order of additions is always the same.
template <int SIZE> __device__ inline double block_sum(double x) {
  DF_SHARED(double, sums, SIZE / WARP);
  x = warp_sum(x);
  if (lane_id() == 0) sums[threadIdx.x / WARP] = x;
  __syncthreads();
  double sum = 0;
#pragma unroll
  for (int i = 0; i < SIZE / WARP; ++i) sum += sums[i];
  return sum;
}

template <class T>
__global__ void __launch_bounds__(THREADS) occupancy_points_kernel(OccupancyPointsArgs<T> a) {
  DF_SHARED(T, points, 3 * THREADS);
  const int64_t cells = int64_t(a.resolution) * a.resolution * a.resolution;
  const int64_t first = int64_t(blockIdx.x) * THREADS, cell = first + threadIdx.x;
  if (cell < cells)
    store3(points + 3 * threadIdx.x,
           occupancy_point(uint64_t(*a.seed), uint32_t(cell),
                           occupancy_cell(uint32_t(cell), a.resolution),
                           occupancy_cell_size(a.resolution, T(a.bound)), T(a.bound)));
  __syncthreads();
#pragma unroll
  for (int k = 0; k < 3; ++k) {
    const int i = k * THREADS + int(threadIdx.x);
    if (3 * first + i < 3 * cells) a.points[3 * first + i] = points[i];
  }
}

template <class T>
__global__ void __launch_bounds__(EMA_THREADS) occupancy_ema_kernel(OccupancyUpdateArgs<T> a) {
  const int64_t begin = a.chunk * blockIdx.x, end = min(a.n, begin + a.chunk);
  const T decay = T(a.decay);
  double sum = 0;
  constexpr int CELLS = 4;  // a thread reads together: enough bytes on their way
  for (int64_t i = begin + threadIdx.x; i < end; i += CELLS * EMA_THREADS) {
    T ema[CELLS], density[CELLS];
#pragma unroll
    for (int k = 0; k < CELLS; ++k) {
      const int64_t cell = i + k * EMA_THREADS;
      ema[k] = cell < end ? a.ema[cell] : T(0);
      density[k] = cell < end ? a.density[cell] : T(0);
    }
#pragma unroll
    for (int k = 0; k < CELLS; ++k) {
      const int64_t cell = i + k * EMA_THREADS;
      const T e = occupancy_ema(ema[k], density[k], decay);  // 0 past the end
      if (cell < end) a.ema[cell] = e;
      sum += double(e);
    }
  }
  sum = block_sum<EMA_THREADS>(sum);
  if (threadIdx.x == 0) a.partial[blockIdx.x] = sum;
}

// The density above which a cell is occupied, in every thread.
template <class T> __device__ inline double occupancy_limit(const OccupancyUpdateArgs<T>& a) {
  const int chunks = int((a.n + a.chunk - 1) / a.chunk);
  double sum = 0;
  for (int k = int(threadIdx.x); k < chunks; k += THREADS) sum += a.partial[k];
  return min(a.threshold, block_sum<THREADS>(sum) / double(a.n));
}

template <class T>
__global__ void __launch_bounds__(THREADS) occupancy_bits_kernel(OccupancyUpdateArgs<T> a) {
  constexpr int CELLS = WORDS * WARP;  // a warp
  const double above = occupancy_limit(a);
  const int lane = lane_id();
  const int64_t stride = int64_t(gridDim.x) * THREADS * WORDS;
  for (int64_t first = global_thread() / WARP * CELLS; first < a.n; first += stride) {
    T ema[WORDS];
#pragma unroll
    for (int k = 0; k < WORDS; ++k) {
      const int64_t cell = first + k * WARP + lane;
      ema[k] = cell < a.n ? a.ema[cell] : T(0);
    }
    unsigned word = 0;  // the one that this lane's byte is in
#pragma unroll
    for (int k = 0; k < WORDS; ++k) {
      const unsigned bits = __ballot_sync(FULL_WARP, double(ema[k]) > above);
      if (lane / 4 == k) word = bits;
    }
    const int64_t byte = first / 8 + lane;
    if (byte < a.n / 8) a.bitfield[byte] = uint8_t(word >> (8 * (lane % 4)));
  }
}

}  // namespace

template <class T> void occupancy_points(const OccupancyPointsArgs<T>& a, Stream stream) {
  const int64_t cells = int64_t(a.resolution) * a.resolution * a.resolution;
  launch("occupancy_points_kernel", occupancy_points_kernel<T>, blocks_for(cells, THREADS),
         THREADS, 0, stream, a);
}

template <class T> void occupancy_update(const OccupancyUpdateArgs<T>& a, Stream stream) {
  launch("occupancy_ema_kernel", occupancy_ema_kernel<T>, blocks_for(a.n, int(a.chunk)),
         EMA_THREADS, 0, stream, a);
  launch("occupancy_bits_kernel", occupancy_bits_kernel<T>,
         min<unsigned>(MAX_BLOCKS, blocks_for(a.n, THREADS * WORDS)), THREADS, 0, stream, a);
}

DF_INSTANTIATE(occupancy_points, OccupancyPointsArgs)
DF_INSTANTIATE(occupancy_update, OccupancyUpdateArgs)

}  // namespace DF_ISA
}  // namespace df
