// Sums over the pixels of maps of shape (groups, pixels, channels), for batch
// normalisation and its gradients, in one pass over each map.
#pragma once

#include "sums.h"

namespace moments {

using sums::Shape;

struct Pair {
  Vector first, second;
};

constexpr int kVectors = 4;  // number of vectors of channels that are summed together

// sums (2, step) = the sums of f(i, c) over pixels, for N vectors from channel c on.
template <int N, typename F>
void add_vectors(const F& f, Index offset, Index pixels, Index channels, Index c, float* sums,
                 Index step) {
  Pair total[N] = {};
  for (Index p = 0; p < pixels; p++, offset += channels)
    UNROLL for (int n = 0; n < N; n++) {
      const Pair value = f(offset + c + n * kLanes, c + n * kLanes);
      total[n].first += value.first;
      total[n].second += value.second;
    }
  UNROLL for (int n = 0; n < N; n++) {
    store(sums + c + n * kLanes, total[n].first);
    store(sums + step + c + n * kLanes, total[n].second);
  }
}

// totals (groups, 2, channels) = the sums over pixels of f(i, c), a Pair for the vector of
// channels that begins with channel c and element i of the map. If there are fewer channels
// than lanes, the other lanes are ignored.
template <typename F>
void add_up(ffi::ThreadPool& pool, const Shape& shape, const F& f, float* totals) {
  const Index channels = shape.channels, vectors = channels / kLanes;
  const Index size = 2 * channels, chunks = shape.chunks();
  const Index parts = pieces(chunks, shape.groups * size);
  const Index step = std::max<Index>(channels, kLanes);
  Floats all(parts * shape.groups * size);
  parallel(pool, parts * shape.groups, [&](Index item, Index) {
    const Index piece = item / shape.groups, group = item % shape.groups;
    Floats sums(2 * step);
    float* total = all.data() + item * size;
    zero(total, size);
    for (Index i = piece * chunks / parts; i < (piece + 1) * chunks / parts; i++) {
      const Index first = i * shape.chunk();
      const Index pixels = std::min(shape.chunk(), shape.pixels - first);
      const Index offset = (group * shape.pixels + first) * channels;
      in_parts<kVectors>(0, vectors, [&](auto n, Index v) {
        add_vectors<n>(f, offset, pixels, channels, v * kLanes, sums.data(), step);
      });
      // The last vector overlaps the one before.
      const Index last = std::max<Index>(0, channels - kLanes);
      if (channels % kLanes) add_vectors<1>(f, offset, pixels, channels, last, sums.data(), step);
      for (Index c = 0; c < channels; c++) {
        total[c] += sums[c];
        total[channels + c] += sums[step + c];
      }
    }
  });
  add_pieces(pool, all.data(), parts, shape.groups * size);
  copy(totals, all.data(), shape.groups * size);
}

// Sums x - reference (channels,) and its square.
inline void of_map(ffi::ThreadPool& pool, const Shape& shape, const float* x,
                   const float* reference, float* totals) {
  Floats padded(shape.channels + kLanes);
  copy(padded.data(), reference, shape.channels);
  zero(padded.data() + shape.channels, kLanes);
  const Index size = shape.groups * shape.pixels * shape.channels;
  const auto pair = [&](Index i, Index c) -> Pair {
    const Vector centred = sums::load(x + i, size - i) - load(padded.data() + c);
    return {centred, centred * centred};
  };
  add_up(pool, shape, pair, totals);
}

// Sums dy and dy x.
inline void of_gradient(ffi::ThreadPool& pool, const Shape& shape, const float* x,
                        const float* dy, float* totals) {
  const Index size = shape.groups * shape.pixels * shape.channels;
  const auto pair = [&](Index i, Index) -> Pair {
    const Vector gradient = sums::load(dy + i, size - i);
    return {gradient, gradient * sums::load(x + i, size - i)};
  };
  add_up(pool, shape, pair, totals);
}

}  // namespace moments
