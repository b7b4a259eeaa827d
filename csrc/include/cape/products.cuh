// The two forms of || A^T G ||_F^2 for any operands: what linear maps and convolutions have in common. No torch.
//
// A *unit* is a sample, or one group of a sample's convolution. A Source says where a unit's operands are:
//
//   direct form   slices(), left(cotangent, unit, i0), right(cotangent, unit, j0), rows(), cols()
//   Gram form     left_gram(tile, unit, i0, j0), right(cotangent, unit, i0), right_slices(), positions()
//
// and an operand copies slice s of its [depth x tile] block to shared memory and hands out fragments of it:
// size(), fill(shared, s), and left(shared) or right(shared).
#pragma once

#include <algorithm>

#include <cape/tiles.cuh>

namespace cape::cuda {

constexpr int kStages = 3;  // slices in shared memory: one in use, two on their way

// Add X^T Y over slices [first, last) to the tile. Where both operands are the same block (`same`), it is copied once.
template <class Tile, class Left, class Right>
__device__ __forceinline__ void multiply(Tile& tile, const Left& left, const Right& right, int first, int last,
                                         bool same) {
  using scalar = typename Tile::scalar;
  scalar* const shared = reinterpret_cast<scalar*>(dynamic_shared());
  const int middle = left.size(), stage = middle + (same ? 0 : right.size());
  const auto fill = [&](int slice) {
    if (slice < last) {
      scalar* const to = shared + slice % kStages * stage;
      left.fill(to, slice);
      if (!same) right.fill(to + middle, slice);
    }
    commit_copies();  // an empty group keeps the count
  };
  __syncthreads();  // what an earlier product left in shared memory has been read
#pragma unroll 1
  for (int s = first; s < first + kStages - 1; ++s) fill(s);
#pragma unroll 1
  for (int s = first; s < last; ++s) {
    wait_copies<kStages - 2>();
    __syncthreads();  // slice s is there for all threads, and all are done with slice s - 1
    fill(s + kStages - 1);
    const scalar* const from = shared + s % kStages * stage;
    tile.add(left.left(from), right.right(same ? from : from + middle));
  }
  wait_copies<0>();
}

// Block (unit, cotangent, tile, split): the sum of squares of one tile of A^T G. Blocks of all cotangents of a unit
// follow one another, so that A comes from the cache. partials [cotangents, units, tiles].
//
// Where there are too few tiles to fill the device, positions are cut into `splits` runs: each block leaves its part of
// the tile in parts [splits, cotangents, units, tiles, numbers of a tile], and split_squares adds and squares them.
template <class Tile, class Source>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kDirectBlocks)
    direct_squares(const Source source, int tiles, int across, int units, int cotangents, int splits,
                   typename Tile::scalar* __restrict__ parts, double* __restrict__ partials) {
  const int split = int(blockIdx.x) % splits, block = int(blockIdx.x) / splits;
  const int index = block % tiles, rest = block / tiles;
  const int cotangent = rest % cotangents, unit = rest / cotangents;
  const int64_t i0 = int64_t(index / across) * Tile::kTileRows, j0 = int64_t(index % across) * Tile::kTileCols;
  const int slices = source.template slices<Tile>(), run = ceil_div(slices, splits), first = split * run;
  Tile tile;
  multiply(tile, source.template left<Tile>(cotangent, unit, i0), source.template right<Tile>(cotangent, unit, j0),
           first, first + run < slices ? first + run : slices, false);
  const int64_t at = (int64_t(cotangent) * units + unit) * tiles + index;
  constexpr int kNumbers = Tile::kTileRows * Tile::kTileCols;
  if (splits > 1) parts += (int64_t(split) * cotangents * units * tiles + at) * kNumbers;
  double sum = 0.0;
#pragma unroll
  for (int m = 0; m < Tile::kRows; ++m) {
#pragma unroll
    for (int n = 0; n < Tile::kCols; ++n) {
      const bool inside = i0 + Tile::row(m) < source.rows() && j0 + Tile::col(n) < source.cols();
      const auto number = inside ? tile.at(m, n) : typename Tile::scalar(0);
      if (splits > 1) {
        parts[(m * Tile::kCols + n) * Tile::kThreads + int(threadIdx.x)] = number;
      } else {
        sum += double(number) * double(number);
      }
    }
  }
  if (splits > 1) return;
  sum = block_sum<Tile::kThreads>(sum);
  if (threadIdx.x == 0) partials[at] = sum;
}

constexpr int kSplitThreads = 256;

// Block per tile: partials [tiles] = sum over numbers of (sum over splits of parts [splits, tiles, numbers]) squared.
template <typename scalar>
__global__ void __launch_bounds__(kSplitThreads)
    split_squares(const scalar* __restrict__ parts, int splits, int numbers, double* __restrict__ partials) {
  double sum = 0.0;
  for (int e = int(threadIdx.x); e < numbers; e += kSplitThreads) {
    double number = 0.0;
    for (int split = 0; split < splits; ++split) {
      number += double(parts[(int64_t(split) * gridDim.x + blockIdx.x) * numbers + e]);
    }
    sum += number * number;
  }
  sum = block_sum<kSplitThreads>(sum);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

// Row and column of tile `index` among the tiles on and below the diagonal.
__device__ __forceinline__ void lower_tile(int index, int* row, int* col) {
  int i = int((sqrt(8.0 * double(index) + 1.0) - 1.0) / 2.0);
  while (int64_t(i + 1) * (i + 2) / 2 <= index) ++i;  // the square root may be off by one
  while (int64_t(i) * (i + 1) / 2 > index) --i;
  *row = i;
  *col = int(index - int64_t(i) * (i + 1) / 2);
}

// Block (unit, chunk of cotangents, tile): one tile of A A^T stays in registers, every cotangent's tile of G G^T is
// multiplied with it. Only the lower triangle is summed: the diagonal once, the rest twice. `units` counts all units,
// the launch may cover only those from `first_unit`. partials [cotangents, units, tiles].
template <class Tile, class Source>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kGramBlocks)
    gram_products(const Source source, int tiles, int first_unit, int units, int cotangents, int chunk,
                  double* __restrict__ partials) {
  const int block = int(blockIdx.x), index = block % tiles, rest = block / tiles;
  const int chunks = ceil_div(cotangents, chunk), first = rest % chunks * chunk, unit = first_unit + rest / chunks;
  int row_tile, col_tile;
  lower_tile(index, &row_tile, &col_tile);
  const int64_t i0 = int64_t(row_tile) * Tile::kTileRows, j0 = int64_t(col_tile) * Tile::kTileRows;
  const bool same = row_tile == col_tile;
  Tile left;
  source.template left_gram<Tile>(left, unit, i0, j0);
  for (int cotangent = first; cotangent < cotangents && cotangent < first + chunk; ++cotangent) {
    Tile right;
    multiply(right, source.template right<Tile>(cotangent, unit, i0), source.template right<Tile>(cotangent, unit, j0),
             0, source.template right_slices<Tile>(), same);
    double once = 0.0, twice = 0.0;
#pragma unroll
    for (int m = 0; m < Tile::kRows; ++m) {
#pragma unroll
      for (int n = 0; n < Tile::kCols; ++n) {
        const int64_t i = i0 + Tile::row(m), j = j0 + Tile::col(n);
        if (i >= source.positions() || j > i) continue;
        const double product = double(left.at(m, n)) * double(right.at(m, n));
        if (j == i) {
          once += product;
        } else {
          twice += product;
        }
      }
    }
    const double sum = block_sum<Tile::kThreads>(once + 2.0 * twice);
    if (threadIdx.x == 0) {
      partials[(int64_t(cotangent) * units + unit) * tiles + index] = tiles == 1 ? clamp_at_zero(sum) : sum;
    }
  }
}

// Block (unit, tile): the lower triangle of X^T X itself, to grams [units, n, n]; what the shifted Gram form gathers.
template <class Tile, class Source>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kDirectBlocks)
    store_gram(const Source source, int tiles, int first_unit, typename Tile::scalar* __restrict__ grams) {
  const int index = int(blockIdx.x) % tiles, unit = int(blockIdx.x) / tiles;
  int row_tile, col_tile;
  lower_tile(index, &row_tile, &col_tile);
  const int64_t i0 = int64_t(row_tile) * Tile::kTileRows, j0 = int64_t(col_tile) * Tile::kTileRows;
  const int64_t n_pixels = source.pixels();
  Tile tile;
  multiply(tile, source.template pixels_of<Tile>(first_unit + unit, i0),
           source.template pixels_of<Tile>(first_unit + unit, j0), 0, source.template pixel_slices<Tile>(),
           row_tile == col_tile);
#pragma unroll
  for (int m = 0; m < Tile::kRows; ++m) {
#pragma unroll
    for (int n = 0; n < Tile::kCols; ++n) {
      const int64_t i = i0 + Tile::row(m), j = j0 + Tile::col(n);
      if (i < n_pixels && j <= i) grams[(int64_t(unit) * n_pixels + i) * n_pixels + j] = tile.at(m, n);
    }
  }
}

// Number of tiles on and below the diagonal.
inline int64_t lower_tiles(int64_t n, int64_t tile) { return ceil_div(n, tile) * (ceil_div(n, tile) + 1) / 2; }

// Runs of positions per tile of the direct form: one, unless there are too few tiles and many slices.
inline int64_t direct_splits(int64_t blocks, int64_t slices, int64_t processors) {
  if (blocks >= processors || slices < 16) return 1;
  const int64_t splits = std::min(ceil_div(2 * processors, blocks), slices / 8);
  return ceil_div(slices, ceil_div(slices, splits));  // none of them empty
}

// The direct form of all units.
template <class Tile, class Source, class Launch>
void run_direct(Launch& launch, const Source& source, int64_t slices, int64_t tiles, int64_t across, int64_t units,
                int64_t cotangents, size_t shared, double* partials) {
  using scalar = typename Tile::scalar;
  constexpr int64_t kNumbers = Tile::kTileRows * Tile::kTileCols;
  const int64_t blocks = cotangents * units * tiles, splits = direct_splits(blocks, slices, launch.processors());
  scalar* const parts = splits == 1 ? nullptr : launch.template scratch<scalar>(splits * blocks * kNumbers);
  launch.run(direct_squares<Tile, Source>, blocks * splits, Tile::kThreads, shared, source, int(tiles), int(across),
             int(units), int(cotangents), int(splits), parts, partials);
  if (splits > 1) {
    launch.run(split_squares<scalar>, blocks, kSplitThreads, 0, parts, int(splits), int(kNumbers), partials);
  }
}

// Cotangents that one Gram block runs through: all, unless that leaves the device idle.
inline int64_t cotangent_chunk(int64_t cotangents, int64_t blocks, int64_t processors) {
  int64_t chunks = ceil_div(4 * processors, blocks < 1 ? int64_t(1) : blocks);
  if (chunks > cotangents) chunks = cotangents;
  return ceil_div(cotangents, chunks);
}

}  // namespace cape::cuda
