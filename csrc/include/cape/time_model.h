// Which form of a squared norm takes the least time on a GPU. No torch.
//
// A launch of `blocks` equal blocks runs in waves of kResident blocks per multiprocessor:
//
//   seconds = launch + ceil(blocks / (kResident * processors)) * kResident * (macs / rate + moved / copies)
//
// with macs the multiply-accumulates of one block, padding included, `rate` what one multiprocessor sustains in the
// tile's arithmetic, and `moved` the numbers that the block copies to shared memory (a 16-byte copy of four counts as
// one) or gathers. A form is the sum of its launches. benchmarks/calibrate.py fits the constants on a device.
#pragma once

#include <algorithm>
#include <cstdint>

#include <cape/precision.h>

namespace cape::cuda {

struct TimeModel {
  // Starting values from the data sheet of an H100 SXM (132 multiprocessors at 1.7 GHz) at a third to a half of its
  // peaks; no device has confirmed them.
  double launch = 3e-6;         // seconds
  double rate_3xtf32 = 0.3e12;  // multiply-accumulates per second and multiprocessor
  double rate_tf32 = 0.8e12;
  double rate_bf16 = 0.9e12;
  double rate_simt32 = 0.1e12;
  double rate_simt64 = 0.05e12;
  double copies = 15e9;   // asynchronous copies to shared memory per second and multiprocessor
  double gathers = 10e9;  // numbers gathered by the shifted Gram form and by plain dot products
  static constexpr int kResident = 2;

  double seconds(double blocks, double processors, double macs, double rate, double moved, double moved_rate) const {
    const double wave = kResident * processors;
    const double waves = std::max(1.0, double(int64_t((blocks + wave - 1) / wave)));
    return launch + waves * kResident * (macs / rate + moved / moved_rate);
  }
};

// Multiply-accumulates per second and multiprocessor, by tile and precision.
inline double rate_of(const TimeModel& m, Precision precision, bool tensor, bool wide_scalar) {
  if (wide_scalar) return m.rate_simt64;
  if (!tensor) return m.rate_simt32;
  return precision == Precision::float32 ? m.rate_3xtf32 : precision == Precision::tf32 ? m.rate_tf32 : m.rate_bf16;
}

// The model in use by this process; calibration replaces its numbers.
inline TimeModel& time_model() {
  static TimeModel model;
  return model;
}

}  // namespace cape::cuda
