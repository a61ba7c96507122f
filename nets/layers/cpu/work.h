// What the kernels share: threads, scratch memory, geometry and padded copies.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>

#include "vector.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

// Calls f(item, slot) for each item < count on XLA's own threads. Two calls that run at
// the same time have different slots < slots(pool, count). The calling thread works,
// too, and waits only for items that another thread has started, so that calls from
// within a full pool cannot block each other.
inline Index slots(const ffi::ThreadPool& pool, Index count) {
  return std::max<Index>(1, std::min<Index>(pool.num_threads(), count));
}

template <typename F>
void parallel(ffi::ThreadPool& pool, Index count, const F& f) {
  struct Job {
    std::atomic<Index> next{0}, slots{0}, done{0};
    std::mutex mutex;
    std::condition_variable finished;
  };
  auto job = std::make_shared<Job>();
  // A helper that starts late finds no item left and does not touch f, which may be
  // gone by then.
  auto work = [job, count, &f] {
    Index item = job->next.fetch_add(1);
    if (item >= count) return;
    const Index slot = job->slots.fetch_add(1);
    for (; item < count; item = job->next.fetch_add(1)) {
      f(item, slot);
      if (job->done.fetch_add(1) + 1 < count) continue;
      std::lock_guard<std::mutex> lock(job->mutex);
      job->finished.notify_all();
    }
  };
  for (Index helper = 1; helper < slots(pool, count); helper++) pool.Schedule([work] { work(); });
  work();
  auto is_done = [&] { return job->done.load() >= count; };
  for (int spin = 0; spin < 2000 && !is_done(); spin++) std::atomic_thread_fence(std::memory_order_seq_cst);
  if (is_done()) return;
  std::unique_lock<std::mutex> lock(job->mutex);
  job->finished.wait(lock, is_done);
}

// Floats aligned to cache lines, not initialised; throws std::bad_alloc.
class Floats {
 public:
  explicit Floats(Index count)
      : data_(static_cast<float*>(std::aligned_alloc(
            64, (sizeof(float) * static_cast<size_t>(std::max<Index>(count, 1)) + 63) / 64 * 64))) {
    if (!data_) throw std::bad_alloc();
  }
  float* data() const { return data_.get(); }
  float& operator[](Index i) const { return data_.get()[i]; }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> data_;
};

inline Index divide_up(Index n, Index by) { return (n + by - 1) / by; }
inline Index round_up(Index n, Index to) { return (n + to - 1) / to * to; }

// Calls f<size>, 1 <= size <= N.
template <int N, typename F>
inline void with_size(Index size, const F& f) {
  if constexpr (N > 1)
    if (size < N) return with_size<N - 1>(size, f);
  f(std::integral_constant<int, N>());
}

// Calls f<size>(first) for parts of at most N that cover begin ... end - 1, of nearly
// equal sizes.
template <int N, typename F>
inline void in_parts(Index begin, Index end, const F& f) {
  for (Index size; begin < end; begin += size) {
    const Index count = (end - begin + N - 1) / N;
    size = (end - begin + count - 1) / count;
    with_size<N>(size, [&](auto n) { f(n, begin); });
  }
}

inline void zero(float* to, Index count) {
  if (count > 0) std::memset(to, 0, sizeof(float) * static_cast<size_t>(count));
}
inline void copy(float* to, const float* from, Index count) {
  if (count > 0) std::memcpy(to, from, sizeof(float) * static_cast<size_t>(count));
}

// A map of `height` x `width` pixels with zeros around it. Pixel (0, 0) is in row `top`
// and column `left` of the padded map; both may be negative.
struct Map {
  Index height, width, channels, top = 0, left = 0;
};

// Writes rows first ... first + rows - 1 of the padded map, `columns` pixels each.
// Pixels of the image outside of them are dropped.
inline void pad(const float* image, const Map& map, Index first, Index rows, Index columns,
                float* out) {
  const Index c = map.channels;
  const Index from = std::max<Index>(0, -map.left);  // the first pixel of a row
  const Index count = std::max<Index>(0, std::min(map.width, columns - map.left) - from);
  const Index before = count ? map.left + from : 0;
  for (Index i = first - map.top; i < first - map.top + rows; i++, out += columns * c) {
    const bool inside = i >= 0 && i < map.height;
    const Index n = inside ? count : 0;
    zero(out, before * c);
    copy(out + before * c, image + (inside ? i * map.width + from : 0) * c, n * c);
    zero(out + (before + n) * c, (columns - before - n) * c);
  }
}

// Gradients of parameters are summed in as many pieces as the shapes alone determine,
// so that they do not depend on the number of threads.
inline Index pieces(Index count, Index size) {
  const Index most = std::max<Index>(1, (Index{1} << 22) / std::max<Index>(size, 1));
  return std::min({count, most, Index{16}});
}

// Adds all pieces of `size` floats to the first.
inline void add_pieces(ffi::ThreadPool& pool, float* sums, Index count, Index size) {
  constexpr Index kChunk = 1 << 14;
  parallel(pool, (size + kChunk - 1) / kChunk, [&](Index chunk, Index) {
    const Index from = chunk * kChunk, to = std::min(size, from + kChunk);
    for (Index piece = 1; piece < count; piece++)
      for (Index i = from; i < to; i++) sums[i] += sums[piece * size + i];
  });
}
