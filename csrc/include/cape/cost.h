// Which form is the cheapest, and how much scratch memory it takes. Not for the kernels themselves (see shapes.h).
#pragma once

#include <cape/shapes.h>

namespace cape {

constexpr int64_t round_to(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// --- Costs, in vector multiply-adds of one thread. `python -m benchmarks.forms` shows their regret.
// ---------
namespace cost {

// Moving one number while turning rows into columns, copying it along rows, gathering it one by one.
constexpr double kTurn = 0.6, kCopy = 0.15, kGather = 1.5;
// A dot product of short rows runs at about this share of a tile's rate.
constexpr double kNarrow = 6.0;
// Winograd's transforms: per transformed number of either operand, and what leaving the second-level cache costs.
constexpr double kTransform = 0.25;
constexpr double kWinograd = 1.15;

// A product of n rows and m columns, per step of the contracted dimension; tiles too small to hide latency cost four.
inline double product(TileSize tile, int64_t n, int64_t m) {
  const int64_t full = n / tile.rows, rest = n % tile.rows, wide = m / tile.cols(), tail = m % tile.cols();
  const auto one = [](int64_t r, int64_t v) { return r * v < 4 ? 4.0 : double(r * v); };
  const int64_t r = rest > 4 ? 8 : rest > 2 ? 4 : rest, v = tail > tile.width ? 2 : tail ? 1 : 0;
  double total = double(full * wide) * one(tile.rows, 2);
  if (r) total += double(wide) * one(r, 2);
  if (v) total += double(full) * one(tile.rows, v);
  if (r && v) total += one(r, v);
  return total;
}

// The lower triangle of an n x n product, per step of the contracted dimension.
inline double triangle(TileSize tile, int64_t n) {
  return double(n) * 0.5 * double(n + tile.rows + tile.width) / double(tile.width);
}

inline double direct(TileSize tile, const LinearShape& s) {
  const double k = double(s.cotangents), t = double(s.t);
  return k * t * product(tile, s.d, s.p) + kCopy * t * (double(s.d) + k * double(s.p));
}

inline double gram(TileSize tile, const LinearShape& s, double move = kTurn) {
  const double depth = double(s.d) + double(s.cotangents) * double(s.p);
  return depth * (triangle(tile, s.t) + move * double(s.t));
}

inline double direct(TileSize tile, const ConvShape& s) {
  const double k = double(s.cotangents), t = double(s.positions());
  const double one = k * t * double(s.taps()) * product(tile, s.group_channels(), s.group_outputs());
  const double moved = double(s.frames * s.padded_pixels() * s.group_channels()) + k * t * double(s.group_outputs());
  return double(s.groups) * (one + kTurn * moved);
}

inline double gram(TileSize tile, const ConvShape& s) {
  const LinearShape flat{s.positions(), s.group_channels() * s.taps(), s.group_outputs(), s.cotangents, 0};
  return double(s.groups) * (gram(tile, flat, kCopy) + kGather * double(flat.d * flat.t));
}

inline double shifted(TileSize tile, const ConvShape& s) {
  if (!s.dense()) return 1e300;
  const int64_t pitch = s.padded_pixels() / (s.padded(0) * s.padded(1)) * s.padded(1) * s.padded(0);
  const double inputs = double(s.pixels()) * 0.5 * double(pitch + tile.rows + tile.width) / double(tile.width);
  const double outputs = double(s.positions()) * 0.5 * double(pitch + tile.rows + tile.width) / double(tile.width);
  const double k = double(s.cotangents);
  return double(s.groups) * (inputs * double(s.group_channels()) + outputs * k * double(s.group_outputs()) +
                             1.2 * outputs * double(s.taps()));
}

inline double winograd(TileSize tile, const ConvShape& s) {
  if (!s.three_by_three()) return 1e300;
  const double n = double((s.out[1] + 1) / 2) * double((s.out[2] + 1) / 2), k = double(s.cotangents);
  // The transforms take whole vectors of channels, however few there are.
  const double c = double(round_to(s.group_channels(), tile.width)),
               o = double(round_to(s.group_outputs(), tile.width));
  const double products = k * 16.0 * n * product(tile, s.group_channels(), s.group_outputs());
  return double(s.groups) *
         (kWinograd * products + 16.0 * n * kTransform * (c + k * o) + kTurn * 4.0 * n * (c + k * o));
}

inline double channelwise(TileSize tile, const ConvShape& s) {
  if (s.group_channels() != 1 || s.group_outputs() != 1) return 1e300;
  const double t = double(s.positions()), k = double(s.cotangents), blocks = double(round_to(s.channels, tile.width));
  return blocks * t * ((k + 1.0) * double(s.taps()) / double(tile.width) + kTurn * (1.0 + k));
}

inline double narrow(TileSize, const ConvShape& s) {
  return kNarrow * double(s.cotangents) * double(s.positions()) * double(s.taps()) * double(s.channels) *
         double(s.group_outputs()) / 16.0 * 4.0;
}

}  // namespace cost

inline Form choose(TileSize tile, const LinearShape& s) {
  return cost::gram(tile, s) < cost::direct(tile, s) ? Form::gram : Form::direct;
}

inline Form choose(TileSize tile, const ConvShape& s) {
  Form best = Form::direct;
  double least = cost::direct(tile, s);
  const auto offer = [&](Form form, double price) {
    if (price < least) best = form, least = price;
  };
  offer(Form::gram, cost::gram(tile, s));
  offer(Form::shifted, cost::shifted(tile, s));
  offer(Form::winograd, cost::winograd(tile, s));
  offer(Form::channelwise, cost::channelwise(tile, s));
  offer(Form::narrow, cost::narrow(tile, s));
  return best;
}

// --- Scratch: how many numbers and how many offsets a form needs -----------------------------------------------------
struct ScratchSize {
  int64_t values, offsets;
};

// Numbers that the kept tiles of a t x t lower triangle take, padding included.
inline int64_t triangle_values(TileSize tile, int64_t t) {
  return round_to(t, tile.rows) * (t / 2 + tile.rows + tile.cols() + 1);
}

inline ScratchSize scratch_of(TileSize tile, Form form, const LinearShape& s) {
  if (form == Form::direct) return {s.t * (round_to(s.d, tile.rows) + tile.cols()), s.t};
  const int64_t deepest = s.d > s.p ? s.d : s.p;
  return {round_to(s.t, tile.cols()) * deepest + triangle_values(tile, s.t), deepest};
}

inline ScratchSize scratch_of(TileSize tile, Form form, const ConvShape& s) {
  const int64_t t = s.positions(), blocks = round_to(s.group_channels(), tile.width);
  switch (form) {
    case Form::gram: {
      const LinearShape flat{t, s.group_channels() * s.taps(), s.group_outputs(), s.cotangents, 0};
      const ScratchSize inner = scratch_of(tile, Form::gram, flat);
      return {flat.d * t + s.cotangents * flat.p * t + inner.values, inner.offsets};
    }
    case Form::shifted: {
      const int64_t u = round_to(s.padded_pixels(), tile.cols()) + tile.cols();
      const int64_t widest = s.group_channels() > s.group_outputs() ? s.group_channels() : s.group_outputs();
      return {u * (widest + s.padded_pixels()) + triangle_values(tile, u), widest + s.taps()};
    }
    case Form::winograd: {
      const int64_t rows = winograd_tiles(s.out[1]), across = winograd_tiles(s.out[2]), n = rows * across;
      return {(2 * rows + 2) * (2 * across + 2) * tile.width + 16 * n * (blocks + tile.cols()) + 4 * n * tile.cols() +
                  16 * tile.rows * tile.cols(),
              n};
    }
    case Form::channelwise:
      return {(s.frames * s.padded_pixels() + t) * tile.width, t + s.taps()};
    case Form::narrow:
      return {0, 0};
    default:
      return {s.frames * s.padded_pixels() * blocks + t * tile.cols(), t + s.taps()};
  }
}

}  // namespace cape
