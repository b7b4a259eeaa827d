// Every instruction set that this processor runs, every form and both precisions, against plain float64 loops.
#include <cape/cost.h>
#include <cape/kernels.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

namespace {

std::mt19937 generator(0);

template <typename scalar>
std::vector<scalar> random_numbers(int64_t n) {
  std::normal_distribution<double> normal;
  std::vector<scalar> v(static_cast<size_t>(n));
  for (auto& x : v) x = scalar(normal(generator));
  return v;
}

void expect(double ours, double expected, double tolerance, const char* isa, const char* what, int form) {
  if (std::abs(ours - expected) <= tolerance * std::abs(expected) + 1e-300) return;
  std::printf("%s, %s, form %d: %.9g instead of %.9g\n", isa, what, form, ours, expected);
  std::exit(1);
}

template <typename scalar>
constexpr double tolerance() {
  return sizeof(scalar) == 4 ? 1e-5 : 1e-12;
}

template <typename scalar>
struct Memory {
  std::vector<scalar> values;
  std::vector<int64_t> offsets;
  explicit Memory(cape::ScratchSize size)
      : values(static_cast<size_t>(size.values), scalar(NAN)), offsets(static_cast<size_t>(size.offsets)) {}
  cape::Scratch<scalar> get() { return {values.data(), offsets.data()}; }
};

template <typename scalar>
void check_linear(const cape::Kernels<scalar>& kernels) {
  const int64_t shapes[][3] = {{2, 7, 5}, {17, 13, 33}, {40, 12, 32}, {65, 48, 3}, {129, 1, 70}, {66, 31, 40}};
  for (const auto& [t, d, p] : shapes) {
    const cape::LinearShape shape{t, d, p, 2, d % 3};
    const auto a = random_numbers<scalar>(t * d), g = random_numbers<scalar>(2 * t * p);
    for (const bool turned : {false, true}) {  // the same numbers read as rows of features or of positions
      const cape::Strided<scalar> left{a.data(), turned ? 1 : d, turned ? t : 1};
      const cape::Strided<scalar> right{g.data(), turned ? 1 : p, turned ? t : 1};
      for (const cape::Form form : {cape::Form::direct, cape::Form::gram}) {
        Memory<scalar> memory(cape::scratch_of(kernels.tile, form, shape));
        double total[2];
        kernels.linear(form, shape, left, right, t * p, memory.get(), total);
        for (int64_t k = 0; k < 2; ++k) {
          double expected = 0.0;
          for (int64_t i = 0; i < d; ++i) {
            for (int64_t j = 0; j < p; ++j) {
              double sum = 0.0;
              for (int64_t x = 0; x < t; ++x) {
                sum += double(left.data[x * left.row + i * left.col]) *
                       double(right.data[k * t * p + x * right.row + j * right.col]);
              }
              expected += sum * sum;
            }
          }
          for (int64_t j = 0; j < p; ++j) {
            double sum = 0.0;
            for (int64_t x = 0; x < t; ++x) sum += double(right.data[k * t * p + x * right.row + j * right.col]);
            expected += double(shape.biases) * sum * sum;
          }
          expect(total[k], expected, tolerance<scalar>(), kernels.name, "linear", int(form));
        }
      }
    }
  }
}

template <typename scalar>
double conv_loop(const cape::ConvShape& s, const scalar* x, const scalar* g) {
  double total = 0.0;
  const int64_t c = s.group_channels(), p = s.group_outputs();
  for (int64_t o = 0; o < s.outputs; ++o)
    for (int64_t i = o / p * c; i < (o / p + 1) * c; ++i)
      for (int64_t tap = 0; tap < s.taps(); ++tap) {
        const int64_t taps[3] = {tap / (s.kernel[1] * s.kernel[2]), tap / s.kernel[2] % s.kernel[1], tap % s.kernel[2]};
        double sum = 0.0;
        for (int64_t f = 0; f < s.frames; ++f)
          for (int64_t q = 0; q < s.out_pixels(); ++q) {
            const int64_t at[3] = {q / (s.out[1] * s.out[2]), q / s.out[2] % s.out[1], q % s.out[2]};
            int64_t pixel = 0;
            bool real = true;
            for (int axis = 0; axis < 3; ++axis) {
              const int64_t n = at[axis] * s.stride[axis] + taps[axis] * s.dilation[axis] - s.padding[axis];
              real = real && n >= 0 && n < s.size[axis];
              pixel = pixel * s.size[axis] + n;
            }
            if (real) {
              sum += double(x[(f * s.channels + i) * s.pixels() + pixel]) *
                     double(g[(f * s.outputs + o) * s.out_pixels() + q]);
            }
          }
        total += sum * sum;
      }
  return total;
}

template <typename scalar>
void check_conv(const cape::Kernels<scalar>& kernels) {
  const cape::ConvShape shapes[] = {
      {1, 3, 4, 1, {1, 5, 6}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {1, 1, 1}, {1, 5, 6}, 2},
      {2, 4, 6, 2, {1, 9, 7}, {1, 3, 2}, {1, 2, 1}, {0, 2, 0}, {1, 2, 3}, {1, 5, 4}, 2},
      {1, 2, 3, 1, {4, 5, 3}, {2, 3, 1}, {1, 2, 1}, {1, 1, 0}, {1, 1, 1}, {5, 3, 3}, 1},
      {1, 2, 1, 1, {1, 1, 2}, {1, 1, 2}, {1, 1, 3}, {0, 0, 2}, {1, 1, 1}, {1, 1, 2}, 3},
      {1, 20, 37, 1, {1, 8, 8}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {1, 1, 1}, {1, 8, 8}, 2},
      {1, 10, 40, 2, {1, 7, 9}, {1, 3, 3}, {1, 1, 1}, {0, 0, 2}, {1, 1, 1}, {1, 5, 11}, 2},
      {1, 19, 19, 19, {1, 6, 9}, {1, 3, 3}, {1, 2, 1}, {0, 1, 1}, {1, 1, 1}, {1, 3, 9}, 2},
      {3, 5, 5, 5, {2, 3, 4}, {2, 2, 5}, {1, 1, 1}, {0, 0, 2}, {1, 1, 1}, {1, 2, 4}, 2},
  };
  for (const auto& s : shapes) {
    const int64_t step = s.outputs * s.positions();
    const auto x = random_numbers<scalar>(s.frames * s.channels * s.pixels());
    const auto g = random_numbers<scalar>(s.cotangents * step);
    for (const cape::Form form : {cape::Form::direct, cape::Form::gram, cape::Form::shifted, cape::Form::winograd,
                                  cape::Form::channelwise, cape::Form::narrow}) {
      if (form == cape::Form::shifted && !s.dense()) continue;
      if (form == cape::Form::winograd && !s.three_by_three()) continue;
      if (form == cape::Form::channelwise && (s.group_channels() != 1 || s.group_outputs() != 1)) continue;
      Memory<scalar> memory(cape::scratch_of(kernels.tile, form, s));
      std::vector<double> total(static_cast<size_t>(2 * s.cotangents));
      kernels.conv(form, s, x.data(), g.data(), step, memory.get(), total.data());
      for (int64_t k = 0; k < s.cotangents; ++k) {
        expect(total[size_t(k)], conv_loop(s, x.data(), g.data() + k * step), tolerance<scalar>(), kernels.name, "conv",
               int(form));
      }
    }
  }
}

template <typename scalar>
void check_affine(const cape::Kernels<scalar>& kernels) {
  const int64_t shapes[][3] = {{1, 37, 1}, {5, 33, 1}, {2, 3, 300}, {1, 4, 7}};
  for (const auto& [rows, channels, s] : shapes) {
    const int64_t n = rows * channels * s;
    const auto x = random_numbers<scalar>(n), g = random_numbers<scalar>(2 * n);
    const auto mean = random_numbers<scalar>(rows * channels), inverse = random_numbers<scalar>(rows * channels);
    for (const int64_t row_step : {int64_t(0), int64_t(1), channels}) {
      const int64_t channel_step = row_step == 1 ? 0 : 1;  // per channel, per row, per both
      const cape::AffineShape shape{rows, channels, s, 2, row_step, channel_step, true, true};
      std::vector<double> sums(static_cast<size_t>(4 * channels));
      std::vector<scalar> runs(static_cast<size_t>(2 * channels)), dx(static_cast<size_t>(2 * n));
      const auto weight = random_numbers<scalar>(channels);
      double total[2];
      kernels.affine(shape, x.data(), g.data(), n, mean.data(), inverse.data(), weight.data(), sums.data(), runs.data(),
                     total, dx.data());
      for (int64_t e = 0; e < 2 * n; ++e) {
        const int64_t r = e % n / s / channels, c = e / s % channels;
        const double factor = double(inverse[size_t(r * row_step + c * channel_step)]) * double(weight[size_t(c)]);
        expect(double(dx[size_t(e)]), double(g[size_t(e)]) * factor, tolerance<scalar>(), kernels.name, "dx", int(s));
      }
      for (int64_t k = 0; k < 2; ++k) {
        double expected = 0.0;
        for (int64_t c = 0; c < channels; ++c) {
          double shift = 0.0, scale = 0.0;
          for (int64_t r = 0; r < rows; ++r) {
            const size_t at = size_t(r * row_step + c * channel_step);
            for (int64_t q = 0; q < s; ++q) {
              const int64_t e = (r * channels + c) * s + q;
              const double grad = double(g[size_t(k * n + e)]);
              shift += grad;
              scale += grad * (double(x[size_t(e)]) - double(mean[at])) * double(inverse[at]);
            }
          }
          expected += shift * shift + scale * scale;
        }
        expect(total[k], expected, tolerance<scalar>(), kernels.name, "affine", int(row_step));
      }
    }
  }
}

// Exactly the numbers of the standard library's Mersenne Twister, in runs that do and do not end with a block.
template <typename scalar>
void check_draws(const cape::Kernels<scalar>& kernels) {
  cape::Twister twister;
  twister.seed(5489);
  std::mt19937 expected(5489);
  const uint64_t threshold = uint64_t(0.7 * 0x1p53);
  for (const int64_t n : {1, 311, 312, 1000, 5}) {
    std::vector<scalar> ones(static_cast<size_t>(n));
    kernels.draw_ones(twister, threshold, ones.data(), n);
    for (const scalar one : ones) {
      const uint64_t high = expected(), low = expected();
      const bool below = (((high << 32) | low) & ((uint64_t(1) << 53) - 1)) < threshold;
      if (one != scalar(below)) expect(one, below, 0.0, kernels.name, "draws of ones", int(n));
    }
    std::vector<float> uniform(static_cast<size_t>(n));
    kernels.draw_uniform(twister, uniform.data(), n);
    for (const float number : uniform) {
      expect(number, double(expected() & 0xffffffu) * 0x1p-24, 0.0, kernels.name, "uniform draws", int(n));
    }
  }
}

template <typename scalar>
void check_size_sums(const cape::Kernels<scalar>& kernels) {
  for (int64_t n : {0, 1, 15, 32, 33, 64, 1000, 4099}) {
    const auto x = random_numbers<scalar>(n);
    double sums[2], sizes = 0.0, squares = 0.0;
    for (const scalar value : x) {
      sizes += std::abs(double(value));
      squares += double(value) * double(value);
    }
    kernels.size_sums(x.data(), n, sums);
    expect(sums[0], sizes, 1e-13, kernels.name, "sizes", 0);
    expect(sums[1], squares, 1e-13, kernels.name, "squares", 0);
  }
}

template <typename scalar>
void check_batch_norm(const cape::Kernels<scalar>& kernels) {
  const int64_t rows = 9, channels = 21, chunk = 5, n = rows * channels;
  const double eps = 1e-5;
  const auto x = random_numbers<scalar>(n), g = random_numbers<scalar>(n);
  const auto weight = random_numbers<scalar>(channels), bias = random_numbers<scalar>(channels);
  std::vector<scalar> y(static_cast<size_t>(n)), passed(y);
  std::vector<scalar> mean(static_cast<size_t>(channels)), inverse(mean), d_weight(mean), d_bias(mean);
  std::vector<scalar> parts(static_cast<size_t>(4 * channels));
  std::vector<double> totals(static_cast<size_t>(2 * channels));
  kernels.batch_norm(x.data(), rows, channels, weight.data(), bias.data(), eps, chunk, y.data(), mean.data(),
                     inverse.data(), parts.data(), totals.data());
  kernels.batch_norm_back(g.data(), x.data(), rows, channels, weight.data(), mean.data(), inverse.data(), chunk,
                          passed.data(), d_weight.data(), d_bias.data(), parts.data(), totals.data());
  const auto close = [&](double ours, double expected, const char* what) {  // on the scale of the numbers, all near 1
    expect(ours - expected + 1.0, 1.0, 20 * tolerance<scalar>(), kernels.name, what, 0);
  };
  for (int64_t c = 0; c < channels; ++c) {
    double sum = 0.0, squares = 0.0, grad = 0.0, product = 0.0;
    for (int64_t i = 0; i < rows; ++i) sum += double(x[size_t(i * channels + c)]);
    const double middle = sum / double(rows);
    for (int64_t i = 0; i < rows; ++i) squares += std::pow(double(x[size_t(i * channels + c)]) - middle, 2);
    const double deviation = std::sqrt(squares / double(rows) + eps);
    for (int64_t i = 0; i < rows; ++i) {
      const size_t at = size_t(i * channels + c);
      grad += double(g[at]);
      product += double(g[at]) * (double(x[at]) - middle) / deviation;
    }
    close(double(d_weight[size_t(c)]), product, "batch norm, weight");
    close(double(d_bias[size_t(c)]), grad, "batch norm, bias");
    for (int64_t i = 0; i < rows; ++i) {
      const size_t at = size_t(i * channels + c);
      const double normal = (double(x[at]) - middle) / deviation, scale = double(weight[size_t(c)]);
      close(double(y[at]), normal * scale + double(bias[size_t(c)]), "batch norm");
      close(double(passed[at]),
            (double(g[at]) - grad / double(rows) - normal * product / double(rows)) * scale / deviation,
            "batch norm, input");
    }
  }
}

// Layer norm's input gradient, from rows with statistics of their own.
template <typename scalar>
void check_own_rows(const cape::Kernels<scalar>& kernels) {
  for (const int64_t channels : {int64_t(3), int64_t(48), int64_t(131)}) {
    const int64_t rows = 18, n = rows * channels;
    const auto x = random_numbers<scalar>(n), g = random_numbers<scalar>(2 * n),
               weight = random_numbers<scalar>(channels);
    const auto mean = random_numbers<scalar>(rows), inverse = random_numbers<scalar>(rows);
    const cape::AffineShape shape{rows, channels, 1, 2, 1, 0, true, true, true};
    std::vector<double> sums(static_cast<size_t>(4 * channels));
    std::vector<scalar> runs(static_cast<size_t>(2 * channels)), dx(static_cast<size_t>(2 * n));
    double total[2];
    kernels.affine(shape, x.data(), g.data(), n, mean.data(), inverse.data(), weight.data(), sums.data(), runs.data(),
                   total, dx.data());
    for (int64_t row = 0; row < 2 * rows; ++row) {
      const size_t r = size_t(row % rows);
      double plain = 0.0, times = 0.0;
      const auto hat = [&](int64_t c) {
        return (double(x[r * size_t(channels) + size_t(c)]) - double(mean[r])) * double(inverse[r]);
      };
      const auto grad = [&](int64_t c) { return double(weight[size_t(c)]) * double(g[size_t(row * channels + c)]); };
      for (int64_t c = 0; c < channels; ++c) plain += grad(c), times += grad(c) * hat(c);
      for (int64_t c = 0; c < channels; ++c) {
        const double expected = (grad(c) - (plain + hat(c) * times) / double(channels)) * double(inverse[r]);
        const double size =
            std::abs(double(inverse[r])) * (1.0 + std::abs(grad(c)) + std::abs(plain) + std::abs(hat(c) * times));
        expect(double(dx[size_t(row * channels + c)]) + size, expected + size, tolerance<scalar>(), kernels.name, "own",
               0);
      }
    }
  }
}

template <typename scalar>
void check(const cape::Kernels<scalar>& kernels) {
  check_draws(kernels);
  check_size_sums(kernels);
  check_batch_norm(kernels);
  check_linear(kernels);
  check_conv(kernels);
  check_affine(kernels);
  check_own_rows(kernels);
}

}  // namespace

int main() {
  check(*cape::portable_kernels_f32());
  check(*cape::portable_kernels_f64());
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    check(*cape::avx2_kernels_f32());
    check(*cape::avx2_kernels_f64());
  }
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl")) {
    check(*cape::avx512_kernels_f32());
    check(*cape::avx512_kernels_f64());
  }
#endif
  std::printf("kernels: ok (%s)\n", cape::kernels<float>().name);
  return 0;
}
