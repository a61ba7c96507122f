// Convolutions over a sparse graph between channels, in time proportional to its edges.
// Maps are transposed to one plane per channel, so that a vector holds one channel of
// neighbouring pixels, and an edge is one multiplication and addition of planes.
#pragma once

#include <vector>

#include "work.h"

namespace sparse {

struct Convolution {
  Map map;  // of one image
  Index images, out_height, out_width, out_channels, window_height, window_width;

  Index columns() const { return out_width + window_width - 1; }  // of the padded map
  Index taps() const { return window_height * window_width; }
};

// The edges of each output: `source` is its input, `edge` its number.
struct Graph {
  std::vector<Index> start, source, edge;

  // edges: input * outputs + output. `transposed` exchanges inputs and outputs.
  Graph(const int32_t* edges, Index count, Index inputs, Index outputs, bool transposed)
      : start(static_cast<size_t>((transposed ? inputs : outputs) + 1)),
        source(static_cast<size_t>(count)),
        edge(static_cast<size_t>(count)) {
    auto target = [&](Index e) {
      return static_cast<size_t>(transposed ? edges[e] / outputs : edges[e] % outputs);
    };
    for (Index e = 0; e < count; e++) start[target(e) + 1]++;
    for (size_t o = 1; o < start.size(); o++) start[o] += start[o - 1];
    std::vector<Index> next(start.begin(), start.end() - 1);
    for (Index e = 0; e < count; e++) {
      const auto place = static_cast<size_t>(next[target(e)]++);
      source[place] = transposed ? edges[e] % outputs : edges[e] / outputs;
      edge[place] = e;
    }
  }
};

// Work is divided into strips: rows of an image, about kStrip pixels, of which the
// planes of all channels fit the second cache. The rest of a row of the padded map
// between two output rows is computed, too, and discarded.
constexpr Index kStrip = 16 * kLanes;

struct Strips {
  Index rows, per_image, positions, pitch_in, pitch_out;

  explicit Strips(const Convolution& shape) {
    const Index columns = shape.columns();
    rows = std::clamp<Index>(kStrip / columns, 1, shape.out_height);
    per_image = (shape.out_height + rows - 1) / rows;
    rows = (shape.out_height + per_image - 1) / per_image;
    per_image = (shape.out_height + rows - 1) / rows;
    positions = (rows - 1) * columns + shape.out_width;
    pitch_out = round_up(positions, kLanes);
    // Vectors may reach beyond the last position, by less than their size. An odd
    // number of cache lines, so that planes do not compete for places in the cache.
    pitch_in = round_up((rows + shape.window_height - 1) * columns + kLanes, 16) | 16;
  }
};

// Writes rows of a map, padded, as planes (channels, pitch); `scratch` holds one strip.
inline void to_planes(const float* image, const Map& map, Index first, Index rows,
                      Index columns, float* scratch, float* planes, Index pitch) {
  const float* in = image + first * map.width * map.channels;
  if (map.top || map.width != columns) {
    pad(image, map, first, rows, columns, scratch);
    in = scratch;
  }
  transpose(in, map.channels, rows * columns, map.channels, planes, pitch);
  for (Index c = 0; c < map.channels; c++)
    zero(planes + c * pitch + rows * columns, pitch - rows * columns);
}

// N vectors of positions of all outputs.
template <int N>
void forward_tile(const float* in, Index pitch_in, const Graph& graph, const float* values,
                  const std::vector<Index>& taps, float* out, Index pitch_out) {
  for (size_t o = 0; o + 1 < graph.start.size(); o++) {
    Vector sums[N] = {};
    for (Index e = graph.start[o]; e < graph.start[o + 1]; e++) {
      const float* plane = in + graph.source[static_cast<size_t>(e)] * pitch_in;
      for (Index tap : taps) {
        const float value = *values++;
        UNROLL for (int n = 0; n < N; n++) sums[n] += value * load(plane + tap + n * kLanes);
      }
    }
    float* to = out + static_cast<Index>(o) * pitch_out;
    UNROLL for (int n = 0; n < N; n++) store(to + n * kLanes, sums[n]);
  }
}

// Adds the products of all edges over N vectors of positions to sums (edges, taps).
template <int N>
void gradient_tile(const float* in, Index pitch_in, const Graph& graph,
                   const std::vector<Index>& taps, const float* dy, Index pitch_dy,
                   float* sums) {
  for (size_t o = 0; o + 1 < graph.start.size(); o++) {
    Vector g[N];
    UNROLL for (int n = 0; n < N; n++)
        g[n] = load(dy + static_cast<Index>(o) * pitch_dy + n * kLanes);
    for (Index e = graph.start[o]; e < graph.start[o + 1]; e++) {
      const float* plane = in + graph.source[static_cast<size_t>(e)] * pitch_in;
      for (Index tap : taps) {
        Vector even = {}, odd = {};
        UNROLL for (int n = 0; n < N; n++)
            (n % 2 ? odd : even) += g[n] * load(plane + tap + n * kLanes);
        *sums++ += sum(even + odd);
      }
    }
  }
}

// Calls f<N>(position) for tiles of at most `most` vectors that cover `count` vectors.
template <int N, typename F>
void tiles(Index count, Index position, const F& f) {
  for (; count >= N; count -= N, position += N * kLanes)
    f(std::integral_constant<int, N>(), position);
  if constexpr (N > 1)
    if (count) tiles<N / 2>(count, position, f);
}

inline std::vector<Index> taps(const Convolution& shape) {
  std::vector<Index> offsets;
  for (Index i = 0; i < shape.window_height; i++)
    for (Index j = 0; j < shape.window_width; j++) offsets.push_back(i * shape.columns() + j);
  return offsets;
}

// x (images, height, width, in), values (window, edges) -> y (images, height, width, out)
// If transposed, y is the gradient of the input for the output gradient x.
inline void forward(ffi::ThreadPool& pool, const Convolution& shape, const float* x,
                    const float* values, const int32_t* edges, Index count, bool transposed,
                    float* y) {
  const Index channels = shape.map.channels, outs = shape.out_channels;
  const Graph graph = transposed ? Graph(edges, count, outs, channels, true)
                                 : Graph(edges, count, channels, outs, false);
  const auto offsets = taps(shape);
  Floats packed(count * shape.taps());
  for (Index e = 0, k = 0; e < count; e++)
    for (Index t = 0; t < shape.taps(); t++, k++) {
      const Index tap = transposed ? shape.taps() - 1 - t : t;
      packed[k] = values[tap * count + graph.edge[static_cast<size_t>(e)]];
    }
  const Strips strips(shape);
  const Index columns = shape.columns();
  const Index strip_size = (strips.rows + shape.window_height - 1) * columns * channels;
  const Index in_size = round_up(channels * strips.pitch_in, kLanes);
  const Index size = round_up(strip_size, kLanes) + in_size + outs * strips.pitch_out;
  const Index items = shape.images * strips.per_image;
  Floats scratch(size * slots(pool, items));
  parallel(pool, items, [&](Index item, Index slot) {
    float* in = scratch.data() + slot * size;
    float *out = in + in_size, *strip = out + outs * strips.pitch_out;
    const Index image = item / strips.per_image, first = item % strips.per_image * strips.rows;
    const Index rows = std::min(strips.rows, shape.out_height - first);
    to_planes(x + image * shape.map.height * shape.map.width * channels, shape.map, first,
              rows + shape.window_height - 1, columns, strip, in, strips.pitch_in);
    const Index positions = (rows - 1) * columns + shape.out_width;
    tiles<4>((positions + kLanes - 1) / kLanes, 0, [&](auto n, Index position) {
      forward_tile<n>(in + position, strips.pitch_in, graph, packed.data(), offsets,
                      out + position, strips.pitch_out);
    });
    float* to = y + (image * shape.out_height + first) * shape.out_width * outs;
    if (columns == shape.out_width)
      transpose(out, strips.pitch_out, outs, positions, to, outs);
    else
      for (Index r = 0; r < rows; r++)
        transpose(out + r * columns, strips.pitch_out, outs, shape.out_width,
                  to + r * shape.out_width * outs, outs);
  });
}

// x, dy (images, height, width, out) -> dvalues (window, edges)
inline void values_gradient(ffi::ThreadPool& pool, const Convolution& shape, const float* x,
                            const float* dy, const int32_t* edges, Index count,
                            float* dvalues) {
  const Index channels = shape.map.channels, outs = shape.out_channels;
  const Graph graph(edges, count, channels, outs, false);
  const auto offsets = taps(shape);
  const Strips strips(shape);
  const Index columns = shape.columns(), sums_size = count * shape.taps();
  const Index in_rows = strips.rows + shape.window_height - 1;
  const Index in_size = round_up(channels * strips.pitch_in, kLanes);
  const Index out_size = outs * strips.pitch_in;
  const Index strip_size = round_up(in_rows * columns * std::max(channels, outs), kLanes);
  const Index size = in_size + out_size + strip_size;
  const Index items = shape.images * strips.per_image, parts = pieces(items, sums_size);
  const Map dy_map = {shape.out_height, shape.out_width, outs};
  Floats scratch(size * slots(pool, parts)), sums(sums_size * parts);
  parallel(pool, parts, [&](Index piece, Index slot) {
    float* in = scratch.data() + slot * size;
    float *gradient = in + in_size, *strip = gradient + out_size;
    float* total = sums.data() + piece * sums_size;
    zero(total, sums_size);
    for (Index item = piece * items / parts; item < (piece + 1) * items / parts; item++) {
      const Index image = item / strips.per_image;
      const Index first = item % strips.per_image * strips.rows;
      const Index rows = std::min(strips.rows, shape.out_height - first);
      to_planes(x + image * shape.map.height * shape.map.width * channels, shape.map, first,
                rows + shape.window_height - 1, columns, strip, in, strips.pitch_in);
      to_planes(dy + image * shape.out_height * shape.out_width * outs, dy_map, first, rows,
                columns, strip, gradient, strips.pitch_in);
      const Index positions = (rows - 1) * columns + shape.out_width;
      tiles<16>((positions + kLanes - 1) / kLanes, 0, [&](auto n, Index position) {
        gradient_tile<n>(in + position, strips.pitch_in, graph, offsets, gradient + position,
                         strips.pitch_in, total);
      });
    }
  });
  add_pieces(pool, sums.data(), parts, sums_size);
  for (Index e = 0, k = 0; e < count; e++)
    for (Index t = 0; t < shape.taps(); t++, k++)
      dvalues[t * count + graph.edge[static_cast<size_t>(e)]] = sums[k];
}

}  // namespace sparse
