// The XLA calls of nets/layers/cpu/calls.py. Each checks the shapes once more: a call
// that does not fit returns an error and reads nothing.

#if defined(__x86_64__) && !defined(__AVX__)
#error "the kernels need AVX: with SSE they take fifty times as long"
#endif

#include <exception>
#include <string>

#include "grouped.h"
#include "moments.h"
#include "sparse.h"
#include "sums.h"

namespace {

using Array = ffi::Buffer<ffi::F32>;
using Edges = ffi::Buffer<ffi::S32>;
using Result = ffi::ResultBuffer<ffi::F32>;

struct BadShape : std::exception {};

void require(bool fits) {
  if (!fits) throw BadShape();
}

// Turns exceptions into XLA's errors.
template <typename F>
ffi::Error guarded(const F& f) {
  try {
    f();
    return ffi::Error::Success();
  } catch (const BadShape&) {
    return ffi::Error::InvalidArgument("the shapes of the arrays do not fit");
  } catch (const std::exception& error) {
    return ffi::Error::Internal(error.what());
  }
}

dense::Convolution convolution(ffi::Span<const int64_t> x, ffi::Span<const int64_t> kernel,
                               ffi::Span<const int64_t> y, Index stride, Index padding,
                               Index groups) {
  require(x.size() == 4 && kernel.size() == 4 && y.size() == 4 && x[0] == y[0]);
  require(stride > 0 && groups > 0);
  require(kernel[0] > 0 && kernel[1] > 0 && kernel[2] > 0 && kernel[3] == y[3]);
  require(kernel[2] * groups == x[3] && y[3] % groups == 0);
  return {{x[1], x[2], x[3], padding, padding}, x[0], y[1], y[2], y[3], kernel[0],
          kernel[1], stride, groups, y[2] * y[3], y[3]};
}

bool is_empty(const dense::Convolution& shape) { return !shape.images || !shape.out_size(); }

// Whether grouped.h has this many channels per group.
Index small_groups(const dense::Convolution& shape) {
  const Index size = shape.group_inputs();
  const bool exists = size == 1 || size == 2 || size == 4 || size == 8;
  return exists && shape.groups > 1 && size == shape.group_outputs() ? size : 0;
}

void run_forward(ffi::ThreadPool& pool, const dense::Convolution& shape, const float* x,
             const float* kernel, float* y, Index y_size) {
  const auto run = [&](auto forward) { forward(pool, shape, x, kernel, y, y_size); };
  switch (small_groups(shape)) {
    case 1: return run(grouped::forward<1>);
    case 2: return run(grouped::forward<2>);
    case 4: return run(grouped::forward<4>);
    case 8: return run(grouped::forward<8>);
    default: return run(dense::forward);
  }
}

// The outputs in every dilation-th place of a row or column meet the same taps: from
// `first` on, every dilation-th one, the first of them at pixel `-padding`.
struct Phase {
  Index outputs, first, taps, padding;

  Phase(Index offset, Index dilation, Index size, Index window, Index padding_before)
      : outputs((size - offset + dilation - 1) / dilation),
        first(((padding_before - offset) % dilation + dilation) % dilation),
        taps(std::max<Index>(0, (window - first + dilation - 1) / dilation)),
        padding((padding_before - offset - first) / dilation) {}
};

// A convolution of x with dilation - 1 zeros between its pixels, as one convolution for
// each remainder of the outputs' rows and columns, which multiplies no such zeros.
void dilated(ffi::ThreadPool& pool, const dense::Convolution& shape, Index dilation,
             const float* x, const float* kernel, float* y) {
  const Index depth = shape.group_inputs() * shape.out_channels;
  zero(y, shape.images * shape.out_size());
  for (Index a = 0; a < std::min(dilation, shape.out_height); a++)
    for (Index b = 0; b < std::min(dilation, shape.out_width); b++) {
      const Phase rows(a, dilation, shape.out_height, shape.window_height, shape.map.top);
      const Phase columns(b, dilation, shape.out_width, shape.window_width, shape.map.left);
      if (!rows.taps || !columns.taps) continue;  // only zeros
      Floats part(rows.taps * columns.taps * depth);
      float* to = part.data();
      for (Index i = 0; i < rows.taps; i++)
        for (Index j = 0; j < columns.taps; j++, to += depth) {
          const Index row = rows.first + i * dilation, column = columns.first + j * dilation;
          copy(to, kernel + (row * shape.window_width + column) * depth, depth);
        }
      dense::Convolution phase = shape;
      phase.map.top = rows.padding, phase.map.left = columns.padding;
      phase.out_height = rows.outputs, phase.out_width = columns.outputs;
      phase.window_height = rows.taps, phase.window_width = columns.taps;
      phase.out_row *= dilation, phase.out_step *= dilation;
      run_forward(pool, phase, x, part.data(), y + a * shape.out_row + b * shape.out_step,
              shape.out_size());
    }
}

// A kernel (window, in / groups, out) whose window is turned by half and whose inputs and
// outputs are exchanged: (window, out / groups, in).
Floats turned(ffi::ThreadPool& pool, const float* kernel, Index taps, Index groups,
              Index group_inputs, Index group_outputs) {
  const Index inputs = groups * group_inputs, outputs = groups * group_outputs;
  Floats result(taps * group_inputs * outputs);
  parallel(pool, taps, [&](Index tap, Index) {
    for (Index g = 0; g < groups; g++) {
      const float* from = kernel + tap * group_inputs * outputs + g * group_outputs;
      float* to = result.data() + (taps - 1 - tap) * group_outputs * inputs + g * group_inputs;
      blocks(group_inputs, [&](Index i, Index rows) {
        blocks(group_outputs, [&](Index j, Index columns) {
          transpose_block(from + i * outputs + j, outputs, rows, columns, columns,
                          to + j * inputs + i, inputs);
        });
      });
    }
  });
  return result;
}

ffi::Error Convolve(ffi::ThreadPool pool, Array x, Array kernel, Result y, int64_t stride,
                    int64_t padding, int64_t dilation, int64_t groups, int64_t turn) {
  return guarded([&] {
    const auto k = kernel.dimensions();
    require(k.size() == 4 && groups > 0);
    const int64_t exchanged[] = {k[0], k[1], k[3] / groups, k[2] * groups};
    const auto size = turn ? ffi::Span<const int64_t>(exchanged, 4) : k;
    const auto shape =
        convolution(x.dimensions(), size, y->dimensions(), stride, padding, groups);
    require(k[3] % groups == 0);
    require(dilation == 1 || (dilation > 1 && stride == 1));
    if (is_empty(shape)) return;
    const auto run = [&](const float* weights) {
      if (dilation > 1)
        dilated(pool, shape, dilation, x.typed_data(), weights, y->typed_data());
      else
        run_forward(pool, shape, x.typed_data(), weights, y->typed_data(), shape.out_size());
    };
    if (!turn) return run(kernel.typed_data());
    run(turned(pool, kernel.typed_data(), k[0] * k[1], groups, k[2], k[3] / groups).data());
  });
}

ffi::Error KernelGradient(ffi::ThreadPool pool, Array x, Array dy, Result dkernel,
                          int64_t stride, int64_t padding, int64_t groups) {
  return guarded([&] {
    const auto shape = convolution(x.dimensions(), dkernel->dimensions(), dy.dimensions(),
                                   stride, padding, groups);
    if (is_empty(shape)) {
      return zero(dkernel->typed_data(), static_cast<Index>(dkernel->element_count()));
    }
    const auto run = [&](auto gradient) {
      gradient(pool, shape, x.typed_data(), dy.typed_data(), dkernel->typed_data());
    };
    switch (small_groups(shape)) {
      case 1: return run(grouped::kernel_gradient<1>);
      case 2: return run(grouped::kernel_gradient<2>);
      case 4: return run(grouped::kernel_gradient<4>);
      case 8: return run(grouped::kernel_gradient<8>);
      default: return run(dense::kernel_gradient);
    }
  });
}

sparse::Convolution convolution(ffi::Span<const int64_t> x, ffi::Span<const int64_t> values,
                                const Edges& edges, ffi::Span<const int64_t> y,
                                Index padding) {
  require(x.size() == 4 && values.size() == 3 && y.size() == 4 && x[0] == y[0]);
  require(edges.dimensions().size() == 1 && edges.dimensions()[0] == values[2]);
  require(values[0] > 0 && values[1] > 0 && padding >= 0 && x[3] > 0);
  require(y[1] == x[1] + 2 * padding - values[0] + 1);
  require(y[2] == x[2] + 2 * padding - values[1] + 1);
  for (Index e = 0; e < values[2]; e++) {
    const Index edge = edges.typed_data()[e];
    require(edge >= 0 && edge < x[3] * y[3]);
  }
  return {{x[1], x[2], x[3], padding, padding}, x[0], y[1], y[2], y[3], values[0], values[1]};
}

ffi::Error SparseConvolve(ffi::ThreadPool pool, Array x, Array values, Edges edges, Result y,
                          int64_t padding, int64_t transposed) {
  return guarded([&] {
    const auto shape = convolution(x.dimensions(), values.dimensions(), edges,
                                   y->dimensions(), padding);
    if (y->element_count() == 0) return;
    sparse::forward(pool, shape, x.typed_data(), values.typed_data(), edges.typed_data(),
                    values.dimensions()[2], transposed != 0, y->typed_data());
  });
}

ffi::Error ValuesGradient(ffi::ThreadPool pool, Array x, Array dy, Edges edges,
                          Result dvalues, int64_t padding) {
  return guarded([&] {
    const auto shape = convolution(x.dimensions(), dvalues->dimensions(), edges,
                                   dy.dimensions(), padding);
    if (dy.element_count() == 0) {
      return zero(dvalues->typed_data(), static_cast<Index>(dvalues->element_count()));
    }
    sparse::values_gradient(pool, shape, x.typed_data(), dy.typed_data(), edges.typed_data(),
                            dvalues->dimensions()[2], dvalues->typed_data());
  });
}

// weights (groups, maps, channels)
sums::Shape sums_shape(ffi::Span<const int64_t> x, ffi::Span<const int64_t> weights,
                       size_t maps) {
  require(x.size() == 3 && weights.size() == 3);
  require(weights[0] == x[0] && weights[2] == x[2]);
  require(weights[1] == static_cast<int64_t>(maps));
  return {x[0], x[1], x[2]};
}

sums::Maps maps_of(const ffi::RemainingArgs& arrays, const sums::Shape& shape) {
  sums::Maps maps;
  for (size_t i = 0; i < arrays.size(); i++) {
    const auto array = arrays.get<Array>(i);
    require(array.has_value());
    const auto size = array->dimensions();
    require(size.size() == 3 && size[0] == shape.groups && size[1] == shape.pixels);
    require(size[2] == shape.channels);
    maps.push_back(array->typed_data());
  }
  return maps;
}

ffi::Error WeightedSum(ffi::ThreadPool pool, Array weights, Array shift,
                       ffi::RemainingArgs arrays, Result y, int64_t relu) {
  return guarded([&] {
    const auto shape = sums_shape(y->dimensions(), weights.dimensions(), arrays.size());
    const auto maps = maps_of(arrays, shape);
    const auto size = shift.dimensions();
    require(size.size() == 2 && size[0] == shape.groups && size[1] == shape.channels);
    if (y->element_count() == 0) return;
    sums::weighted_sum(pool, shape, maps, weights.typed_data(), shift.typed_data(),
                       relu != 0, y->typed_data());
  });
}

ffi::Error WeightsGradients(ffi::ThreadPool pool, Array x, Array weights,
                            ffi::RemainingArgs arrays, Result dx, Result dweights) {
  return guarded([&] {
    const auto shape = sums_shape(x.dimensions(), weights.dimensions(), arrays.size());
    const auto dy = maps_of(arrays, shape);
    require(dx->dimensions() == x.dimensions());
    require(dweights->dimensions() == weights.dimensions());
    if (x.element_count() == 0) {
      return zero(dweights->typed_data(), static_cast<Index>(dweights->element_count()));
    }
    sums::gradients(pool, shape, x.typed_data(), weights.typed_data(), dy, dx->typed_data(),
                    dweights->typed_data());
  });
}

// x (groups, pixels, channels), totals (2, groups, channels)
sums::Shape moments_shape(ffi::Span<const int64_t> x, ffi::Span<const int64_t> totals) {
  require(x.size() == 3 && totals.size() == 3);
  require(totals[0] == 2 && totals[1] == x[0] && totals[2] == x[2]);
  return {x[0], x[1], x[2]};
}

ffi::Error MapMoments(ffi::ThreadPool pool, Array x, Array reference, Result totals) {
  return guarded([&] {
    const auto shape = moments_shape(x.dimensions(), totals->dimensions());
    const auto size = reference.dimensions();
    require(size.size() == 2 && size[0] == shape.groups && size[1] == shape.channels);
    moments::of_map(pool, shape, x.typed_data(), reference.typed_data(), totals->typed_data());
  });
}

ffi::Error GradientMoments(ffi::ThreadPool pool, Array dy, Array coefficients,
                           ffi::RemainingArgs arrays, Result totals, float limit) {
  return guarded([&] {
    const auto shape = moments_shape(dy.dimensions(), totals->dimensions());
    const auto rows = coefficients.dimensions();
    require(rows.size() == 3 && (rows[0] == 0 || rows[0] == 2));
    require(rows[1] == shape.groups && rows[2] == shape.channels);
    const float* scale = rows[0] ? coefficients.typed_data() : nullptr;
    const Index size = shape.groups * shape.channels;
    const moments::Activation activation = {scale, scale ? scale + size : nullptr, limit};
    std::vector<moments::Slice> slices;
    Index channels = 0;
    for (size_t i = 0; i < arrays.size(); i++) {
      const auto array = arrays.get<Array>(i);
      require(array.has_value());
      const auto slice = array->dimensions();
      require(slice.size() == 3 && slice[0] == shape.groups && slice[1] == shape.pixels);
      slices.push_back({array->typed_data(), slice[2]});
      channels += slice[2];
    }
    require(channels == shape.channels);
    moments::of_gradient(pool, shape, slices, activation, dy.typed_data(),
                         totals->typed_data());
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(convolve, Convolve,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Ret<Array>()
                                  .Attr<int64_t>("stride")
                                  .Attr<int64_t>("padding")
                                  .Attr<int64_t>("dilation")
                                  .Attr<int64_t>("groups")
                                  .Attr<int64_t>("turn"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(kernel_gradient, KernelGradient,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Ret<Array>()
                                  .Attr<int64_t>("stride")
                                  .Attr<int64_t>("padding")
                                  .Attr<int64_t>("groups"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(sparse_convolve, SparseConvolve,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Edges>()
                                  .Ret<Array>()
                                  .Attr<int64_t>("padding")
                                  .Attr<int64_t>("transposed"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(values_gradient, ValuesGradient,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Edges>()
                                  .Ret<Array>()
                                  .Attr<int64_t>("padding"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(weighted_sum, WeightedSum,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .RemainingArgs()
                                  .Ret<Array>()
                                  .Attr<int64_t>("relu"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(weights_gradients, WeightsGradients,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .RemainingArgs()
                                  .Ret<Array>()
                                  .Ret<Array>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    map_moments, MapMoments,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Array>().Arg<Array>().Ret<Array>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(gradient_moments, GradientMoments,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .RemainingArgs()
                                  .Ret<Array>()
                                  .Attr<float>("limit"));
