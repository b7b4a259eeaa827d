// CUDA kernels of || A^T G ||_F^2 per sample of a linear map, A [B, T, d] and G [K, B, T, p] (K cotangents share A).
// No torch: Launch is what runs kernels and lends memory (a CUDA stream in cuda/launch.h, a processor in the tests).
#pragma once

#include <type_traits>
#include <utility>

#include <cape/time_model.h>
#include <cape/operands.cuh>
#include <cape/products.cuh>

namespace cape::cuda {

template <typename scalar>
struct LinearProblem {
  const scalar *a, *g;
  int64_t a_batch, a_row, a_col;               // strides of a [batch, length, d]
  int64_t g_cotangent, g_batch, g_row, g_col;  // strides of g [cotangents, batch, length, p]
  int64_t cotangents, batch, length, d, p;
};

template <bool minor_is_k, int tile, int depth>
using LayoutOf = std::conditional_t<minor_is_k, NextToK<tile, depth>, NextToI<tile, depth>>;

// k runs over positions, i and j over the features of x and y.
template <typename scalar, bool minor_is_k>
struct LinearDirect {
  Side<scalar> x, y;
  int64_t length;

  template <class Tile>
  __host__ __device__ int slices() const {
    return int(ceil_div(length, int64_t(Tile::kDepth)));
  }
  template <class Tile>
  __device__ __forceinline__ auto left(int cotangent, int unit, int64_t i0) const {
    return x.template block<Tile, LayoutOf<minor_is_k, Tile::kTileRows, Tile::kDepth>>(cotangent, unit, i0, length);
  }
  template <class Tile>
  __device__ __forceinline__ auto right(int cotangent, int unit, int64_t j0) const {
    return y.template block<Tile, LayoutOf<minor_is_k, Tile::kTileCols, Tile::kDepth>>(cotangent, unit, j0, length);
  }
  __device__ __forceinline__ int64_t rows() const { return x.extent; }
  __device__ __forceinline__ int64_t cols() const { return y.extent; }
  template <class Tile>
  static constexpr size_t shared() {
    return kStages * sizeof(scalar) *
           (LayoutOf<minor_is_k, Tile::kTileRows, Tile::kDepth>::kSize +
            LayoutOf<minor_is_k, Tile::kTileCols, Tile::kDepth>::kSize);
  }
};

// k runs over features, i and j over positions.
template <typename scalar, bool minor_is_k>
struct LinearGram {
  Side<scalar> x, y;
  int64_t d, p;

  template <class Tile>
  using Layout = LayoutOf<minor_is_k, Tile::kTileRows, Tile::kDepth>;
  template <class Tile>
  __device__ __forceinline__ void left_gram(Tile& tile, int unit, int64_t i0, int64_t j0) const {
    multiply(tile, x.template block<Tile, Layout<Tile>>(0, unit, i0, d),
             x.template block<Tile, Layout<Tile>>(0, unit, j0, d), 0, int(ceil_div(d, int64_t(Tile::kDepth))),
             i0 == j0);
  }
  template <class Tile>
  __device__ __forceinline__ int right_slices() const {
    return int(ceil_div(p, int64_t(Tile::kDepth)));
  }
  template <class Tile>
  __device__ __forceinline__ auto right(int cotangent, int unit, int64_t i0) const {
    return y.template block<Tile, Layout<Tile>>(cotangent, unit, i0, p);
  }
  __device__ __forceinline__ int64_t positions() const { return x.extent; }
  template <class Tile>
  static constexpr size_t shared() {
    return kStages * sizeof(scalar) * 2 * Layout<Tile>::kSize;
  }
};

constexpr int kRowThreads = 128;

// One position: a rank-one gradient, whose norm is a product of two norms. Block (cotangent, sample).
template <typename scalar>
__global__ void __launch_bounds__(kRowThreads) row_products(const LinearProblem<scalar> q, double* __restrict__ out) {
  const int64_t b = blockIdx.x % q.batch, k = blockIdx.x / q.batch;
  const scalar* const a = q.a + b * q.a_batch;
  const scalar* const g = q.g + k * q.g_cotangent + b * q.g_batch;
  double left = 0.0, right = 0.0;
  for (int64_t i = threadIdx.x; i < q.d; i += kRowThreads) left += double(a[i * q.a_col]) * double(a[i * q.a_col]);
  for (int64_t i = threadIdx.x; i < q.p; i += kRowThreads) right += double(g[i * q.g_col]) * double(g[i * q.g_col]);
  left = block_sum<kRowThreads>(left);
  right = block_sum<kRowThreads>(right);
  if (threadIdx.x == 0) out[blockIdx.x] = left * right;
}

enum class LinearForm { automatic, direct, gram };
enum class TileKind { tensor64, tensor128, narrow };  // narrow: 64 x 16 (direct) or 16 x 16 (Gram) multiply-adds

struct LinearChoice {
  LinearForm form;
  TileKind tile;
};

// The fastest form and tile by the time model; `form` may fix the form.
inline LinearChoice choose_linear(const TimeModel& m, int64_t cotangents, int64_t batch, int64_t length, int64_t d,
                                  int64_t p, Precision precision, bool float64, double processors, LinearForm form) {
  LinearChoice best{LinearForm::direct, TileKind::tensor64};
  double least = -1.0;
  const auto consider = [&](LinearForm f, TileKind kind, double blocks, double macs, double moved, bool tensor) {
    if (form != LinearForm::automatic && form != f) return;
    const double seconds =
        m.seconds(blocks, processors, macs, rate_of(m, precision, tensor, float64), moved / 4.0, m.copies);
    if (least < 0.0 || seconds < least) least = seconds, best = {f, kind};
  };
  const auto direct = [&](TileKind kind, int64_t rows, int64_t cols, bool tensor) {
    const double k = double(ceil_div(length, int64_t(32)) * 32);
    const int64_t blocks = cotangents * batch * ceil_div(d, rows) * ceil_div(p, cols);
    const double splits = double(direct_splits(blocks, ceil_div(length, int64_t(32)), int64_t(processors)));
    consider(LinearForm::direct, kind, double(blocks) * splits, double(rows * cols) * k / splits,
             double(rows + cols) * k / splits, tensor);
  };
  const auto gram = [&](TileKind kind, int64_t tile, bool tensor) {
    const double k = double(ceil_div(d, int64_t(32)) * 32 + cotangents * ceil_div(p, int64_t(32)) * 32);
    const double blocks = double(batch) * double(lower_tiles(length, tile));
    consider(LinearForm::gram, kind, blocks, double(tile * tile) * k, 2.0 * double(tile) * k, tensor);
  };
  // Float64 has no tensor-core tile: its 64 x 64 tile runs on multiply-adds.
  direct(TileKind::tensor64, 64, 64, true);
  if (!float64 && std::max(d, p) > 256) direct(TileKind::tensor128, 128, 128, true);
  direct(TileKind::narrow, d < p ? 16 : 64, d < p ? 64 : 16, false);
  gram(TileKind::tensor64, 64, true);
  if (!float64 && length > 256) gram(TileKind::tensor128, 128, true);
  gram(TileKind::narrow, 16, false);
  return best;
}

template <class Tile, bool minor_is_k, class Launch, typename scalar>
void run_linear_direct(Launch& launch, const LinearProblem<scalar>& q, Side<scalar> x, Side<scalar> y, double* out) {
  using Source = LinearDirect<scalar, minor_is_k>;
  const int64_t across = ceil_div(y.extent, int64_t(Tile::kTileCols));
  const int64_t tiles = ceil_div(x.extent, int64_t(Tile::kTileRows)) * across, rows = q.cotangents * q.batch;
  double* const partials = tiles == 1 ? out : launch.doubles(rows * tiles);
  run_direct<Tile>(launch, Source{x, y, q.length}, ceil_div(q.length, int64_t(Tile::kDepth)), tiles, across, q.batch,
                   q.cotangents, Source::template shared<Tile>(), partials);
  if (tiles > 1) finish(launch, partials, rows, tiles, true, out);
}

template <class Tile, bool minor_is_k, class Launch, typename scalar>
void run_linear_gram(Launch& launch, const LinearProblem<scalar>& q, Side<scalar> x, Side<scalar> y, double* out) {
  using Source = LinearGram<scalar, minor_is_k>;
  const int64_t tiles = lower_tiles(q.length, Tile::kTileRows), rows = q.cotangents * q.batch;
  const int64_t chunk = cotangent_chunk(q.cotangents, q.batch * tiles, launch.processors());
  double* const partials = tiles == 1 ? out : launch.doubles(rows * tiles);
  launch.run(gram_products<Tile, Source>, q.batch * tiles * ceil_div(q.cotangents, chunk), Tile::kThreads,
             Source::template shared<Tile>(), Source{x, y, q.d, q.p}, int(tiles), 0, int(q.batch), int(q.cotangents),
             int(chunk), partials);
  if (tiles > 1) finish(launch, partials, rows, tiles, true, out);
}

template <Precision precision, bool minor_is_k, class Launch, typename scalar>
void run_linear(Launch& launch, const LinearProblem<scalar>& q, LinearChoice choice, double* out) {
  constexpr bool float64 = sizeof(scalar) == 8;
  const bool gram = choice.form == LinearForm::gram;
  // Gram contracts features, direct positions.
  const int64_t a_k = gram ? q.a_col : q.a_row, a_i = gram ? q.a_row : q.a_col;
  const int64_t g_k = gram ? q.g_col : q.g_row, g_i = gram ? q.g_row : q.g_col;
  const auto wide = [](const scalar* data, int64_t k, int64_t i, int64_t u, int64_t c) {
    return Side<scalar>::aligned(data, minor_is_k ? k : i, minor_is_k ? i : k, u, c);
  };
  const Side<scalar> x{q.a, 0, q.a_batch, a_k, a_i, gram ? q.length : q.d, wide(q.a, a_k, a_i, q.a_batch, 0)};
  const Side<scalar> y{
      q.g, q.g_cotangent, q.g_batch, g_k, g_i, gram ? q.length : q.p, wide(q.g, g_k, g_i, q.g_batch, q.g_cotangent)};
  if (gram) {
    if (choice.tile == TileKind::narrow) {
      run_linear_gram<SimtTile<scalar, 16, 16, 64>, minor_is_k>(launch, q, x, y, out);
    } else if constexpr (float64) {
      run_linear_gram<SimtTile<scalar, 64, 64, 16>, minor_is_k>(launch, q, x, y, out);
    } else if (choice.tile == TileKind::tensor64) {
      run_linear_gram<MmaTile<precision, 64, 32>, minor_is_k>(launch, q, x, y, out);
    } else {
      run_linear_gram<MmaTile<precision, 128, 16>, minor_is_k>(launch, q, x, y, out);
    }
  } else if (choice.tile == TileKind::narrow) {
    const bool swap = q.d < q.p;  // the narrow side goes across
    run_linear_direct<SimtTile<scalar, 64, 16, 32>, minor_is_k>(launch, q, swap ? y : x, swap ? x : y, out);
  } else if constexpr (float64) {
    run_linear_direct<SimtTile<scalar, 64, 64, 16>, minor_is_k>(launch, q, x, y, out);
  } else if (choice.tile == TileKind::tensor64) {
    run_linear_direct<MmaTile<precision, 64, 32>, minor_is_k>(launch, q, x, y, out);
  } else {
    run_linear_direct<MmaTile<precision, 128, 16>, minor_is_k>(launch, q, x, y, out);
  }
}

template <class Launch, typename scalar>
void run_linear_as(Launch& launch, const LinearProblem<scalar>& q, Precision precision, LinearChoice choice,
                   double* out) {
  const bool gram = choice.form == LinearForm::gram;
  const bool minor_is_k = gram ? q.a_col == 1 && q.g_col == 1 : q.a_row == 1 && q.g_row == 1;
  const auto run = [&](auto precision_constant) {
    constexpr Precision kPrecision = decltype(precision_constant)::value;
    if (minor_is_k) {
      run_linear<kPrecision, true>(launch, q, choice, out);
    } else {
      run_linear<kPrecision, false>(launch, q, choice, out);
    }
  };
  if constexpr (sizeof(scalar) == 8) {
    run(std::integral_constant<Precision, Precision::float32>());
  } else if (precision == Precision::float32) {
    run(std::integral_constant<Precision, Precision::float32>());
  } else if (precision == Precision::tf32) {
    run(std::integral_constant<Precision, Precision::tf32>());
  } else {
    run(std::integral_constant<Precision, Precision::bf16>());
  }
}

// out [cotangents, batch] = || A_b^T G_kb ||_F^2. Every size must be at least one.
template <class Launch, typename scalar>
void linear_sq_norms(Launch& launch, const LinearProblem<scalar>& q, Precision precision, LinearForm form,
                     double* out) {
  if (q.length == 1 && form == LinearForm::automatic) {
    launch.run(row_products<scalar>, q.cotangents * q.batch, kRowThreads, 0, q, out);
    return;
  }
  const LinearChoice choice = choose_linear(time_model(), q.cotangents, q.batch, q.length, q.d, q.p, precision,
                                            sizeof(scalar) == 8, double(launch.processors()), form);
  run_linear_as(launch, q, precision, choice, out);
}

}  // namespace cape::cuda
