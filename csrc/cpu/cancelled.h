// When a Gram form's terms, which have either sign, leave too few digits of one another.
#pragma once

#include <cape/shapes.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace cape {

// Where no more than this share of the positive terms is left, the direct form, which adds up squares, takes the Gram
// form's place.
template <typename scalar_t>
constexpr double kShareLeft = sizeof(scalar_t) == 4 ? 0.1 : 1e-4;

// Whether a convolution's norm of one sample is what its terms left of one another: x [F, C, *S], g [K, F, O, *L].
template <typename scalar_t>
bool cancelled(const ConvShape& s, const scalar_t* x, const scalar_t* g, int64_t g_step,
               const std::vector<double>& total) {
  const int64_t c = s.group_channels(), p = s.group_outputs(), pixels = s.pixels(), outs = s.out_pixels();
  std::vector<scalar_t> energy(static_cast<size_t>(pixels)), windows(static_cast<size_t>(outs)), weight(windows);
  std::vector<double> positive(static_cast<size_t>(s.cotangents), 0.0);
  const auto add_squares = [](const scalar_t* from, int64_t count, int64_t n, scalar_t* into) {
    std::fill(into, into + n, scalar_t(0));
    for (int64_t i = 0; i < count; ++i, from += n) {
      for (int64_t j = 0; j < n; ++j) into[j] += from[j] * from[j];
    }
  };
  for (int64_t f = 0; f < s.frames; ++f) {
    for (int64_t group = 0; group < s.groups; ++group) {
      add_squares(x + (f * s.channels + group * c) * pixels, c, pixels, energy.data());
      std::fill(windows.begin(), windows.end(), scalar_t(0));
      for (int64_t tap = 0; tap < s.taps(); ++tap) {
        const int64_t place[3] = {tap / (s.kernel[1] * s.kernel[2]), tap / s.kernel[2] % s.kernel[1],
                                  tap % s.kernel[2]};
        int64_t first[3], begin[3], end[3];  // the outputs whose window has this tap inside the image
        for (int i = 0; i < 3; ++i) {
          first[i] = place[i] * s.dilation[i] - s.padding[i];
          begin[i] = first[i] < 0 ? (-first[i] + s.stride[i] - 1) / s.stride[i] : 0;
          end[i] = first[i] < s.size[i] ? std::min(s.out[i], (s.size[i] - 1 - first[i]) / s.stride[i] + 1) : 0;
        }
        for (int64_t z = begin[0]; z < end[0]; ++z) {
          for (int64_t y = begin[1]; y < end[1]; ++y) {
            const scalar_t* from = energy.data() +
                                   ((first[0] + z * s.stride[0]) * s.size[1] + first[1] + y * s.stride[1]) * s.size[2] +
                                   first[2];
            scalar_t* into = windows.data() + (z * s.out[1] + y) * s.out[2];
            for (int64_t q = begin[2]; q < end[2]; ++q) into[q] += from[q * s.stride[2]];
          }
        }
      }
      for (int64_t k = 0; k < s.cotangents; ++k) {
        add_squares(g + k * g_step + (f * s.outputs + group * p) * outs, p, outs, weight.data());
        for (int64_t t = 0; t < outs; ++t)
          positive[size_t(k)] += double(windows[size_t(t)]) * double(weight[size_t(t)]);
      }
    }
  }
  for (int64_t k = 0; k < s.cotangents; ++k) {
    if (total[size_t(k)] < kShareLeft<scalar_t> * positive[size_t(k)]) return true;
  }
  return false;
}

}  // namespace cape
