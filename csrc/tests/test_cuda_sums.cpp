// The CUDA kernels of sq_norms and pair_sums, emulated, and the emulated instructions themselves.
#include <cape/pair_sums.cuh>
#include <cape/tiles.cuh>

#include "cuda_testing.h"

namespace {

using namespace cape::cuda;
using testing::Numbers;

template <typename scalar>
void check_squares(int64_t rows, int64_t n, int64_t row_gap, int64_t step, int64_t shift) {
  const int64_t row_stride = n * step + row_gap;
  Numbers<scalar> x(rows * row_stride, shift);
  const std::string what = "sq_norms " + std::to_string(rows) + "x" + std::to_string(n);
  const auto got = testing::in_every_order(rows, what, [&](double* out) {
    emulation::Launch launch;
    sq_norms<emulation::Launch, scalar>(launch, x.data(), row_stride, step, rows, n, out);
  });
  for (int64_t r = 0; r < rows; ++r) {
    double want = 0.0;
    for (int64_t i = 0; i < n; ++i)
      want += double(x.data()[r * row_stride + i * step]) * double(x.data()[r * row_stride + i * step]);
    testing::check_close(got[size_t(r)], want, 1e-13, what);
  }
}

enum class Order { rows, channels_last };

template <typename scalar>
void check_pairs(int64_t cotangents, int64_t batch, int64_t rows, int64_t channels, int64_t length, Order order,
                 int64_t shift) {
  const int64_t size = batch * rows * channels * length;
  Numbers<scalar> g(cotangents * size, shift), x(size, shift);
  const int64_t row = channels * length, channel = order == Order::rows ? length : 1;
  const int64_t step = order == Order::rows ? 1 : channels;
  const PairProblem<scalar> q{
      g.data(), x.data(), size, rows * row, row,   channel,  step,          rows * row,
      row,      channel,  step, cotangents, batch, channels, rows * length, FastDivision(length)};
  const std::string what = "pair_sums " + std::to_string(rows) + "x" + std::to_string(channels) + "x" +
                           std::to_string(length) + (sizeof(scalar) == 8 ? " f64" : " f32");
  const int64_t n = cotangents * batch * channels;
  const auto got = testing::in_every_order(2 * n, what, [&](double* out) {
    emulation::Launch launch;
    pair_sums(launch, q, out);
  });
  for (int64_t k = 0; k < cotangents; ++k) {
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t c = 0; c < channels; ++c) {
        double plain = 0.0, times = 0.0, scale = 0.0;
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t s = 0; s < length; ++s) {
            const int64_t at = b * rows * row + r * row + c * channel + s * step;
            const double gv = double(g.data()[k * size + at]), xv = double(x.data()[at]);
            plain += gv, times += gv * xv, scale += std::abs(gv) * (1.0 + std::abs(xv));
          }
        }
        // Sums may cancel: errors are measured against the sum of magnitudes.
        const double tolerance = (sizeof(scalar) == 8 ? 1e-14 : 1e-6) * scale;
        const size_t at = size_t((k * batch + b) * channels + c);
        testing::check(std::abs(got[at] - plain) <= tolerance, what + " G", got[at], plain);
        testing::check(std::abs(got[size_t(n) + at] - times) <= tolerance, what + " GX", got[size_t(n) + at], times);
      }
    }
  }
}

// One warp multiplies matrices whose layout is written out here as the PTX manual gives it.
void tf32_product(const float* a, const float* b, float* c) {
  const int lane = int(threadIdx.x), group = lane >> 2, in_group = lane % 4;
  uint32_t left[4], right[2];
  for (int i = 0; i < 4; ++i) {
    const int row = i == 0 || i == 2 ? group : group + 8, col = i < 2 ? in_group : in_group + 4;
    left[i] = to_tf32(a[row * 8 + col]);
  }
  for (int i = 0; i < 2; ++i) right[i] = to_tf32(b[(in_group + 4 * i) * 8 + group]);
  float sums[4] = {};
  mma_tf32(sums, left, right);
  for (int i = 0; i < 4; ++i) c[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)] = sums[i];
}

void bf16_product(const float* a, const float* b, float* c) {
  const int lane = int(threadIdx.x), group = lane >> 2, in_group = lane % 4;
  uint32_t left[4], right[2];
  for (int i = 0; i < 8; i += 2) {
    const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8, col = in_group * 2 + (i >= 4 ? 8 : 0);
    left[i / 2] = to_bf16x2(a[row * 16 + col], a[row * 16 + col + 1]);
  }
  for (int i = 0; i < 4; i += 2) {
    const int row = in_group * 2 + (i >= 2 ? 8 : 0);
    right[i / 2] = to_bf16x2(b[row * 8 + group], b[(row + 1) * 8 + group]);
  }
  float sums[4] = {};
  mma_bf16(sums, left, right);
  for (int i = 0; i < 4; ++i) c[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)] = sums[i];
}

void check_products() {
  for (const int depth : {8, 16}) {
    Numbers<float> a(16 * depth), b(depth * 8);
    for (int i = 0; i < 16 * depth; ++i) a.data()[i] = std::round(4 * a.data()[i]);  // exact in every format
    for (int i = 0; i < depth * 8; ++i) b.data()[i] = std::round(4 * b.data()[i]);
    std::vector<float> c(16 * 8);
    emulation::run(1, 32, 0, [&] { (depth == 8 ? tf32_product : bf16_product)(a.data(), b.data(), c.data()); });
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 8; ++j) {
        double want = 0.0;
        for (int k = 0; k < depth; ++k) want += double(a.data()[i * depth + k]) * double(b.data()[k * 8 + j]);
        testing::check(double(c[size_t(i * 8 + j)]) == want, "a warp's product", double(c[size_t(i * 8 + j)]), want);
      }
    }
  }
  const float third = 1.0f / 3.0f;
  testing::check(emulation::bits_to_float(to_tf32(third)) == 0.333251953125f, "TF32 of a third",
                 double(emulation::bits_to_float(to_tf32(third))), 0.333251953125);
  testing::check(to_bf16(1.0f + 1.0f / 256.0f) == 0x3f80u, "bfloat16 rounds ties to even", double(to_bf16(1.00390625f)),
                 0);
}

// A thousand equal products: sums kept inside the tensor cores would drift by truncation, three TF32 products added
// outside of them must not.
void check_long_sums() {
  using Tile = MmaTile<Precision::float32, 64, 32>;
  using Layout = NextToI<64, 32>;
  std::vector<float> operand(size_t(Layout::kSize), 0.1f);
  double worst = 0.0;
  emulation::run(1, Tile::kThreads, 0, [&] {
    Tile tile;
    for (int slice = 0; slice < 64; ++slice) {
      tile.add(Tile::left<Layout>(operand.data()), Tile::right<Layout>(operand.data()));
    }
    const double want = 64.0 * 32.0 * double(0.1f) * double(0.1f);
    worst = std::max(worst, std::abs(double(tile.at(0, 0)) / want - 1.0));
  });
  testing::check(worst < 2e-6, "a long sum", worst, 0.0);
}

}  // namespace

int main() {
  check_products();
  check_long_sums();
  for (const int64_t n : {1, 7, 64, 2048, 2049, 40000}) {
    check_squares<float>(3, n, 0, 1, 0);
    check_squares<float>(2, n, 1, 1, 1);
    check_squares<double>(9, n, 2, 2, 0);
  }
  for (const Order order : {Order::rows, Order::channels_last}) {
    check_pairs<float>(2, 2, 1, 1, 1, order, 0);
    check_pairs<float>(2, 2, 3, 5, 8, order, 0);
    check_pairs<float>(3, 1, 2, 5, 7, order, 1);
    check_pairs<float>(1, 2, 65, 33, 1, order, 0);
    check_pairs<float>(5, 1, 1, 3, 5000, order, 0);
    check_pairs<float>(2, 1, 6, 2, 10000, order, 0);
    check_pairs<double>(2, 2, 3, 5, 8, order, 0);
    check_pairs<double>(2, 1, 700, 40, 1, order, 1);
    check_pairs<double>(1, 1, 1, 2, 20001, order, 0);
  }
  return testing::report("sums and instructions on the emulated device");
}
