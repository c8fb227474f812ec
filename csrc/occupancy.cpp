// The occupancy grid on the CPU: one pass for the maxima and their sums, one for the bits.
#include "occupancy.h"

namespace df {
namespace DF_ISA {
namespace {

constexpr int64_t GRAIN = 4096;  // cells a chunk

template <class T> void update_ema(const OccupancyUpdateArgs<T>& a) {
  const T decay = T(a.decay);
  parallel_for(a.n, a.chunk, [&](int64_t begin, int64_t end) {
    double sums[8] = {};  // side by side, for the compiler to vectorise
    for (int64_t i = begin; i < end; i += 8)
      for (int k = 0; k < 8; ++k) {
        const T e = occupancy_ema(a.ema[i + k], a.density[i + k], decay);
        a.ema[i + k] = e;
        sums[k] += double(e);
      }
    double sum = 0;
    for (int k = 0; k < 8; ++k) sum += sums[k];
    a.partial[begin / a.chunk] = sum;
  });
}

template <class T> double limit(const OccupancyUpdateArgs<T>& a) {
  double sum = 0;
  for (int64_t k = 0; k * a.chunk < a.n; ++k) sum += a.partial[k];
  return min(a.threshold, sum / double(a.n));
}

}  // namespace

template <class T> void occupancy_points(const OccupancyPointsArgs<T>& a, Stream) {
  const int64_t g = a.resolution;
  const uint64_t seed = uint64_t(*a.seed);
  parallel_for(g * g * g, GRAIN, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      store3(a.points + 3 * i, occupancy_point(seed, uint32_t(i), a.resolution, T(a.bound)));
  });
}

template <class T> void occupancy_update(const OccupancyUpdateArgs<T>& a, Stream) {
  update_ema(a);
  const double above = limit(a);
  parallel_for(a.n / 8, GRAIN, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      unsigned byte = 0;
      for (int k = 0; k < 8; ++k) byte |= unsigned(double(a.ema[8 * i + k]) > above) << k;
      a.bitfield[i] = uint8_t(byte);
    }
  });
}

DF_INSTANTIATE(occupancy_points, OccupancyPointsArgs)
DF_INSTANTIATE(occupancy_update, OccupancyUpdateArgs)

}  // namespace DF_ISA
}  // namespace df
