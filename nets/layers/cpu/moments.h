// Sums over the pixels of maps of shape (groups, pixels, channels), for batch
// normalisation and its gradients, in one pass over each map.
#pragma once

#include "sums.h"

namespace moments {

using sums::Shape;

struct Pair {
  Vector first, second;
};

// The functions f(p, c) below return a Pair for the vector of channels that begins with
// channel c of pixel p, an index over all groups. If there are fewer channels than lanes,
// the other lanes are ignored.

constexpr int kVectors = 4;  // number of vectors of channels that are summed together

// out (2, step) = the sums of f over pixels, for N vectors from channel c on.
template <int N, typename F>
void add_vectors(const F& f, Index first, Index pixels, Index c, float* out, Index step) {
  Pair total[N] = {};
  for (Index p = first; p < first + pixels; p++)
    UNROLL for (int n = 0; n < N; n++) {
      const Pair value = f(p, c + n * kLanes);
      total[n].first += value.first;
      total[n].second += value.second;
    }
  UNROLL for (int n = 0; n < N; n++) {
    store(out + c + n * kLanes, total[n].first);
    store(out + step + c + n * kLanes, total[n].second);
  }
}

// totals (2, groups, channels) = the sums of f over pixels.
template <typename F>
void add_up(ffi::ThreadPool& pool, const Shape& shape, const F& f, float* totals) {
  const Index channels = shape.channels, size = 2 * shape.groups * channels;
  if (!shape.pixels || !size) return zero(totals, size);
  const Index parts = pieces(shape.chunks(), size), step = std::max<Index>(channels, kLanes);
  Floats all(parts * size);
  parallel(pool, parts * shape.groups, [&](Index item, Index) {
    Floats chunk(2 * step);
    float* first = all.data() + item / shape.groups * size + item % shape.groups * channels;
    float* second = first + shape.groups * channels;
    zero(first, channels);
    zero(second, channels);
    sums::for_each_chunk(shape, parts, item, [&](Index offset, Index pixels) {
      in_parts<kVectors>(0, channels / kLanes, [&](auto n, Index v) {
        add_vectors<n>(f, offset / channels, pixels, v * kLanes, chunk.data(), step);
      });
      // The last vector overlaps the one before.
      const Index last = std::max<Index>(0, channels - kLanes);
      if (channels % kLanes)
        add_vectors<1>(f, offset / channels, pixels, last, chunk.data(), step);
      for (Index c = 0; c < channels; c++) {
        first[c] += chunk[c];
        second[c] += chunk[step + c];
      }
    });
  });
  add_pieces(pool, all.data(), parts, size);
  copy(totals, all.data(), size);
}

// Sums x - reference (channels,) and its square.
inline void of_map(ffi::ThreadPool& pool, const Shape& shape, const float* x,
                   const float* reference, float* totals) {
  Floats padded(shape.channels + kLanes);
  copy(padded.data(), reference, shape.channels);
  zero(padded.data() + shape.channels, kLanes);
  const Index size = shape.groups * shape.pixels * shape.channels;
  const auto pair = [&](Index p, Index c) -> Pair {
    const Index i = p * shape.channels + c;
    const Vector centred = sums::load(x + i, size - i) - load(padded.data() + c);
    return {centred, centred * centred};
  };
  add_up(pool, shape, pair, totals);
}

// One of the arrays (groups, pixels, channels) that make up a concatenated map.
struct Slice {
  const float* x;
  Index channels;
};

// Sums dy and dy * x, of which x is the concatenation of slices.
inline void of_gradient(ffi::ThreadPool& pool, const Shape& shape,
                        const std::vector<Slice>& slices, const float* dy, float* totals) {
  const Index pixels = shape.groups * shape.pixels, size = pixels * shape.channels;
  Index start = 0;  // the first channel of the slice
  for (const Slice& slice : slices) {
    const Index width = slice.channels, slice_size = pixels * width;
    const auto pair = [&](Index p, Index c) -> Pair {
      const Index i = p * shape.channels + start + c, j = p * width + c;
      const Vector gradient = sums::load(dy + i, size - i);
      return {gradient, gradient * sums::load(slice.x + j, slice_size - j)};
    };
    Floats pairs(2 * shape.groups * width);
    add_up(pool, {shape.groups, shape.pixels, width}, pair, pairs.data());
    for (Index row = 0; row < 2 * shape.groups; row++)
      copy(totals + row * shape.channels + start, pairs.data() + row * width, width);
    start += width;
  }
}

}  // namespace moments
