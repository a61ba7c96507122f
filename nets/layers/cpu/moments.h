// Sums over the pixels of maps of shape (groups, pixels, channels), for batch
// normalisation and its gradients, in one pass over each map.
#pragma once

#include <array>
#include <utility>

#include "sums.h"

namespace moments {

using sums::Shape;

struct Pair {
  Vector first, second;
};

// The functions f(group, c) below return a function of a pixel p, an index over all
// groups, that returns a Pair for the vector of channels from c on. If there are fewer
// channels than lanes, the other lanes are ignored.

constexpr int kVectors = 4;  // number of vectors of channels that are summed together

// out (2, step) = the sums of f over pixels, for a vector of channels from each of
// c + n * kLanes on.
template <typename F, int... n>
void add_vectors(const F& f, Index group, Index first, Index pixels, Index c, float* out,
                 Index step, std::integer_sequence<int, n...>) {
  const std::array at{f(group, c + n * kLanes)...};
  Pair total[sizeof...(n)] = {};
  for (Index p = first; p < first + pixels; p++) {
    const Pair value[] = {at[n](p)...};
    ((total[n].first += value[n].first, total[n].second += value[n].second), ...);
  }
  ((store(out + c + n * kLanes, total[n].first),
    store(out + step + c + n * kLanes, total[n].second)), ...);
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
    const Index group = item % shape.groups;
    float* first = all.data() + item / shape.groups * size + group * channels;
    float* second = first + shape.groups * channels;
    zero(first, channels);
    zero(second, channels);
    sums::for_each_chunk(shape, parts, item, [&](Index offset, Index pixels) {
      const auto add = [&](auto n, Index c) {
        add_vectors(f, group, offset / channels, pixels, c, chunk.data(), step,
                    std::make_integer_sequence<int, n>());
      };
      in_parts<kVectors>(0, channels / kLanes, [&](auto n, Index v) { add(n, v * kLanes); });
      // The last vector overlaps the one before.
      if (channels % kLanes)
        add(std::integral_constant<int, 1>(), std::max<Index>(0, channels - kLanes));
      for (Index c = 0; c < channels; c++) {
        first[c] += chunk[c];
        second[c] += chunk[step + c];
      }
    });
  });
  add_pieces(pool, all.data(), parts, size);
  copy(totals, all.data(), size);
}

// Calls run(load). load(from, count) loads a vector from an array of which `count`
// elements are left; only with fewer channels than lanes may these be too few.
template <typename F>
void with_load(Index channels, const F& run) {
  if (channels < kLanes)
    run([](const float* from, Index count) { return sums::load(from, count); });
  else
    run([](const float* from, Index) { return ::load(from); });
}

// Sums x - reference (groups, channels) and its square.
inline void of_map(ffi::ThreadPool& pool, const Shape& shape, const float* x,
                   const float* reference, float* totals) {
  const Index channels = shape.channels, rows = shape.groups * channels;
  with_load(channels, [&](auto load) {
    const auto sums_of = [&](Index group, Index c) {
      const Index row = group * channels + c;
      const Vector centre = load(reference + row, rows - row);
      return [=](Index p) -> Pair {
        const Index i = p * channels + c;
        const Vector centred = load(x + i, rows * shape.pixels - i) - centre;
        return {centred, centred * centred};
      };
    };
    add_up(pool, shape, sums_of, totals);
  });
}

// One of the arrays (groups, pixels, channels) that make up a concatenated map.
struct Slice {
  const float* x;
  Index channels;
};

// An activation passes values between 0 and limit. scale, shift (groups, channels): of the
// normalisation before it; null without an activation.
struct Activation {
  const float *scale, *shift;
  float limit;
};

// Sums dy and dy * x, of which x is the concatenation of slices. With an activation, only
// those dy are added for which it passes scale * x + shift.
inline void of_gradient(ffi::ThreadPool& pool, const Shape& shape,
                        const std::vector<Slice>& slices, const Activation& activation,
                        const float* dy, float* totals) {
  const Index rows = shape.groups * shape.channels, pixels = shape.groups * shape.pixels;
  Index start = 0;  // the first channel of the slice
  for (const Slice& slice : slices) {
    const Index width = slice.channels;
    Floats pairs(2 * shape.groups * width);
    const auto add = [&](const auto& f) {
      add_up(pool, {shape.groups, shape.pixels, width}, f, pairs.data());
    };
    with_load(width, [&](auto load) {
      const auto gradient = [=](Index p, Index c) {
        const Index i = p * shape.channels + start + c;
        return load(dy + i, rows * shape.pixels - i);
      };
      const auto input = [=](Index p, Index c) {
        const Index i = p * width + c;
        return load(slice.x + i, pixels * width - i);
      };
      if (!activation.scale)
        return add([=](Index, Index c) {
          return [=](Index p) -> Pair {
            const Vector value = gradient(p, c);
            return {value, value * input(p, c)};
          };
        });
      add([=](Index group, Index c) {
        const Index row = group * shape.channels + start + c;
        const Vector scale = load(activation.scale + row, rows - row);
        const Vector shift = load(activation.shift + row, rows - row);
        return [=](Index p) -> Pair {
          const Vector x = input(p, c), y = scale * x + shift;
          const Lanes passed = (y > 0) & (y < activation.limit);
          const Vector value =
              reinterpret_cast<Vector>(reinterpret_cast<Lanes>(gradient(p, c)) & passed);
          return {value, value * x};
        };
      });
    });
    for (Index row = 0; row < 2 * shape.groups; row++)
      copy(totals + row * shape.channels + start, pairs.data() + row * width, width);
    start += width;
  }
}

}  // namespace moments
