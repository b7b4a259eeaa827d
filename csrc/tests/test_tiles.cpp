// Every instruction set that this processor runs, both forms and both precisions, against plain float64 loops; and the
// ways of reading a convolution's windows against each other.
#include <cassert>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include <cape/conv_windows.h>
#include <cape/linear_sq_norms.h>
#include <cape/sample_norms.h>

namespace {

std::mt19937 generator(0);

template <typename scalar>
std::vector<scalar> random_numbers(int64_t n) {
  std::normal_distribution<double> normal;
  std::vector<scalar> v(static_cast<size_t>(n));
  for (auto& x : v) x = scalar(normal(generator));
  return v;
}

template <typename scalar>
double tolerance() {
  return sizeof(scalar) == 4 ? 1e-5 : 1e-12;
}

bool close(double ours, double expected, double tolerance) {
  return std::abs(ours - expected) <= tolerance * std::abs(expected) + 1e-300;
}

template <typename scalar>
double loop(const std::vector<scalar>& a, const std::vector<scalar>& g, int64_t t, int64_t d, int64_t p) {
  double total = 0.0;
  for (int64_t i = 0; i < d; ++i) {
    for (int64_t j = 0; j < p; ++j) {
      double sum = 0.0;
      for (int64_t k = 0; k < t; ++k) sum += double(a[size_t(k * d + i)]) * double(g[size_t(k * p + j)]);
      total += sum * sum;
    }
  }
  return total;
}

template <typename scalar>
void check_forms(const cape::Tiles<scalar>& tile) {
  const int64_t shapes[][3] = {{1, 1, 1}, {2, 7, 5}, {17, 13, 33}, {40, 12, 32}, {65, 48, 3}, {129, 1, 70}};
  for (const auto& [t, d, p] : shapes) {
    const auto a = random_numbers<scalar>(t * d), g = random_numbers<scalar>(t * p);
    const double expected = loop(a, g, t, d, p);
    cape::Scratch<scalar> scratch;
    const int64_t padded = cape::round_up(d, tile.rows);
    std::vector<scalar> rows(size_t(t * padded)), panels(size_t(t * cape::round_up(p, tile.cols)));
    cape::pack(a.data(), d, int64_t(1), t, d, padded, rows.data());
    cape::pack_panels(g.data(), p, int64_t(1), t, p, int64_t(tile.cols), panels.data());
    const int64_t* offset = scratch.steps(scratch.a_offset, t, padded);
    const double direct = cape::direct_squares(tile, rows.data(), offset, padded, panels.data(), t, p);
    assert(close(direct, expected, tolerance<scalar>()));
    const int64_t ld = cape::gram_stride(tile, t);
    std::vector<scalar> x(size_t(d * ld)), y(size_t(p * ld));
    cape::pack(a.data(), int64_t(1), d, d, t, ld, x.data());
    cape::pack(g.data(), int64_t(1), p, p, t, ld, y.data());
    const double gram = cape::gram_squares(tile, scratch, x.data(), d, y.data(), p, ld, t);
    assert(close(gram, expected, tolerance<scalar>()));
  }
}

// Windows read in place, unfolded rows and plain dot products must be the same convolution.
void check_windows() {
  const cape::ConvShape shapes[] = {
      {1, 3, 4, 1, {1, 5, 6}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {1, 1, 1}, {1, 5, 6}},
      {2, 4, 6, 2, {1, 9, 7}, {1, 3, 2}, {1, 2, 1}, {0, 2, 0}, {1, 2, 3}, {1, 5, 4}},
      {1, 2, 3, 1, {4, 5, 3}, {2, 3, 1}, {1, 2, 1}, {1, 1, 0}, {1, 1, 1}, {5, 3, 3}},
      {1, 2, 1, 1, {1, 1, 2}, {1, 1, 2}, {1, 1, 3}, {0, 0, 2}, {1, 1, 1}, {1, 1, 2}},
  };
  const auto& tile = cape::tiles<double>();
  for (const auto& s : shapes) {
    const auto x = random_numbers<double>(s.frames * s.channels * s.pixels());
    const int64_t t = s.positions(), pixels = t / s.frames, c = s.group_channels(), p = s.group_outputs();
    const auto g = random_numbers<double>(s.outputs * t);
    for (int64_t group = 0; group < s.groups; ++group) {
      const double narrow = cape::narrow_squares(s, x.data(), g.data(), group);
      std::vector<double> y(size_t(t * p));  // [t, p]
      for (int64_t f = 0; f < s.frames; ++f)
        for (int64_t o = 0; o < p; ++o)
          for (int64_t q = 0; q < pixels; ++q)
            y[size_t((f * pixels + q) * p + o)] = g[size_t((f * s.outputs + group * p + o) * pixels + q)];
      std::vector<double> unfolded(size_t(c * s.taps() * t)), a(unfolded.size());
      cape::unfold_rows(s, x.data(), group * c, c, t, unfolded.data());
      for (int64_t k = 0; k < c * s.taps(); ++k)
        for (int64_t q = 0; q < t; ++q) a[size_t(q * c * s.taps() + k)] = unfolded[size_t(k * t + q)];
      const double expected = loop(a, y, t, c * s.taps(), p);
      assert(close(narrow, expected, 1e-12));
      const int64_t width = cape::round_up(c, tile.rows);
      std::vector<double> images(size_t(s.frames * s.padded_pixels() * width));
      cape::channels_last(s, x.data(), group * c, c, width, images.data());
      std::vector<double> panels(size_t(t * cape::round_up(p, tile.cols)));
      cape::pack_panels(y.data(), p, int64_t(1), t, p, int64_t(tile.cols), panels.data());
      const auto windows = cape::window_offsets(s, width);
      double direct = 0.0;
      for (const int64_t tap : cape::tap_offsets(s, width))
        direct += cape::direct_squares(tile, images.data() + tap, windows.data(), width, panels.data(), t, p);
      assert(close(direct, expected, 1e-12));
    }
  }
}

}  // namespace

int main() {
  check_forms(*cape::portable_tiles_f32());
  check_forms(*cape::portable_tiles_f64());
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    check_forms(*cape::avx2_tiles_f32());
    check_forms(*cape::avx2_tiles_f64());
  }
  if (__builtin_cpu_supports("avx512f")) {
    check_forms(*cape::avx512_tiles_f32());
    check_forms(*cape::avx512_tiles_f64());
  }
#endif
  check_windows();
  std::printf("tiles: ok (%s)\n", cape::tiles<float>().name);
  return 0;
}
