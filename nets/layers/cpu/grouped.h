// Convolutions in groups of M = 1, 2, 4 or 8 inputs and as many outputs: a vector holds
// whole groups, and exchanging lanes brings each input to each output of its group.
#pragma once

#include "dense.h"

namespace grouped {

using dense::Convolution;
using dense::Part;
using dense::Parts;
using dense::Steps;

constexpr int kPixels = kRegisters == 32 ? 8 : 4;

template <int M, int D = 0>
inline void add_forward(Vector x, const Vector* weights, Vector& sum) {
  sum += exchange<D>(x) * weights[D];
  if constexpr (D + 1 < M) add_forward<M, D + 1>(x, weights, sum);
}

// P pixels of one vector of channels. weights (taps, M): lane c of [t][d] connects input
// c ^ d with output c.
template <int M, int P>
inline void forward_tile(const float* in, const std::vector<Index>& taps, Index step,
                         const float* weights, float* out, Index out_step, Index lanes) {
  Vector sums[P] = {};
  for (Index tap : taps) {
    Vector w[M];
    UNROLL for (int d = 0; d < M; d++, weights += kLanes) w[d] = load(weights);
    UNROLL for (int p = 0; p < P; p++) add_forward<M>(load(in + tap + p * step), w, sums[p]);
  }
  UNROLL for (int p = 0; p < P; p++) store(out + p * out_step, sums[p], lanes);
}

template <int M, int D = 0>
inline void exchange_all(Vector v, Vector* out) {
  out[D] = exchange<D>(v);
  if constexpr (D + 1 < M) exchange_all<M, D + 1>(v, out);
}

// Adds to sums (T, M): lane c of [t][d] connects input c with output c ^ d.
template <int M, int T>
inline void gradient_tile(const float* in, const Index* taps, Steps step, const float* dy,
                          Steps dy_step, Index images, Index rows, Index columns,
                          float* sums) {
  Vector total[T][M];
  UNROLL for (int t = 0; t < T; t++) {
    UNROLL for (int d = 0; d < M; d++) total[t][d] = load(sums + (t * M + d) * kLanes);
  }
  for (Index i = 0; i < images * rows; i++) {
    const Index image = i / rows, row = i % rows;
    const float* x = in + image * step.image + row * step.row;
    const float* g = dy + image * dy_step.image + row * dy_step.row;
    for (Index j = 0; j < columns; j++, x += step.pixel, g += dy_step.pixel) {
      Vector exchanged[M];
      exchange_all<M>(load(g), exchanged);
      UNROLL for (int t = 0; t < T; t++) {
        const Vector v = load(x + taps[t]);
        UNROLL for (int d = 0; d < M; d++) total[t][d] += v * exchanged[d];
      }
    }
  }
  UNROLL for (int t = 0; t < T; t++) {
    UNROLL for (int d = 0; d < M; d++) store(sums + (t * M + d) * kLanes, total[t][d]);
  }
}

// Whether the sums of three taps stay in registers.
template <int M>
constexpr int kTaps = 3 * M + M <= kRegisters ? 3 : 1;

inline std::vector<Index> taps(const Convolution& shape) {
  std::vector<Index> offsets;
  for (Index i = 0; i < shape.window_height; i++)
    for (Index j = 0; j < shape.window_width; j++)
      offsets.push_back((i * shape.columns() + j) * shape.map.channels);
  return offsets;
}

template <int M>
void forward(ffi::ThreadPool& pool, const Convolution& shape, const float* x,
             const float* kernel, float* y, Index y_size) {
  const Index channels = shape.out_channels, padded = round_up(channels, kLanes);
  const auto offsets = taps(shape);
  const Index count = static_cast<Index>(offsets.size());
  Floats packed(count * M * padded);
  for (Index c = 0; c < padded; c++)
    for (Index k = 0; k < count * M; k++) {
      const Index input = k / M * M + (c % M ^ k % M);
      const float value = c < channels ? kernel[input * channels + c] : 0;
      packed[(c / kLanes * count * M + k) * kLanes + c % kLanes] = value;
    }
  const Index step = shape.stride * channels, row = step * shape.columns();
  const Parts parts(shape);
  for_each_part(pool, shape, parts, x, [&](const Part& part, const float* in) {
    for (Index r = 0; r < part.images * part.rows; r++)
      for (Index c = 0; c < channels; c += kLanes) {
        const Index image = r / part.rows, i = r % part.rows;
        const float* weights = packed.data() + c * count * M;
        const float* from = in + image * parts.image_size + i * row + c;
        float* to = y + (part.image + image) * y_size + (part.row + i) * shape.out_row + c;
        const Index lanes = std::min<Index>(kLanes, channels - c);
        in_parts<kPixels>(0, shape.out_width, [&](auto pixels, Index j) {
          forward_tile<M, pixels>(from + j * step, offsets, step, weights,
                                  to + j * shape.out_step, shape.out_step, lanes);
        });
      }
  });
}

template <int M>
void kernel_gradient(ffi::ThreadPool& pool, const Convolution& shape, const float* x,
                     const float* dy, float* dkernel) {
  const Index channels = shape.out_channels, padded = round_up(channels, kLanes);
  const auto offsets = taps(shape);
  const Index count = static_cast<Index>(offsets.size()), sums_size = count * M * padded;
  const Parts parts(shape);
  const Index sets = pieces(parts.count, sums_size);
  const Index pixel = shape.stride * channels, dy_row = shape.out_width * channels;
  const Steps step = {pixel, pixel * shape.columns(), parts.image_size};
  const Steps dy_step = {channels, dy_row, parts.rows * dy_row};
  const Index size = parts.size() + parts.out_size(shape);
  Floats scratch(size * slots(pool, sets)), sums(sums_size * sets);
  const Index band = std::max<Index>(1, 6144 / (step.row + dy_row));
  parallel(pool, sets, [&](Index set, Index slot) {
    float *in = scratch.data() + slot * size, *gradient = in + parts.size();
    float* total = sums.data() + set * sums_size;
    zero(total, sums_size);
    for (Index p = set * parts.count / sets; p < (set + 1) * parts.count / sets; p++) {
      const Part part(shape, parts, p);
      part.pad(shape, parts, x, in);
      part.copy_outputs(shape, parts, dy, gradient);
      for (Index i = 0; i < part.rows; i += band)
        for (Index c = 0; c < channels; c += kLanes) {
          const Index rows = std::min(band, part.rows - i);
          const float *from = in + i * step.row + c, *g = gradient + i * dy_row + c;
          float* to = total + c * count * M;
          for (Index t = 0; t < count;) {
            const bool several = t + kTaps<M> <= count;
            const auto tile = several ? gradient_tile<M, kTaps<M>> : gradient_tile<M, 1>;
            tile(from, &offsets[static_cast<size_t>(t)], step, g, dy_step, part.images, rows,
                 shape.out_width, to + t * M * kLanes);
            t += several ? kTaps<M> : 1;
          }
        }
    }
  });
  add_pieces(pool, sums.data(), sets, sums_size);
  for (Index k = 0; k < count * M; k++)
    for (Index c = 0; c < channels; c++) {  // an input channel
      const Index output = c - c % M + (c % M ^ k % M);
      dkernel[(k / M * M + c % M) * channels + output] =
          sums[(c / kLanes * count * M + k) * kLanes + c % kLanes];
    }
}

}  // namespace grouped
