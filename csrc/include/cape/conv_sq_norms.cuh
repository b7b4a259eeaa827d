// CUDA kernels of the squared norm of a convolution's weight gradient per sample: the choice among forms, and their
// launches. No torch: Launch is what runs kernels and lends memory (a CUDA stream in cuda/launch.h, a processor in the
// tests).
//
//   direct   (U^T G), im2col formed slice by slice in shared memory (from patches of the input, halo included)
//   gram     UU^T o GG^T over positions, for few of them
//   shifted  the same with UU^T gathered from the Gram matrix of pixels: no work grows with the taps but the gathering
//   narrow   one dot product per (output, channel, tap), for depthwise and other narrow groups
#pragma once

#include <type_traits>

#include <cape/time_model.h>
#include <cape/conv_sources.cuh>

namespace cape::cuda {

enum class ConvForm { automatic, direct, gram, shifted, narrow };

template <typename scalar>
struct ConvProblem {
  ConvShape shape;
  ConvData<scalar> data;
  int64_t cotangents, batch;
  int64_t units() const { return batch * shape.groups; }
  int64_t pixels() const { return shape.frames * shape.pixels(); }
};

constexpr int64_t kScratchBytes = int64_t(256) << 20;  // of pixel Gram matrices at a time
constexpr int64_t kGramBytes = int64_t(64) << 20;      // of one: larger ones are never the fastest

// How the direct form cuts the output into slices of at most `depth` positions: as few as possible, then the smallest
// patch.
inline SliceShape slice_shape(const ConvShape& c, int64_t depth, int64_t tile_rows) {
  SliceShape best{};
  int64_t fewest = -1, smallest = -1;
  for (int64_t cols = std::min(depth, c.out[2]); cols >= 1; --cols) {
    const int64_t rows = std::min(depth / cols, c.out[1]);
    const int64_t down = ceil_div(c.out[1], rows), across = ceil_div(c.out[2], cols);
    const int64_t patch_rows = (rows - 1) * c.stride[1] + (c.kernel[1] - 1) * c.dilation[1] + 1;
    int64_t patch_cols = (cols - 1) * c.stride[2] + (c.kernel[2] - 1) * c.dilation[2] + 1;
    // Neighbouring rows of a patch should start in banks of their own.
    if (patch_rows > 1) patch_cols += patch_cols % 32 < 8 ? 8 - patch_cols % 32 : 0;
    const int64_t patch = c.kernel[0] * patch_rows * patch_cols;
    if (fewest >= 0 && (down * across > fewest || (down * across == fewest && patch >= smallest))) continue;
    fewest = down * across, smallest = patch;
    const int64_t channels = std::min(c.group_channels(), (tile_rows - 1 + c.taps() - 1) / c.taps() + 1);
    best = {int(rows),
            int(cols),
            int(down),
            int(across),
            int(patch_rows),
            int(patch_cols),
            int(patch),
            int(channels),
            FastDivision(cols),
            FastDivision(patch),
            FastDivision(patch_rows * patch_cols),
            FastDivision(patch_cols),
            FastDivision(c.out[0] * down * across),
            FastDivision(down * across),
            FastDivision(across)};
  }
  return best;
}

template <class Tile>
size_t direct_shared(const SliceShape& s, bool halo) {
  const int64_t left = halo ? ceil_div(int64_t(s.channels) * s.patch, int64_t(4)) * 4
                            : int64_t(NextToK<Tile::kTileRows, Tile::kDepth>::kSize);
  return kStages * sizeof(typename Tile::scalar) * size_t(left + NextToK<Tile::kTileCols, Tile::kDepth>::kSize);
}

// Patches where they fit and are smaller than the windows that they replace.
template <class Tile>
bool use_halo(const SliceShape& s, size_t shared_limit) {
  const int64_t numbers = int64_t(s.channels) * s.patch;
  return numbers < int64_t(Tile::kTileRows) * Tile::kDepth && direct_shared<Tile>(s, true) <= shared_limit;
}

template <class Tile>
constexpr size_t gram_shared() {
  return kStages * sizeof(typename Tile::scalar) * 2 * NextToI<Tile::kTileRows, Tile::kDepth>::kSize;
}

template <class Tile, bool halo, class Launch, typename scalar>
void run_conv_direct(Launch& launch, const ConvProblem<scalar>& q, const SliceShape& s, double* out) {
  using Source = ConvDirect<scalar, halo>;
  constexpr int64_t per = 16 / int64_t(sizeof(scalar));
  const bool wide = q.data.wide_g && s.cols % per == 0 && q.shape.out[2] % per == 0;
  const int64_t across = ceil_div(q.shape.group_outputs(), int64_t(Tile::kTileCols));
  const int64_t tiles = ceil_div(q.shape.group_channels() * q.shape.taps(), int64_t(Tile::kTileRows)) * across;
  const int64_t rows = q.cotangents * q.batch, each = q.shape.groups * tiles;
  double* const partials = each == 1 ? out : launch.doubles(rows * each);
  run_direct<Tile>(launch, Source{q.data, s, wide}, q.shape.frames * int64_t(s.by_slices.divisor), tiles, across,
                   q.units(), q.cotangents, direct_shared<Tile>(s, halo), partials);
  if (each > 1) finish(launch, partials, rows, each, true, out);
}

template <class Tile, class Launch, typename scalar>
void run_conv_gram(Launch& launch, const ConvProblem<scalar>& q, double* out) {
  using Source = ConvGram<scalar>;
  const int64_t tiles = lower_tiles(q.shape.positions(), Tile::kTileRows), rows = q.cotangents * q.batch;
  const int64_t each = q.shape.groups * tiles;
  const int64_t chunk = cotangent_chunk(q.cotangents, q.units() * tiles, launch.processors());
  double* const partials = each == 1 ? out : launch.doubles(rows * each);
  launch.run(gram_products<Tile, Source>, q.units() * tiles * ceil_div(q.cotangents, chunk), Tile::kThreads,
             gram_shared<Tile>(), Source{q.data}, int(tiles), 0, int(q.units()), int(q.cotangents), int(chunk),
             partials);
  if (each > 1) finish(launch, partials, rows, each, true, out);
}

// As many units at a time as the scratch holds.
template <class Tile, class Launch, typename scalar>
void run_conv_shifted(Launch& launch, const ConvProblem<scalar>& q, double* out) {
  using Source = ConvShiftedGram<scalar>;
  const int64_t pixels = q.pixels(), rows = q.cotangents * q.batch;
  const int64_t tiles = lower_tiles(q.shape.positions(), Tile::kTileRows), each = q.shape.groups * tiles;
  const int64_t pixel_tiles = lower_tiles(pixels, Tile::kTileRows);
  const int64_t step = std::min(q.units(), std::max<int64_t>(1, kScratchBytes / (pixels * pixels * sizeof(scalar))));
  scalar* const grams = launch.template scratch<scalar>(step * pixels * pixels);
  double* const partials = each == 1 ? out : launch.doubles(rows * each);
  for (int64_t first = 0; first < q.units(); first += step) {
    const int64_t units = std::min(step, q.units() - first);
    const int64_t chunk = cotangent_chunk(q.cotangents, units * tiles, launch.processors());
    const Source source{{q.data}, grams, int(first)};
    launch.run(store_gram<Tile, Source>, units * pixel_tiles, Tile::kThreads, gram_shared<Tile>(), source,
               int(pixel_tiles), int(first), grams);
    launch.run(gram_products<Tile, Source>, units * tiles * ceil_div(q.cotangents, chunk), Tile::kThreads,
               gram_shared<Tile>(), source, int(tiles), int(first), int(q.units()), int(q.cotangents), int(chunk),
               partials);
  }
  if (each > 1) finish(launch, partials, rows, each, true, out);
}

template <class Launch, typename scalar>
void run_conv_narrow(Launch& launch, const ConvProblem<scalar>& q, double* out) {
  const bool whole = q.shape.positions() > 4096;  // a block per dot product, else a warp
  const int64_t tasks = q.shape.outputs * q.shape.group_channels();
  const int64_t tiles = whole ? tasks : ceil_div(tasks, int64_t(kDotThreads / 32)), rows = q.cotangents * q.batch;
  double* const partials = tiles == 1 ? out : launch.doubles(rows * tiles);
  launch.run(whole ? dot_squares<scalar, kDotThreads> : dot_squares<scalar, 32>, rows * tiles, kDotThreads, 0, q.data,
             int(q.batch), int(tiles), partials);
  if (tiles > 1) finish(launch, partials, rows, tiles, true, out);
}

template <Precision precision, typename scalar>
struct ConvTiles {
  using Direct = MmaTile<precision, 64, 32>;
  using DirectLarge = MmaTile<precision, 128, 32>;
  using Gram = MmaTile<precision, 64, 32>;
};
template <Precision precision>
struct ConvTiles<precision, double> {
  using Direct = SimtTile<double, 64, 64, 16>;
  using DirectLarge = Direct;
  using Gram = Direct;
};

struct ConvChoice {
  ConvForm form;
  bool large;  // 128 x 128 tiles (direct form)
};

// The fastest form by the time model; `form` may fix it.
template <class Tiles, typename scalar>
ConvChoice choose_conv(const TimeModel& m, const ConvProblem<scalar>& q, double rate, double processors,
                       size_t shared_limit, ConvForm form) {
  constexpr bool float64 = sizeof(scalar) == 8;
  const ConvShape& c = q.shape;
  const double units = double(q.units()), cotangents = double(q.cotangents), taps = double(c.taps());
  ConvChoice best{ConvForm::direct, false};
  double least = -1.0;
  const auto consider = [&](ConvForm f, bool large, double seconds) {
    if (form != ConvForm::automatic && form != f) return;
    if (least < 0.0 || seconds < least) least = seconds, best = {f, large};
  };
  const auto direct = [&](auto tile_constant, bool large) {
    using Tile = typename decltype(tile_constant)::type;
    constexpr int64_t tile = Tile::kTileRows;
    const SliceShape s = slice_shape(c, Tile::kDepth, tile);
    const bool halo = !float64 && use_halo<Tile>(s, shared_limit);
    if (large && !halo) return;
    const double tiles = double(ceil_div(c.group_channels() * c.taps(), tile) * ceil_div(c.group_outputs(), tile));
    const int64_t slices = c.frames * int64_t(s.by_slices.divisor), blocks = int64_t(units * cotangents * tiles);
    const double splits = double(direct_splits(blocks, slices, int64_t(processors)));
    const double moved = (halo ? double(s.channels) * s.patch : double(tile * Tile::kDepth)) +
                         double(tile * Tile::kDepth) / (q.data.wide_g ? 4.0 : 1.0);
    consider(
        ConvForm::direct, large,
        m.seconds(double(blocks) * splits, processors, double(slices) / splits * double(tile * tile * Tile::kDepth),
                  rate, double(slices) / splits * moved, m.copies));
  };
  direct(std::type_identity<typename Tiles::Direct>(), false);
  if (!float64 && std::max(c.group_channels() * c.taps(), c.group_outputs()) > 256 && c.group_outputs() > 64) {
    direct(std::type_identity<typename Tiles::DirectLarge>(), true);
  }
  using Gram = typename Tiles::Gram;
  constexpr double tile = Gram::kTileRows, depth = Gram::kDepth;
  const double x_depth = depth * double(ceil_div(c.group_channels(), int64_t(Gram::kDepth)));
  const double g_depth = depth * double(ceil_div(c.group_outputs(), int64_t(Gram::kDepth)));
  const double g_moved = 2.0 * tile * cotangents * g_depth / (q.data.wide_g && c.frames == 1 ? 4.0 : 1.0);
  const double tiles = double(lower_tiles(c.positions(), Gram::kTileRows));
  consider(ConvForm::gram, false,
           m.seconds(units * tiles, processors, tile * tile * (taps * x_depth + cotangents * g_depth), rate,
                     2.0 * tile * taps * x_depth + g_moved, m.copies));
  if (form == ConvForm::shifted || q.pixels() * q.pixels() * int64_t(sizeof(scalar)) <= kGramBytes) {
    const double x_moved = 2.0 * tile * x_depth / (q.data.wide_x && c.frames == 1 ? 4.0 : 1.0);
    const double gathering = tile * tile * taps / m.gathers;
    consider(ConvForm::shifted, false,
             m.seconds(units * double(lower_tiles(q.pixels(), Gram::kTileRows)), processors, tile * tile * x_depth,
                       rate, x_moved, m.copies) +
                 m.seconds(units * tiles, processors, tile * tile * cotangents * g_depth, rate,
                           g_moved + gathering * m.copies, m.copies));
  }
  const double dots = cotangents * double(q.batch) * double(c.outputs * c.group_channels());
  consider(ConvForm::narrow, false,
           m.seconds(ceil_div(int64_t(dots), int64_t(8)), processors, 0.0, rate, 8.0 * taps * double(c.positions()),
                     m.gathers));
  return best;
}

template <class Tiles, class Launch, typename scalar>
void run_conv_as(Launch& launch, const ConvProblem<scalar>& q, ConvChoice choice, double* out) {
  using Direct = typename Tiles::Direct;
  using Large = typename Tiles::DirectLarge;
  switch (choice.form) {
    case ConvForm::gram:
      return run_conv_gram<typename Tiles::Gram>(launch, q, out);
    case ConvForm::shifted:
      return run_conv_shifted<typename Tiles::Gram>(launch, q, out);
    case ConvForm::narrow:
      return run_conv_narrow(launch, q, out);
    default:
      break;
  }
  if constexpr (sizeof(scalar) == 4) {
    if (choice.large) {
      return run_conv_direct<Large, true>(launch, q, slice_shape(q.shape, Large::kDepth, Large::kTileRows), out);
    }
  }
  const SliceShape s = slice_shape(q.shape, Direct::kDepth, Direct::kTileRows);
  if constexpr (sizeof(scalar) == 4) {
    if (use_halo<Direct>(s, launch.shared_limit())) return run_conv_direct<Direct, true>(launch, q, s, out);
  }
  run_conv_direct<Direct, false>(launch, q, s, out);
}

// `use(tiles, choice)` with the tiles of the precision and the fastest form; `form` may fix it.
template <typename scalar, class Use>
void with_conv_choice(const ConvProblem<scalar>& q, Precision precision, ConvForm form, int64_t processors,
                      size_t shared_limit, Use use) {
  const auto choose = [&](auto constant) {
    using Tiles = ConvTiles<decltype(constant)::value, scalar>;
    const TimeModel& m = time_model();
    const double rate = rate_of(m, decltype(constant)::value, sizeof(scalar) == 4, sizeof(scalar) == 8);
    use(Tiles(), choose_conv<Tiles>(m, q, rate, double(processors), shared_limit, form));
  };
  if (sizeof(scalar) == 8 || precision == Precision::float32) {
    choose(std::integral_constant<Precision, Precision::float32>());
  } else if (precision == Precision::tf32) {
    choose(std::integral_constant<Precision, Precision::tf32>());
  } else {
    choose(std::integral_constant<Precision, Precision::bf16>());
  }
}

// out [cotangents, batch]. Every size must be at least one, and positions and pixels of a sample below 2^31.
template <class Launch, typename scalar>
void conv_sq_norms(Launch& launch, const ConvProblem<scalar>& q, Precision precision, ConvForm form, double* out) {
  with_conv_choice(q, precision, form, launch.processors(), launch.shared_limit(),
                   [&](auto tiles, ConvChoice choice) { run_conv_as<decltype(tiles)>(launch, q, choice, out); });
}

}  // namespace cape::cuda
