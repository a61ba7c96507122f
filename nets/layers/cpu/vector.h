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

inline float sum(Vector v) {
  v += exchange<1>(v);
  v += exchange<2>(v);
  v += exchange<4>(v);
  if constexpr (kLanes == 16) v += exchange<8>(v);
  return v[0];
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

// Writes the transpose of in (rows, columns) to out; the distances between rows are
// in_step and out_step. Reads and writes nothing outside of the two blocks.
inline void transpose(const float* in, Index in_step, Index rows, Index columns,
                      float* out, Index out_step) {
  for (Index i = 0; i < rows; i += kLanes)
    for (Index j = 0; j < columns; j += kLanes) {
      const Index m = rows - i < kLanes ? rows - i : kLanes;
      const Index n = columns - j < kLanes ? columns - j : kLanes;
      Vector block[kLanes] = {};
      const float* from = in + i * in_step + j;
      float* to = out + j * out_step + i;
      if (n == kLanes && m == kLanes) {
        UNROLL for (int r = 0; r < kLanes; r++) block[r] = load(from + r * in_step);
        transpose(block);
        UNROLL for (int r = 0; r < kLanes; r++) store(to + r * out_step, block[r]);
      } else {
        for (Index r = 0; r < m; r++)
          std::memcpy(&block[r], from + r * in_step, sizeof(float) * static_cast<size_t>(n));
        transpose(block);
        for (Index r = 0; r < n; r++) store(to + r * out_step, block[r], m);
      }
    }
}
