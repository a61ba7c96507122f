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

// The edges between `near` channels, whose planes are in registers while all edges of a
// channel are computed, and `far` channels. Edges are ordered by blocks of far channels,
// whose planes fit the first cache, and in a block by the near channel.
struct Graph {
  Index near_channels, far_channels, block;
  std::vector<Index> start, far, edge;

  // edges: input * outputs + output; near_inputs: whether inputs are near.
  Graph(Index near, Index far_count, Index block_size, const int32_t* edges, Index count,
        Index outputs, bool near_inputs)
      : near_channels(near),
        far_channels(far_count),
        block(block_size),
        start(static_cast<size_t>(blocks() * near + 1)),
        far(static_cast<size_t>(count)),
        edge(static_cast<size_t>(count)) {
    // Division is slow with more bits.
    const auto columns = static_cast<uint32_t>(outputs);
    std::vector<size_t> place(far.size()), ends(far.size());
    for (size_t e = 0; e < place.size(); e++) {
      const auto pair = static_cast<uint32_t>(edges[e]);
      const uint32_t input = pair / columns, output = pair % columns;
      const uint32_t other = near_inputs ? output : input;
      ends[e] = other;
      place[e] = other / static_cast<uint32_t>(block) * static_cast<size_t>(near) +
                 (near_inputs ? input : output);
      start[place[e] + 1]++;
    }
    for (size_t i = 1; i < start.size(); i++) start[i] += start[i - 1];
    std::vector<Index> next(start.begin(), start.end() - 1);
    for (size_t e = 0; e < place.size(); e++) {
      const auto to = static_cast<size_t>(next[place[e]]++);
      far[to] = static_cast<Index>(ends[e]);
      edge[to] = static_cast<Index>(e);
    }
  }

  Index blocks() const { return (far_channels + block - 1) / block; }
  // The edges of a near channel in a block of far channels.
  std::pair<Index, Index> edges(Index b, Index near) const {
    const auto i = static_cast<size_t>(b * near_channels + near);
    return {start[i], start[i + 1]};
  }
};

// Work is divided into strips: rows of an image, about 4 to 16 vectors of pixels, of
// which the planes of all channels fit the second cache. The rest of a row of the padded
// map between two output rows is computed, too, and discarded.
constexpr Index kCache1 = 6144, kCache2 = 1 << 17;  // floats, with some room left

struct Strips {
  Index rows, per_image, positions, pitch;

  explicit Strips(const Convolution& shape) {
    const Index columns = shape.columns();
    const Index fit = kCache2 / (shape.map.channels + shape.out_channels) / (4 * kLanes);
    rows = std::clamp<Index>(std::clamp<Index>(fit, 1, 4) * 4 * kLanes / columns, 1,
                             shape.out_height);
    per_image = (shape.out_height + rows - 1) / rows;
    rows = (shape.out_height + per_image - 1) / per_image;
    per_image = (shape.out_height + rows - 1) / rows;
    positions = (rows - 1) * columns + shape.out_width;
    // Vectors may reach beyond the last position, by less than their size. An odd
    // number of cache lines, so that planes do not compete for places in the cache.
    pitch = round_up((rows + shape.window_height - 1) * columns + kLanes, 16) | 16;
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
  const Index positions = rows * columns;
  ::to_planes(in, positions, map.channels, planes, pitch);
  for (Index c = 0; c < map.channels; c++)
    zero(planes + c * pitch + positions, pitch - positions);
}

// Vectors of positions of a forward tile, and planes of that size that fit the first
// cache.
constexpr int kTile = 4;
constexpr Index kTileBlock = kCache1 / (kTile * kLanes);

// 1x1: adds up N vectors of positions of each output (near).
template <int N>
void gather_tile(const float* in, Index pitch, const Graph& graph, const float* values,
                 float* out) {
  for (Index b = 0; b < graph.blocks(); b++)
    for (Index o = 0; o < graph.near_channels; o++) {
      const auto [begin, end] = graph.edges(b, o);
      Vector sums[N] = {};
      float* to = out + o * pitch;
      if (b) {
        UNROLL for (int n = 0; n < N; n++) sums[n] = load(to + n * kLanes);
      }
      for (Index e = begin; e < end; e++) {
        const float* plane = in + graph.far[static_cast<size_t>(e)] * pitch;
        UNROLL for (int n = 0; n < N; n++) sums[n] += values[e] * load(plane + n * kLanes);
      }
      UNROLL for (int n = 0; n < N; n++) store(to + n * kLanes, sums[n]);
    }
}

// Most outputs that one load of an input serves.
constexpr int kOutputs = kRegisters / 8;

// Adds N vectors of positions of an input to G outputs.
template <int N, int G>
void scatter(const float* in, const std::vector<Index>& taps, const float* values,
             const Index* outputs, float* out, Index pitch) {
  const Index count = static_cast<Index>(taps.size());
  Vector sums[G][N];
  UNROLL for (int g = 0; g < G; g++) {
    UNROLL for (int n = 0; n < N; n++) sums[g][n] = load(out + outputs[g] * pitch + n * kLanes);
  }
  for (Index t = 0; t < count; t++) {
    Vector x[N];
    UNROLL for (int n = 0; n < N; n++) x[n] = load_once(in + taps[static_cast<size_t>(t)] + n * kLanes);
    UNROLL for (int g = 0; g < G; g++) {
      const float value = values[g * count + t];
      UNROLL for (int n = 0; n < N; n++) sums[g][n] += value * x[n];
    }
  }
  UNROLL for (int g = 0; g < G; g++) {
    UNROLL for (int n = 0; n < N; n++) store(out + outputs[g] * pitch + n * kLanes, sums[g][n]);
  }
}

// Larger windows: adds N vectors of positions of each input (near) to its outputs.
template <int N>
void scatter_tile(const float* in, Index pitch, const Graph& graph, const float* values,
                  const std::vector<Index>& taps, float* out) {
  const Index count = static_cast<Index>(taps.size());
  for (Index o = 0; o < graph.far_channels; o++)
    UNROLL for (int n = 0; n < N; n++) store(out + o * pitch + n * kLanes, Vector{});
  for (Index b = 0; b < graph.blocks(); b++)
    for (Index c = 0; c < graph.near_channels; c++) {
      const auto [begin, end] = graph.edges(b, c);
      in_parts<kOutputs>(begin, end, [&](auto g, Index e) {
        scatter<N, g>(in + c * pitch, taps, values + e * count,
                      &graph.far[static_cast<size_t>(e)], out, pitch);
      });
    }
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
  const bool gathers = shape.taps() == 1;
  const Graph graph(gathers ? outs : channels, gathers ? channels : outs, kTileBlock, edges,
                    count, transposed ? channels : outs, gathers == transposed);
  const auto offsets = taps(shape);
  Floats packed(count * shape.taps());
  for (Index e = 0, k = 0; e < count; e++)
    for (Index t = 0; t < shape.taps(); t++, k++) {
      const Index tap = transposed ? shape.taps() - 1 - t : t;
      packed[k] = values[tap * count + graph.edge[static_cast<size_t>(e)]];
    }
  const Strips strips(shape);
  const Index columns = shape.columns(), pitch = strips.pitch;
  const Index strip_size = (strips.rows + shape.window_height - 1) * columns * channels;
  const Index size = round_up(strip_size, kLanes) + (channels + outs) * pitch;
  const Index items = shape.images * strips.per_image;
  Floats scratch(size * slots(pool, items));
  parallel(pool, items, [&](Index item, Index slot) {
    float* in = scratch.data() + slot * size;
    float *out = in + channels * pitch, *strip = out + outs * pitch;
    const Index image = item / strips.per_image, first = item % strips.per_image * strips.rows;
    const Index rows = std::min(strips.rows, shape.out_height - first);
    to_planes(x + image * shape.map.height * shape.map.width * channels, shape.map, first,
              rows + shape.window_height - 1, columns, strip, in, pitch);
    const Index positions = (rows - 1) * columns + shape.out_width;
    in_parts<kTile>(0, (positions + kLanes - 1) / kLanes, [&](auto n, Index vector) {
      const Index i = vector * kLanes;
      if (gathers)
        gather_tile<n>(in + i, pitch, graph, packed.data(), out + i);
      else
        scatter_tile<n>(in + i, pitch, graph, packed.data(), offsets, out + i);
    });
    float* to = y + (image * shape.out_height + first) * shape.out_width * outs;
    if (columns == shape.out_width)
      from_planes(out, pitch, positions, outs, to);
    else
      for (Index r = 0; r < rows; r++)
        from_planes(out + r * columns, pitch, shape.out_width, outs,
                    to + r * shape.out_width * outs);
  });
}

// Most vectors of positions of a tile of a 1x1 layer's gradient.
constexpr int kGradientTile = 16;

// 1x1: adds the products of all edges over N vectors of positions to sums (edges,).
// Outputs are near.
template <int N>
void product_tile(const float* in, const float* dy, Index pitch, const Graph& graph,
                  float* sums) {
  Vector pending[kLanes] = {};  // of edges first ... e - 1
  Index first = 0, e = 0;
  const auto add = [&] {
    store(sums + first, load(sums + first) + sums_of(pending));
    first = e;
  };
  for (Index b = 0; b < graph.blocks(); b++)
    for (Index o = 0; o < graph.near_channels; o++) {
      Vector g[N];
      UNROLL for (int n = 0; n < N; n++) g[n] = load_once(dy + o * pitch + n * kLanes);
      for (const Index end = graph.edges(b, o).second; e < end; ) {
        const float* plane = in + graph.far[static_cast<size_t>(e)] * pitch;
        Vector total[4] = {};
        UNROLL for (int n = 0; n < N; n++) total[n % 4] += g[n] * load(plane + n * kLanes);
        pending[e - first] = total[0] + total[1] + (total[2] + total[3]);
        if (++e - first == kLanes) add();
      }
    }
  if (first == e) return;
  for (Index i = e - first; i < kLanes; i++) pending[i] = Vector{};
  add();
}

constexpr int kTaps = 3;

// Adds the products of T taps of an input with G outputs over `count` vectors of
// positions to sums (G, taps).
template <int T, int G>
void products(const float* in, const Index* taps, const float* dy, const Index* outputs,
              Index pitch, Index count, float* sums, Index step) {
  Vector total[kLanes] = {};
  for (Index i = 0; i < count * kLanes; i += kLanes) {
    Vector g[G];
    UNROLL for (int o = 0; o < G; o++) g[o] = load_once(dy + outputs[o] * pitch + i);
    UNROLL for (int t = 0; t < T; t++) {
      const Vector x = load_once(in + taps[t] + i);
      UNROLL for (int o = 0; o < G; o++) total[t * G + o] += x * g[o];
    }
  }
  float values[kLanes];
  store(values, sums_of(total));
  UNROLL for (int t = 0; t < T; t++) {
    UNROLL for (int o = 0; o < G; o++) sums[o * step + t] += values[t * G + o];
  }
}

// x, dy (images, height, width, out) -> dvalues (window, edges)
inline void values_gradient(ffi::ThreadPool& pool, const Convolution& shape, const float* x,
                            const float* dy, const int32_t* edges, Index count,
                            float* dvalues) {
  const Index channels = shape.map.channels, outs = shape.out_channels;
  const bool pointwise = shape.taps() == 1;
  const Strips strips(shape);
  const Index block = pointwise ? std::max<Index>(1, kCache1 / strips.positions) : outs;
  const Graph graph(pointwise ? outs : channels, pointwise ? channels : outs, block, edges,
                    count, outs, !pointwise);
  const auto offsets = taps(shape);
  const Index columns = shape.columns(), pitch = strips.pitch;
  const Index sums_size = round_up(count * shape.taps(), kLanes) + kLanes;
  const Index in_rows = strips.rows + shape.window_height - 1;
  const Index strip_size = round_up(in_rows * columns * std::max(channels, outs), kLanes);
  const Index size = (channels + outs) * pitch + strip_size;
  const Index items = shape.images * strips.per_image, parts_count = pieces(items, sums_size);
  const Map dy_map = {shape.out_height, shape.out_width, outs};
  Floats scratch(size * slots(pool, parts_count)), sums(sums_size * parts_count);
  parallel(pool, parts_count, [&](Index piece, Index slot) {
    float* in = scratch.data() + slot * size;
    float *gradient = in + channels * pitch, *strip = gradient + outs * pitch;
    float* total = sums.data() + piece * sums_size;
    zero(total, sums_size);
    for (Index item = piece * items / parts_count; item < (piece + 1) * items / parts_count;
         item++) {
      const Index image = item / strips.per_image;
      const Index first = item % strips.per_image * strips.rows;
      const Index rows = std::min(strips.rows, shape.out_height - first);
      to_planes(x + image * shape.map.height * shape.map.width * channels, shape.map, first,
                rows + shape.window_height - 1, columns, strip, in, pitch);
      to_planes(dy + image * shape.out_height * shape.out_width * outs, dy_map, first, rows,
                columns, strip, gradient, pitch);
      const Index positions = (rows - 1) * columns + shape.out_width;
      const Index vectors = (positions + kLanes - 1) / kLanes;
      if (pointwise) {
        in_parts<kGradientTile>(0, vectors, [&](auto n, Index vector) {
          product_tile<n>(in + vector * kLanes, gradient + vector * kLanes, pitch, graph, total);
        });
        continue;
      }
      for (Index c = 0; c < channels; c++) {
        const auto [begin, end] = graph.edges(0, c);
        in_parts<kLanes / kTaps>(begin, end, [&](auto g, Index e) {
          in_parts<kTaps>(0, shape.taps(), [&](auto t, Index tap) {
            products<t, g>(in + c * pitch, &offsets[static_cast<size_t>(tap)], gradient,
                           &graph.far[static_cast<size_t>(e)], pitch, vectors,
                           total + e * shape.taps() + tap, shape.taps());
          });
        });
      }
    }
  });
  add_pieces(pool, sums.data(), parts_count, sums_size);
  for (Index e = 0, k = 0; e < count; e++)
    for (Index t = 0; t < shape.taps(); t++, k++)
      dvalues[t * count + graph.edge[static_cast<size_t>(e)]] = sums[k];
}

}  // namespace sparse
