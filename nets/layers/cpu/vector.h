// Vectors of floats in the compiler's own types, so that one source serves AVX-512,
// AVX2 and NEON. A type wider than the registers is split by the compiler.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 64")
#endif

#if defined(__AVX512F__)
constexpr int kLanes = 16, kRegisters = 32;
#else
constexpr int kLanes = 8, kRegisters = 16;
#endif

using Vector = float __attribute__((vector_size(4 * kLanes)));
using Lanes = int32_t __attribute__((vector_size(4 * kLanes)));
using Index = std::ptrdiff_t;

inline Vector load(const float* from) {
  Vector v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

// Loads into a register. Without it, GCC may load a vector anew for each of its uses.
inline Vector load_once(const float* from) {
  Vector v = load(from);
#if defined(__AVX__)
  asm("" : "+v"(v));
#endif
  return v;
}

inline void store(float* to, Vector v) { std::memcpy(to, &v, sizeof v); }

// Stores the first `count` lanes, 1 to kLanes.
inline void store(float* to, Vector v, Index count) {
  if (count >= kLanes) return store(to, v);
  std::memcpy(to, &v, sizeof(float) * static_cast<size_t>(count));
}

// Returns the lanes `from(l)` of a and b in one vector; lanes of b count from kLanes.
template <typename From, int... L>
inline Vector shuffle(Vector a, Vector b, From from, std::integer_sequence<int, L...>) {
  (void)from;
#if defined(__clang__)
  return __builtin_shufflevector(a, b, From::lane(L)...);
#else
  return __builtin_shuffle(a, b, Lanes{From::lane(L)...});
#endif
}
template <typename From>
inline Vector shuffle(Vector a, Vector b, From from) {
  return shuffle(a, b, from, std::make_integer_sequence<int, kLanes>());
}

template <int D>
struct Exchanged {  // with the lane whose number differs in the bits of D
  static constexpr int lane(int l) { return l ^ D; }
};
template <int D>
inline Vector exchange(Vector v) {
  if constexpr (D == 0) return v;
  return shuffle(v, v, Exchanged<D>());
}

template <int S>
struct Lower {  // a's lanes without bit S, then b's
  static constexpr int lane(int l) { return l & S ? kLanes + l - S : l; }
};
template <int S>
struct Upper {  // a's lanes with bit S, then b's
  static constexpr int lane(int l) { return l & S ? kLanes + l : l + S; }
};
template <int S = 1>
inline void transpose(Vector* rows) {
  UNROLL for (int i = 0; i < kLanes; i++) {
    if (i & S) continue;
    const Vector a = rows[i], b = rows[i + S];
    rows[i] = shuffle(a, b, Lower<S>());
    rows[i + S] = shuffle(a, b, Upper<S>());
  }
  if constexpr (2 * S < kLanes) transpose<2 * S>(rows);
}

// Returns the sums of kLanes vectors, one in each lane.
template <int S = 1>
inline Vector sums_of(Vector* vectors) {
  UNROLL for (int i = 0; i < kLanes; i += 2 * S) {
    const Vector a = vectors[i], b = vectors[i + S];
    vectors[i] = shuffle(a, b, Lower<S>()) + shuffle(a, b, Upper<S>());
  }
  if constexpr (2 * S < kLanes) return sums_of<2 * S>(vectors);
  return vectors[0];
}

// Writes the transpose of in (rows, columns), at most kLanes each, to out; the distances
// between rows are in_step and out_step. Each row of `in` is readable for `readable`
// floats.
inline void transpose_block(const float* in, Index in_step, Index rows, Index columns,
                            Index readable, float* out, Index out_step) {
  Vector block[kLanes];
  if (rows == kLanes && readable >= kLanes) {
    UNROLL for (int r = 0; r < kLanes; r++) block[r] = load(in + r * in_step);
  } else {
    UNROLL for (int r = 0; r < kLanes; r++) block[r] = Vector{};
    for (Index r = 0; r < rows; r++)
      std::memcpy(&block[r], in + r * in_step, sizeof(float) * static_cast<size_t>(columns));
  }
  transpose(block);
  if (rows == kLanes && columns == kLanes) {
    UNROLL for (int r = 0; r < kLanes; r++) store(out + r * out_step, block[r]);
  } else {
    for (Index r = 0; r < columns; r++) store(out + r * out_step, block[r], rows);
  }
}

// Calls f(begin, size) for blocks of at most kLanes that cover 0 ... count - 1. The last
// one overlaps the one before, if that makes it whole.
template <typename F>
inline void blocks(Index count, const F& f) {
  if (count < kLanes) return f(Index{0}, count);
  for (Index i = 0; i < count; i += kLanes)
    f(i + kLanes <= count ? i : count - kLanes, Index{kLanes});
}

// Maps (pixels, channels) -> planes (channels, pitch).
inline void to_planes(const float* map, Index pixels, Index channels, float* planes,
                      Index pitch) {
  blocks(pixels, [&](Index i, Index rows) {
    blocks(channels, [&](Index c, Index columns) {
      transpose_block(map + i * channels + c, channels, rows, columns, columns,
                      planes + c * pitch + i, pitch);
    });
  });
}

// Planes (channels, pitch) -> maps (pixels, channels). Planes are readable for kLanes
// floats from each pixel on.
inline void from_planes(const float* planes, Index pitch, Index pixels, Index channels,
                        float* map) {
  blocks(pixels, [&](Index i, Index columns) {
    blocks(channels, [&](Index c, Index rows) {
      transpose_block(planes + c * pitch + i, pitch, rows, columns, kLanes,
                      map + i * channels + c, channels);
    });
  });
}
