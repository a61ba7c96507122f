// Convolutions whose groups have many channels, as products without copies per tap.
// Along a row of the padded map, the pixels of a window lie one behind the other, so a
// window is a few runs of adjacent floats.
#pragma once

#include <array>
#include <vector>

#include "work.h"

// Hidden, because GCC otherwise shares the tables of `Tiles` among all libraries in a
// process, even those built for other instruction sets.
namespace [[gnu::visibility("hidden")]] dense {

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

// Outputs of one group whose weights are stored together: `vectors` vectors from output
// `first` of the group on. Its weights or their gradients (depth, vectors * kLanes) begin
// at `offset`.
struct Panel {
  Index group, first, vectors, offset;
};

inline std::vector<Panel> panels(const Convolution& shape) {
  std::vector<Panel> list;
  Index offset = 0;
  for (Index g = 0; g < shape.groups; g++)
    for (Index o = 0; o < shape.group_outputs();) {
      const Index blocks = (shape.group_outputs() - o + kLanes - 1) / kLanes;
      const Index vectors = blocks == 4 ? 2 : std::min<Index>(blocks, kWidest);
      list.push_back({g, o, vectors, offset});
      offset += shape.depth() * vectors * kLanes;
      o += vectors * kLanes;
    }
  return list;
}

// Work is divided into parts: rows of an image, or all rows of several small images. The
// padded maps of a part fit the second cache beside the weights.
struct Parts {
  Index rows, per_image, together, count, image_size;

  explicit Parts(const Convolution& shape) {
    constexpr Index kFit = 3 << 14, kPixels = 256;
    const Index row = shape.columns() * shape.map.channels;
    const Index fit = (kFit / row - shape.window_height) / shape.stride + 1;
    per_image = divide_up(shape.out_height, std::clamp<Index>(fit, 1, shape.out_height));
    rows = divide_up(shape.out_height, per_image);
    per_image = divide_up(shape.out_height, rows);
    image_size = ((rows - 1) * shape.stride + shape.window_height) * row;
    const Index most = std::min(kFit / image_size, kPixels / (rows * shape.out_width));
    count = divide_up(shape.images, per_image > 1 ? 1 : std::max<Index>(most, 1));
    together = divide_up(shape.images, count);
    count = divide_up(shape.images, together) * per_image;
  }
  // Floats of the inputs and outputs of a part, and of a vector beyond them.
  Index size() const { return round_up(together * image_size + kLanes, kLanes); }
  Index out_size(const Convolution& shape) const {
    return round_up(together * rows * shape.out_width * shape.out_channels + kLanes, kLanes);
  }
};

struct Part {
  Index image, images, row, rows;

  Part(const Convolution& shape, const Parts& parts, Index i)
      : image(i / parts.per_image * parts.together),
        images(std::min(parts.together, shape.images - image)),
        row(i % parts.per_image * parts.rows),
        rows(std::min(parts.rows, shape.out_height - row)) {}

  // Writes the padded rows of all images.
  void pad(const Convolution& shape, const Parts& parts, const float* x, float* out) const {
    for (Index i = 0; i < images; i++)
      ::pad(x + (image + i) * shape.image_size(), shape.map, row * shape.stride,
            (rows - 1) * shape.stride + shape.window_height, shape.columns(),
            out + i * parts.image_size);
  }
  void copy_outputs(const Convolution& shape, const Parts& parts, const float* y,
                    float* out) const {
    const Index row_size = shape.out_width * shape.out_channels;
    for (Index i = 0; i < images; i++)
      copy(out + i * parts.rows * row_size, y + (image + i) * shape.out_size() + row * row_size,
           rows * row_size);
    zero(out + ((images - 1) * parts.rows + rows) * row_size, kLanes);
  }
};

// Calls body(part, its padded rows) for all parts, in parallel.
template <class Body>
void for_each_part(ffi::ThreadPool& pool, const Convolution& shape, const Parts& parts,
                   const float* x, const Body& body) {
  Floats scratch(parts.size() * slots(pool, parts.count));
  parallel(pool, parts.count, [&](Index item, Index slot) {
    const Part part(shape, parts, item);
    float* in = scratch.data() + slot * parts.size();
    part.pad(shape, parts, x, in);
    body(part, in);
  });
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

// Distances between pixels, rows and images.
struct Steps {
  Index pixel, row, image;
};

// Adds the products of K inputs with Q vectors of output gradients over images x rows x
// columns pixels to sums (K, sums_step).
template <int K, int Q>
void gradient_tile(const float* in, Steps step, const float* dy, Steps dy_step, Index images,
                   Index rows, Index columns, float* sums, Index sums_step) {
  Vector total[K][Q];
  UNROLL for (int k = 0; k < K; k++) {
    UNROLL for (int q = 0; q < Q; q++) total[k][q] = load(sums + k * sums_step + q * kLanes);
  }
  for (Index i = 0; i < images * rows; i++) {
    const Index image = i / rows, row = i % rows;
    const float *x = in + image * step.image + row * step.row;
    const float *g = dy + image * dy_step.image + row * dy_step.row;
    for (Index j = 0; j < columns; j++, x += step.pixel, g += dy_step.pixel) {
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
  const Index outputs = shape.group_outputs(), depth = shape.depth();
  const auto list = panels(shape);
  Floats packed(shape.groups * depth * round_up(outputs, kLanes));
  parallel(pool, static_cast<Index>(list.size()), [&](Index item, Index) {
    const Panel panel = list[static_cast<size_t>(item)];
    const Index width = panel.vectors * kLanes, count = std::min(width, outputs - panel.first);
    const float* from = kernel + panel.group * outputs + panel.first;
    float* to = packed.data() + panel.offset;
    for (Index k = 0; k < depth; k++, to += width, from += shape.out_channels) {
      copy(to, from, count);
      zero(to + count, width - count);
    }
  });
  const auto offsets = shape.runs();
  const Window window = {offsets.data(), static_cast<Index>(offsets.size()), shape.run_length()};
  const Index step = shape.stride * shape.map.channels, row = step * shape.columns();
  const Parts parts(shape);
  for_each_part(pool, shape, parts, x, [&](const Part& part, const float* in) {
    for (const Panel& panel : list) {
      const int q = static_cast<int>(panel.vectors);
      const Index last = std::min<Index>(kLanes, outputs - panel.first - (q - 1) * kLanes);
      for (Index r = 0; r < part.images * part.rows; r++) {
        const Index image = r / part.rows, i = r % part.rows;
        const float* from =
            in + image * parts.image_size + i * row + panel.group * shape.group_inputs();
        float* to = y + (part.image + image) * y_size + (part.row + i) * shape.out_row +
                    panel.group * outputs + panel.first;
        for (Index j = 0, n; j < shape.out_width; j += n) {
          n = tile_size(shape.out_width - j, q);
          forward_tile_of(n, q)(from + j * step, window, step, packed.data() + panel.offset,
                                to + j * shape.out_step, shape.out_step, last);
        }
      }
    }
  });
}

// x, dy (images, out_height, out_width, out) -> dkernel (window, in / groups, out)
inline void kernel_gradient(ffi::ThreadPool& pool, const Convolution& shape, const float* x,
                            const float* dy, float* dkernel) {
  const Index outputs = shape.group_outputs(), depth = shape.depth();
  const Index channels = shape.out_channels, dy_row = shape.out_width * channels;
  const auto list = panels(shape);
  const Index sums_size = shape.groups * depth * round_up(outputs, kLanes);
  const Parts parts(shape);
  const Index count = pieces(parts.count, sums_size);
  // If there are few pieces, the panels are shared out, too.
  const Index size = static_cast<Index>(list.size()), shares = std::min(size, divide_up(16, count));
  const auto offsets = shape.runs();
  const Index pixel = shape.stride * shape.map.channels;
  const Steps step = {pixel, pixel * shape.columns(), parts.image_size};
  const Index scratch_size = parts.size() + parts.out_size(shape);
  Floats scratch(scratch_size * slots(pool, count * shares)), sums(sums_size * count);
  // Rows of which a panel of dy fits the first cache.
  const Index band = std::max<Index>(1, 24576 / (64 * shape.out_width));
  parallel(pool, count * shares, [&](Index item, Index slot) {
    const Index piece = item / shares, share = item % shares;
    const auto begin = list.begin() + share * size / shares;
    const auto end = list.begin() + (share + 1) * size / shares;
    float *in = scratch.data() + slot * scratch_size, *copied = in + parts.size();
    float* total = sums.data() + piece * sums_size;
    for (auto panel = begin; panel < end; panel++)
      zero(total + panel->offset, depth * panel->vectors * kLanes);
    for (Index p = piece * parts.count / count; p < (piece + 1) * parts.count / count; p++) {
      const Part part(shape, parts, p);
      part.pad(shape, parts, x, in);
      // The last vector of a part near the end of dy may reach beyond it, but not beyond
      // a copy.
      const Index beyond = (part.image + part.images - 1) * shape.out_size() +
                           (part.row + part.rows) * dy_row;
      const bool inside =
          outputs % kLanes == 0 || beyond + kLanes <= shape.images * shape.out_size();
      if (!inside) part.copy_outputs(shape, parts, dy, copied);
      const float* gradient =
          inside ? dy + part.image * shape.out_size() + part.row * dy_row : copied;
      const Steps dy_step = {channels, dy_row,
                             inside ? shape.out_size() : parts.rows * dy_row};
      for (Index i = 0; i < part.rows; i += band)
        for (auto panel = begin; panel < end; panel++)
          for (size_t r = 0; r < offsets.size(); r++)
            for (Index k = 0, n; k < shape.run_length(); k += n) {
              const int q = static_cast<int>(panel->vectors);
              n = tile_size(shape.run_length() - k, q);
              const Index first = static_cast<Index>(r) * shape.run_length() + k;
              gradient_tile_of(n, q)(
                  in + i * step.row + offsets[r] + panel->group * shape.group_inputs() + k,
                  step, gradient + i * dy_row + panel->group * outputs + panel->first,
                  dy_step, part.images, std::min(band, part.rows - i),
                  shape.out_width, total + panel->offset + first * q * kLanes, q * kLanes);
            }
    }
  });
  add_pieces(pool, sums.data(), count, sums_size);
  parallel(pool, size, [&](Index item, Index) {
    const Panel panel = list[static_cast<size_t>(item)];
    const Index width = panel.vectors * kLanes;
    for (Index k = 0; k < depth; k++)
      copy(dkernel + k * channels + panel.group * outputs + panel.first,
           &sums[panel.offset + k * width], std::min(width, outputs - panel.first));
  });
}

}  // namespace dense
