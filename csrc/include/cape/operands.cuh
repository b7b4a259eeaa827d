// How blocks of strided matrices reach shared memory. No torch.
#pragma once

#include <cape/tiles.cuh>

namespace cape::cuda {

// Copy the [depth x tile] block at `data` (`depth` and `extent` numbers are left in k and i; the rest becomes zero).
// `wide`: 16 bytes at a time, for a matrix whose numbers are next to each other where the layout's are.
// Every thread keeps one place along the minor side and walks the major side, so that it holds one address.
template <class Layout, int kThreads, typename scalar>
__device__ __forceinline__ void fill_block(scalar* to, const scalar* data, int64_t k_stride, int64_t i_stride,
                                           int64_t depth, int64_t extent, bool wide) {
  constexpr int kTile = Layout::kTile, kDepth = Layout::kDepth, kBytes = int(sizeof(scalar));
  const int k_left = depth < kDepth ? int(depth) : kDepth, i_left = extent < kTile ? int(extent) : kTile;
  if (wide) {
    constexpr int kPer = 16 / kBytes;
    constexpr int kMinor = (Layout::kMinorIsK ? kDepth : kTile) / kPer, kMajor = Layout::kMinorIsK ? kTile : kDepth;
    constexpr int kStep = kThreads / kMinor;
    static_assert(kThreads % kMinor == 0);
    const int64_t stride = Layout::kMinorIsK ? i_stride : k_stride;
    const int minor = int(threadIdx.x) % kMinor * kPer, first = int(threadIdx.x) / kMinor;
    const int left = (Layout::kMinorIsK ? k_left : i_left) - minor, majors = Layout::kMinorIsK ? i_left : k_left;
    const int valid = left <= 0 ? 0 : (left < kPer ? left : kPer) * kBytes;
    const scalar* from = valid > 0 ? data + first * stride + minor : data;
    const int64_t step = valid > 0 ? kStep * stride : 0;
    to += first * Layout::kLead + minor;
#pragma unroll
    for (int n = 0; n < ceil_div(kMajor, kStep); ++n, from += step) {
      const int major = first + n * kStep;
      if (kMajor % kStep != 0 && major >= kMajor) break;
      copy_async<16>(to + n * kStep * Layout::kLead, major < majors ? from : data, major < majors ? valid : 0);
    }
    return;
  }
  if (k_stride < i_stride) {  // neighbouring threads read the nearer neighbours
    const int k = int(threadIdx.x) % kDepth, first = int(threadIdx.x) / kDepth;
    constexpr int kStep = kThreads / kDepth;
    static_assert(kThreads % kDepth == 0 && kTile % kStep == 0);
    const scalar* from = data + (k < k_left ? k : 0) * k_stride + first * i_stride;
    to += k * Layout::kStepK + first * Layout::kStepI;
#pragma unroll 4
    for (int i = first; i < kTile; i += kStep, from += kStep * i_stride, to += kStep * Layout::kStepI) {
      const bool inside = k < k_left && i < i_left;
      copy_async<kBytes>(to, inside ? from : data, inside ? kBytes : 0);
    }
    return;
  }
  const int i = int(threadIdx.x) % kTile, first = int(threadIdx.x) / kTile;
  constexpr int kStep = kThreads / kTile;
  static_assert(kThreads % kTile == 0 && kDepth % kStep == 0);
  const scalar* from = data + (i < i_left ? i : 0) * i_stride + first * k_stride;
  to += i * Layout::kStepI + first * Layout::kStepK;
#pragma unroll 4
  for (int k = first; k < kDepth; k += kStep, from += kStep * k_stride, to += kStep * Layout::kStepK) {
    const bool inside = k < k_left && i < i_left;
    copy_async<kBytes>(to, inside ? from : data, inside ? kBytes : 0);
  }
}

// A strided matrix X(k, i), seen from column i0.
template <class Tile, class Layout>
struct MatrixBlock {
  using scalar = typename Tile::scalar;
  const scalar* data;  // X(0, i0)
  int64_t k_stride, i_stride, depth, extent;
  bool wide;

  __device__ __forceinline__ int size() const { return Layout::kSize; }
  __device__ __forceinline__ void fill(scalar* to, int slice) const {
    const int64_t k0 = int64_t(slice) * Tile::kDepth;
    fill_block<Layout, Tile::kThreads>(to, data + k0 * k_stride, k_stride, i_stride, depth - k0, extent, wide);
  }
  __device__ __forceinline__ auto left(const scalar* shared) const { return Tile::template left<Layout>(shared); }
  __device__ __forceinline__ auto right(const scalar* shared) const { return Tile::template right<Layout>(shared); }
};

// One side of a product per (cotangent, unit): X(k, i) = data[cotangent, unit, k, i].
template <typename scalar>
struct Side {
  const scalar* data;
  int64_t cotangent_stride, unit_stride, k_stride, i_stride, extent;
  bool wide;

  // Whether rows of neighbours (along k or along i) can be copied 16 bytes at a time.
  static bool aligned(const scalar* data, int64_t minor, int64_t a, int64_t b, int64_t c) {
    constexpr int64_t per = 16 / int64_t(sizeof(scalar));
    return minor == 1 && reinterpret_cast<uintptr_t>(data) % 16 == 0 && a % per == 0 && b % per == 0 && c % per == 0;
  }

  template <class Tile, class Layout>
  __device__ __forceinline__ MatrixBlock<Tile, Layout> block(int cotangent, int unit, int64_t i0, int64_t depth) const {
    const scalar* from = data + cotangent * cotangent_stride + unit * unit_stride + i0 * i_stride;
    return {from, k_stride, i_stride, depth, extent - i0, wide};
  }
};

}  // namespace cape::cuda
