// Convolutions whose groups have many channels, as products without copies per tap.
// Along a row of the padded map, the pixels of a window lie one behind the other, so a
// window is a few runs of adjacent floats.
#pragma once

#include <array>
#include <vector>

#include "work.h"

namespace dense {

struct Convolution {
  Map map;  // of one image
  Index images, out_height, out_width, out_channels;
  Index window_height, window_width, stride, groups;
  Index out_row, out_step;  // from an output to the next below and beside it

  Index group_inputs() const { return map.channels / groups; }
  Index group_outputs() const { return out_channels / groups; }
  Index depth() const { return window_height * window_width * group_inputs(); }
  Index rows() const { return (out_height - 1) * stride + window_height; }
  Index columns() const { return (out_width - 1) * stride + window_width; }
  Index image_size() const { return map.height * map.width * map.channels; }
  Index out_size() const { return out_height * out_width * out_channels; }
  Index padded_size() const { return rows() * columns() * map.channels + kLanes; }
  // Where each run of a window begins, and how many floats it has.
  std::vector<Index> runs() const {
    std::vector<Index> offsets;
    for (Index i = 0; i < window_height; i++)
      for (Index j = 0; j < (groups == 1 ? 1 : window_width); j++)
        offsets.push_back((i * columns() + j) * map.channels);
    return offsets;
  }
  Index run_length() const { return (groups == 1 ? window_width : 1) * group_inputs(); }
};

// Most vectors of outputs and most pixels of a tile: its sums stay in registers.
constexpr int kWidest = kRegisters == 32 ? 3 : 2;
constexpr int kMostPixels[] = {0, kRegisters == 32 ? 24 : 12, kRegisters == 32 ? 13 : 5,
                               kRegisters == 32 ? 9 : 3};

// Vectors of the next panel of outputs.
inline int panel(Index outputs) {
  const Index blocks = (outputs + kLanes - 1) / kLanes;
  if (blocks <= kWidest) return static_cast<int>(blocks);
  return blocks == 4 ? 2 : kWidest;
}

struct Window {
  const Index* offsets;
  Index runs, length;
};

// Adds up P pixels of Q vectors of outputs; `last` lanes of the last vector are stored.
template <int P, int Q>
void forward_tile(const float* in, const Window& window, Index step, const float* weights,
                  float* out, Index out_step, Index last) {
  Vector sums[P][Q] = {};
  for (Index r = 0; r < window.runs; r++) {
    // Few base registers: four pixels share one.
    const float* base[(P + 3) / 4];
    UNROLL for (int b = 0; b < (P + 3) / 4; b++) base[b] = in + window.offsets[r] + 4 * b * step;
    for (Index k = 0; k < window.length; k++, weights += Q * kLanes) {
      Vector w[Q];
      UNROLL for (int q = 0; q < Q; q++) w[q] = load(weights + q * kLanes);
      UNROLL for (int p = 0; p < P; p++) {
        const float x = base[p / 4][p % 4 * step + k];
        UNROLL for (int q = 0; q < Q; q++) sums[p][q] += x * w[q];
      }
    }
  }
  UNROLL for (int p = 0; p < P; p++) {
    float* to = out + p * out_step;
    UNROLL for (int q = 0; q < Q - 1; q++) store(to + q * kLanes, sums[p][q]);
    store(to + (Q - 1) * kLanes, sums[p][Q - 1], last);
  }
}

// Adds the products of K inputs with Q vectors of output gradients over rows x columns
// pixels to sums (K, sums_step).
template <int K, int Q>
void gradient_tile(const float* in, Index step, Index row, const float* dy, Index dy_step,
                   Index dy_row, Index rows, Index columns, float* sums, Index sums_step) {
  Vector total[K][Q];
  UNROLL for (int k = 0; k < K; k++) {
    UNROLL for (int q = 0; q < Q; q++) total[k][q] = load(sums + k * sums_step + q * kLanes);
  }
  for (Index i = 0; i < rows; i++) {
    const float *x = in + i * row, *g = dy + i * dy_row;
    for (Index j = 0; j < columns; j++, x += step, g += dy_step) {
      Vector d[Q];
      UNROLL for (int q = 0; q < Q; q++) d[q] = load(g + q * kLanes);
      UNROLL for (int k = 0; k < K; k++) {
        UNROLL for (int q = 0; q < Q; q++) total[k][q] += x[k] * d[q];
      }
    }
  }
  UNROLL for (int k = 0; k < K; k++) {
    UNROLL for (int q = 0; q < Q; q++) store(sums + k * sums_step + q * kLanes, total[k][q]);
  }
}

using ForwardTile = decltype(&forward_tile<1, 1>);
using GradientTile = decltype(&gradient_tile<1, 1>);
template <int Q, int... P>
std::array<ForwardTile, sizeof...(P)> forward_tiles(std::integer_sequence<int, P...>) {
  return {forward_tile<P + 1, Q>...};
}
template <int Q, int... P>
std::array<GradientTile, sizeof...(P)> gradient_tiles(std::integer_sequence<int, P...>) {
  return {gradient_tile<P + 1, Q>...};
}
template <int Q>
struct Tiles {
  using Sizes = std::make_integer_sequence<int, kMostPixels[Q]>;
  static inline const auto forward = forward_tiles<Q>(Sizes());
  static inline const auto gradient = gradient_tiles<Q>(Sizes());
};
// The tile for the next of n pixels or inputs, and how many it takes: as equal as
// possible.
inline Index tile_size(Index n, int q) {
  const Index count = (n + kMostPixels[q] - 1) / kMostPixels[q];
  return (n + count - 1) / count;
}
inline ForwardTile forward_tile_of(Index size, int q) {
  const auto i = static_cast<size_t>(size - 1);
  if constexpr (kWidest == 3)
    if (q == 3) return Tiles<3>::forward[i];
  return q == 1 ? Tiles<1>::forward[i] : Tiles<2>::forward[i];
}
inline GradientTile gradient_tile_of(Index size, int q) {
  const auto i = static_cast<size_t>(size - 1);
  if constexpr (kWidest == 3)
    if (q == 3) return Tiles<3>::gradient[i];
  return q == 1 ? Tiles<1>::gradient[i] : Tiles<2>::gradient[i];
}

// x (images, height, width, in), kernel (window, in / groups, out) -> y, whose images are
// y_size floats apart
inline void forward(ffi::ThreadPool& pool, const Convolution& shape, const float* x,
                    const float* kernel, float* y, Index y_size) {
  const Index outputs = shape.group_outputs(), padded = round_up(outputs, kLanes);
  const Index depth = shape.depth(), channels = shape.out_channels;
  Floats packed(shape.groups * depth * padded);
  float* to = packed.data();
  for (Index g = 0; g < shape.groups; g++)
    for (Index o = 0, q; o < outputs; o += q * kLanes) {
      q = panel(outputs - o);
      const Index count = std::min(q * kLanes, outputs - o);
      for (Index k = 0; k < depth; k++, to += q * kLanes) {
        copy(to, kernel + k * channels + g * outputs + o, count);
        zero(to + count, q * kLanes - count);
      }
    }
  const auto offsets = shape.runs();
  const Window window = {offsets.data(), static_cast<Index>(offsets.size()), shape.run_length()};
  const Index step = shape.stride * shape.map.channels;
  const Index row = shape.stride * shape.columns() * shape.map.channels;
  const Index size = round_up(shape.padded_size(), kLanes);
  Floats scratch(size * slots(pool, shape.images));
  parallel(pool, shape.images, [&](Index image, Index slot) {
    float* in = scratch.data() + slot * size;
    pad(x + image * shape.image_size(), shape.map, 0, shape.rows(), shape.columns(), in);
    const float* weights = packed.data();
    for (Index g = 0; g < shape.groups; g++)
      for (Index o = 0, q; o < outputs; o += q * kLanes, weights += depth * q * kLanes) {
        q = panel(outputs - o);
        float* out = y + image * y_size + g * outputs + o;
        const Index last = std::min<Index>(kLanes, outputs - o - (q - 1) * kLanes);
        for (Index i = 0; i < shape.out_height; i++)
          for (Index j = 0, n; j < shape.out_width; j += n) {
            n = tile_size(shape.out_width - j, static_cast<int>(q));
            forward_tile_of(n, static_cast<int>(q))(
                in + i * row + j * step + g * shape.group_inputs(), window, step, weights,
                out + i * shape.out_row + j * shape.out_step, shape.out_step, last);
          }
      }
  });
}

// x, dy (images, out_height, out_width, out) -> dkernel (window, in / groups, out)
inline void kernel_gradient(ffi::ThreadPool& pool, const Convolution& shape, const float* x,
                            const float* dy, float* dkernel) {
  const Index outputs = shape.group_outputs(), padded = round_up(outputs, kLanes);
  const Index depth = shape.depth(), channels = shape.out_channels;
  const Index sums_size = shape.groups * depth * padded;
  const Index count = pieces(shape.images, sums_size);
  const auto offsets = shape.runs();
  const Index step = shape.stride * shape.map.channels;
  const Index row = shape.stride * shape.columns() * shape.map.channels;
  const Index in_size = round_up(shape.padded_size(), kLanes);
  const Index size = in_size + round_up(shape.out_size() + kLanes, kLanes);
  Floats scratch(size * slots(pool, count)), sums(sums_size * count);
  // Rows of which a panel of dy fits the first cache, with the inputs of one tile.
  const Index band = std::max<Index>(1, 24576 / (64 * shape.out_width));
  parallel(pool, count, [&](Index piece, Index slot) {
    float *in = scratch.data() + slot * size, *gradient = in + in_size;
    float* total = sums.data() + piece * sums_size;
    zero(total, sums_size);
    for (Index image = piece * shape.images / count; image < (piece + 1) * shape.images / count;
         image++) {
      pad(x + image * shape.image_size(), shape.map, 0, shape.rows(), shape.columns(), in);
      copy(gradient, dy + image * shape.out_size(), shape.out_size());
      zero(gradient + shape.out_size(), kLanes);
      for (Index i = 0; i < shape.out_height; i += band)
        for (Index g = 0; g < shape.groups; g++)
          for (Index o = 0, q; o < outputs; o += q * kLanes) {
            q = panel(outputs - o);
            for (size_t r = 0; r < offsets.size(); r++)
              for (Index k = 0, n; k < shape.run_length(); k += n) {
                n = tile_size(shape.run_length() - k, static_cast<int>(q));
                const Index first = static_cast<Index>(r) * shape.run_length() + k;
                gradient_tile_of(n, static_cast<int>(q))(
                    in + i * row + offsets[r] + g * shape.group_inputs() + k, step, row,
                    gradient + i * shape.out_width * channels + g * outputs + o, channels,
                    shape.out_width * channels, std::min(band, shape.out_height - i),
                    shape.out_width, total + (g * depth + first) * padded + o, padded);
              }
          }
    }
  });
  add_pieces(pool, sums.data(), count, sums_size);
  for (Index g = 0; g < shape.groups; g++)
    for (Index k = 0; k < depth; k++)
      copy(dkernel + k * channels + g * outputs, &sums[(g * depth + k) * padded], outputs);
}

}  // namespace dense
