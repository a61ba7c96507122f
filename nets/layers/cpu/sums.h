// Weighted sums of maps of equal shape (groups, pixels, channels), and their gradients, in
// one pass over each map.
#pragma once

#include <vector>

#include "work.h"

namespace sums {

using Maps = std::vector<const float*>;

struct Shape {
  Index groups, pixels, channels;

  // Number of pixels in a chunk, which fits the L1 cache, and of chunks in a group.
  Index chunk() const { return std::max<Index>(1, 4096 / channels); }
  Index chunks() const { return divide_up(pixels, chunk()); }
};

// Loads a vector of which only the first `count` lanes may exist; the others are 0.
inline Vector load(const float* from, Index count) {
  if (count >= kLanes) return ::load(from);
  Vector v = {};
  std::memcpy(&v, from, sizeof(float) * static_cast<size_t>(count));
  return v;
}

// Calls f(i, channel, lanes) for each vector of a map: `lanes` channels of one pixel, of
// which the first is `channel` and element i of the map.
template <typename F>
inline void for_each_vector(Index pixels, Index channels, const F& f) {
  for (Index p = 0; p < pixels; p++) {
    Index c = 0;
    for (; c + kLanes <= channels; c += kLanes) f(p * channels + c, c, Index{kLanes});
    if (c < channels) f(p * channels + c, c, channels - c);
  }
}

// Calls f(offset, pixels) for each chunk in one of `parts` parts of a group: offset is that
// of its first element. item: part * groups + group.
template <typename F>
inline void for_each_chunk(const Shape& shape, Index parts, Index item, const F& f) {
  const Index part = item / shape.groups, group = item % shape.groups;
  for (Index i = part * shape.chunks() / parts; i < (part + 1) * shape.chunks() / parts; i++) {
    const Index first = i * shape.chunk();
    f((group * shape.pixels + first) * shape.channels,
      std::min(shape.chunk(), shape.pixels - first));
  }
}

constexpr int kMaps = 4;  // number of maps read at the same time

// y (pixels, channels) += the sum of N maps, each times its weights (channels,).
template <int N>
void add(const float* const* maps, Index offset, const float* weights, Index pixels,
         Index channels, float* y) {
  const float* x[N];
  UNROLL for (int n = 0; n < N; n++) x[n] = maps[n] + offset;
  for_each_vector(pixels, channels, [&](Index i, Index c, Index lanes) {
    Vector sum = load(y + i, lanes);
    UNROLL for (int n = 0; n < N; n++)
      sum += load(weights + n * channels + c, lanes) * load(x[n] + i, lanes);
    store(y + i, sum, lanes);
  });
}

// y = shift (groups, channels) + the sum of all maps, each times its weights, or the ReLU
// of that. weights: (groups, maps, channels).
inline void weighted_sum(ffi::ThreadPool& pool, const Shape& shape, const Maps& maps,
                         const float* weights, const float* shift, bool relu, float* y) {
  const Index count = static_cast<Index>(maps.size()), channels = shape.channels;
  parallel(pool, shape.groups * shape.chunks(), [&](Index item, Index) {
    const Index group = item / shape.chunks(), first = item % shape.chunks() * shape.chunk();
    const Index pixels = std::min(shape.chunk(), shape.pixels - first);
    const Index offset = (group * shape.pixels + first) * channels;
    for (Index p = 0; p < pixels; p++)
      copy(y + offset + p * channels, shift + group * channels, channels);
    in_parts<kMaps>(0, count, [&](auto n, Index m) {
      add<n>(&maps[static_cast<size_t>(m)], offset, weights + (group * count + m) * channels,
             pixels, channels, y + offset);
    });
    if (!relu) return;
    for (Index i = offset; i < offset + pixels * channels; i++)
      y[i] = y[i] < 0 ? 0 : y[i];  // nan stays nan
  });
}

// For N output gradients: adds each times its weights (channels,) to dx (pixels, channels),
// and its product with x, summed over pixels, to totals (N, channels).
template <int N>
void add_gradients(const float* x, const float* const* maps, Index offset,
                   const float* weights, Index pixels, Index channels, float* dx,
                   float* totals) {
  const float* dy[N];
  UNROLL for (int n = 0; n < N; n++) dy[n] = maps[n] + offset;
  for_each_vector(pixels, channels, [&](Index i, Index c, Index lanes) {
    const Vector value = load(x + i, lanes);
    Vector sum = load(dx + i, lanes);
    UNROLL for (int n = 0; n < N; n++) {
      const Index k = n * channels + c;
      const Vector gradient = load(dy[n] + i, lanes);
      sum += load(weights + k, lanes) * gradient;
      store(totals + k, load(totals + k, lanes) + value * gradient, lanes);
    }
    store(dx + i, sum, lanes);
  });
}

// Computes the gradients dx and dweights (groups, maps, channels) of the products
// y_n = weights_n x from all dy_n (groups, pixels, channels).
inline void gradients(ffi::ThreadPool& pool, const Shape& shape, const float* x,
                      const float* weights, const Maps& dy, float* dx, float* dweights) {
  const Index count = static_cast<Index>(dy.size()), channels = shape.channels;
  const Index size = count * channels;
  const Index parts = pieces(shape.chunks(), shape.groups * size);
  Floats totals(parts * shape.groups * size);
  parallel(pool, parts * shape.groups, [&](Index item, Index) {
    const float* factors = weights + item % shape.groups * size;
    float* total = totals.data() + item * size;
    zero(total, size);
    for_each_chunk(shape, parts, item, [&](Index offset, Index pixels) {
      zero(dx + offset, pixels * channels);
      in_parts<kMaps>(0, count, [&](auto n, Index m) {
        add_gradients<n>(x + offset, &dy[static_cast<size_t>(m)], offset,
                         factors + m * channels, pixels, channels, dx + offset,
                         total + m * channels);
      });
    });
  });
  add_pieces(pool, totals.data(), parts, shape.groups * size);
  copy(dweights, totals.data(), shape.groups * size);
}

}  // namespace sums
