// How blocks of strided matrices reach shared memory. No torch.
#pragma once

#include <cape/tiles.cuh>

namespace cape::cuda {

// Copy the [depth x tile] block at `data` (`depth` and `extent` numbers are left in k and i; the rest becomes zero).
// `wide`: 16 bytes at a time, for a matrix whose numbers are next to each other where the layout's are.
template <class Layout, int kThreads, typename scalar>
__device__ __forceinline__ void fill_block(scalar* to, const scalar* data, int64_t k_stride, int64_t i_stride,
                                           int64_t depth, int64_t extent, bool wide) {
  constexpr int kTile = Layout::kTile, kDepth = Layout::kDepth;
  if (wide) {
    constexpr int kPer = 16 / int(sizeof(scalar));
    constexpr int kMinor = (Layout::kMinorIsK ? kDepth : kTile) / kPer, kMajor = Layout::kMinorIsK ? kTile : kDepth;
    const int64_t stride = Layout::kMinorIsK ? i_stride : k_stride;
    const int64_t minors = Layout::kMinorIsK ? depth : extent, majors = Layout::kMinorIsK ? extent : depth;
#pragma unroll
    for (int e = int(threadIdx.x); e < kMinor * kMajor; e += kThreads) {
      const int major = e / kMinor, minor = e % kMinor * kPer;
      const int64_t left = major < majors ? minors - minor : 0;
      const int valid = left <= 0 ? 0 : left < kPer ? int(left) : kPer;
      copy_async<16>(to + major * Layout::kLead + minor, valid > 0 ? data + major * stride + minor : data,
                     valid * int(sizeof(scalar)));
    }
    return;
  }
  const bool along_k = k_stride < i_stride;  // neighbouring threads read the nearer neighbours
#pragma unroll 4
  for (int e = int(threadIdx.x); e < kTile * kDepth; e += kThreads) {
    const int k = along_k ? e % kDepth : e / kTile, i = along_k ? e / kDepth : e % kTile;
    const bool inside = k < depth && i < extent;
    copy_async<sizeof(scalar)>(to + k * Layout::kStepK + i * Layout::kStepI,
                               inside ? data + k * k_stride + i * i_stride : data, inside ? int(sizeof(scalar)) : 0);
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
