// The CUDA kernels of conv_sq_norms, emulated, against float64 loops over awkward geometries.
#include <cape/conv_sq_norms.cuh>

#include "cuda_testing.h"

namespace {

using namespace cape::cuda;
using testing::Numbers;

template <typename scalar>
class Case {
 public:
  // `gap`: numbers between channels, so that images are strided; `shift`: numbers off a 16-byte boundary.
  Case(const cape::ConvShape& s, int64_t cotangents, int64_t batch, int64_t gap = 0, int64_t shift = 0)
      : s_(s),
        image_(s.pixels() + gap),
        out_image_(s.positions() / s.frames + gap),
        x_(batch * s.frames * s.channels * image_, shift),
        g_(cotangents * batch * s.frames * s.outputs * out_image_, shift),
        q{s, data(batch), cotangents, batch} {
    for (int64_t k = 0; k < cotangents; ++k) {
      for (int64_t b = 0; b < batch; ++b) want.push_back(definition(k, b));
    }
    what = "C=" + std::to_string(s.channels) + " O=" + std::to_string(s.outputs) + " g=" + std::to_string(s.groups) +
           " F=" + std::to_string(s.frames) + " kernel " + of(s.kernel) + " on " + of(s.size) +
           (sizeof(scalar) == 8 ? " f64" : " f32");
  }

  void all(bool every_precision) {
    run<ConvTiles<Precision::float32, scalar>>(sizeof(scalar) == 8 ? 1e-12 : 1e-5, "");
    if constexpr (sizeof(scalar) == 4) {
      if (!every_precision) return;
      run<ConvTiles<Precision::tf32, scalar>>(5e-3, " tf32");
      run<ConvTiles<Precision::bf16, scalar>>(4e-2, " bf16");
    }
  }

  // Few tiles and many positions: every tile is split.
  void split() {
    using Tiles = ConvTiles<Precision::float32, scalar>;
    const auto got = testing::in_every_order(int64_t(want.size()), what, [&](double* out) {
      emulation::Launch launch;
      run_conv_as<Tiles>(launch, q, {ConvForm::direct, false}, out);
      testing::check(launch.launches >= 2, "the tile was split", launch.launches, 2);
    });
    for (size_t n = 0; n < want.size(); ++n) testing::check_close(got[n], want[n], 1e-5, what + " split");
  }
  void narrow() {
    const auto got = testing::in_every_order(int64_t(want.size()), what, [&](double* out) {
      emulation::Launch launch;
      run_conv_narrow(launch, q, out);
    });
    for (size_t n = 0; n < want.size(); ++n) testing::check_close(got[n], want[n], 1e-5, what + " narrow");
  }

 private:
  static std::string of(const int64_t (&v)[3]) {
    return std::to_string(v[0]) + "x" + std::to_string(v[1]) + "x" + std::to_string(v[2]);
  }

  ConvData<scalar> data(int64_t batch) {
    const int64_t x[] = {s_.frames * s_.channels * image_, s_.channels * image_, image_};
    const int64_t sample = s_.frames * s_.outputs * out_image_;
    const int64_t g[] = {batch * sample, sample, s_.outputs * out_image_, out_image_};
    return ConvData<scalar>(s_, x_.data(), x, g_.data(), g);
  }

  double definition(int64_t k, int64_t b) {
    const ConvData<scalar>& c = q.data;
    const int64_t cg = s_.group_channels(), og = s_.group_outputs();
    double total = 0.0;
    for (int64_t o = 0; o < s_.outputs; ++o)
      for (int64_t i = 0; i < cg; ++i)
        for (int64_t kz = 0; kz < s_.kernel[0]; ++kz)
          for (int64_t ky = 0; ky < s_.kernel[1]; ++ky)
            for (int64_t kx = 0; kx < s_.kernel[2]; ++kx) {
              double dot = 0.0;
              for (int64_t f = 0; f < s_.frames; ++f)
                for (int64_t z = 0; z < s_.out[0]; ++z)
                  for (int64_t y = 0; y < s_.out[1]; ++y)
                    for (int64_t x = 0; x < s_.out[2]; ++x) {
                      const int64_t pz = z * s_.stride[0] + kz * s_.dilation[0] - s_.padding[0];
                      const int64_t py = y * s_.stride[1] + ky * s_.dilation[1] - s_.padding[1];
                      const int64_t px = x * s_.stride[2] + kx * s_.dilation[2] - s_.padding[2];
                      if (pz < 0 || py < 0 || px < 0 || pz >= s_.size[0] || py >= s_.size[1] || px >= s_.size[2])
                        continue;
                      const int64_t channel = o / og * cg + i;
                      dot += double(c.x[b * c.x_batch + f * c.x_frame + channel * c.x_channel +
                                        (pz * s_.size[1] + py) * s_.size[2] + px]) *
                             double(c.g[k * c.g_cotangent + b * c.g_batch + f * c.g_frame + o * c.g_channel +
                                        (z * s_.out[1] + y) * s_.out[2] + x]);
                    }
              total += dot * dot;
            }
    return total;
  }

  template <class Tiles>
  void run(double tolerance, const std::string& precision) {
    const auto compare = [&](const std::string& how, auto compute) {
      const auto got = testing::in_every_order(int64_t(want.size()), what + how, compute);
      for (size_t n = 0; n < want.size(); ++n) {
        testing::check_close(got[n], want[n], tolerance, what + how + precision);
      }
    };
    using Direct = typename Tiles::Direct;
    const SliceShape small = slice_shape(s_, Direct::kDepth, Direct::kTileRows);
    compare(" windows", [&](double* out) {
      emulation::Launch launch;
      run_conv_direct<Direct, false>(launch, q, small, out);
    });
    if constexpr (sizeof(scalar) == 4) {
      using Large = typename Tiles::DirectLarge;
      compare(" patches", [&](double* out) {
        emulation::Launch launch;
        run_conv_direct<Direct, true>(launch, q, small, out);
      });
      compare(" large patches", [&](double* out) {
        emulation::Launch launch;
        run_conv_direct<Large, true>(launch, q, slice_shape(s_, Large::kDepth, Large::kTileRows), out);
      });
    }
    for (const ConvForm form : {ConvForm::gram, ConvForm::shifted, ConvForm::narrow}) {
      // Plain dot products are slow to emulate, and a few of them show as much as many.
      if (form == ConvForm::narrow && s_.outputs * s_.group_channels() > 64) continue;
      compare(" form " + std::to_string(int(form)), [&](double* out) {
        emulation::Launch launch;
        run_conv_as<Tiles>(launch, q, {form, false}, out);
      });
    }
    compare(" chosen", [&](double* out) {
      emulation::Launch launch(4, 99 << 10);
      conv_sq_norms(launch, q, Precision::float32, ConvForm::automatic, out);
    });
  }

  cape::ConvShape s_;
  int64_t image_, out_image_;
  Numbers<scalar> x_, g_;

 public:
  ConvProblem<scalar> q;
  std::vector<double> want;
  std::string what;
};

// frames, channels, outputs, groups, size, kernel, stride, padding, dilation, out
const cape::ConvShape kShapes[] = {
    {1, 3, 4, 1, {1, 1, 8}, {1, 1, 3}, {1, 1, 1}, {0, 0, 1}, {1, 1, 1}, {1, 1, 8}},
    {1, 4, 6, 2, {1, 1, 9}, {1, 1, 4}, {1, 1, 2}, {0, 0, 3}, {1, 1, 2}, {1, 1, 5}},
    {1, 5, 8, 1, {1, 8, 8}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {1, 1, 1}, {1, 8, 8}},
    {1, 13, 33, 1, {1, 9, 7}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {1, 1, 1}, {1, 9, 7}},
    {1, 3, 5, 1, {1, 20, 19}, {1, 7, 7}, {1, 2, 2}, {0, 3, 3}, {1, 1, 1}, {1, 10, 10}},
    {2, 8, 16, 4, {1, 7, 9}, {1, 3, 5}, {1, 2, 1}, {0, 2, 0}, {1, 2, 1}, {1, 4, 5}},
    {1, 70, 66, 1, {1, 4, 4}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {1, 1, 1}, {1, 4, 4}},
    {3, 6, 6, 6, {1, 5, 11}, {1, 3, 3}, {1, 1, 2}, {0, 1, 1}, {1, 1, 1}, {1, 5, 6}},
    {1, 5, 7, 1, {1, 6, 6}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, {1, 1, 1}, {1, 6, 6}},
    {1, 2, 3, 1, {4, 5, 3}, {2, 3, 1}, {1, 2, 1}, {1, 1, 0}, {1, 1, 1}, {5, 3, 3}},
    {1, 7, 5, 1, {1, 6, 5}, {1, 5, 5}, {1, 1, 1}, {0, 2, 2}, {1, 1, 1}, {1, 6, 5}},
    {1, 3, 4, 1, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, {1, 1, 1}, {1, 1, 1}},
    {1, 3, 2, 1, {1, 5, 5}, {1, 5, 5}, {1, 3, 3}, {0, 4, 4}, {1, 1, 1}, {1, 3, 3}},
};

// What the time model's starting values choose for an H100, two cotangents and 128 samples.
void check_choices() {
  const auto choice = [](const cape::ConvShape& s) {
    const int64_t x[] = {s.channels * s.pixels(), s.channels * s.pixels(), s.pixels()};
    const int64_t g[] = {128 * s.outputs * s.positions(), s.outputs * s.positions(), s.outputs * s.positions(),
                         s.positions()};
    const ConvProblem<float> q{s, ConvData<float>(s, nullptr, x, nullptr, g), 2, 128};
    ConvChoice made{};
    with_conv_choice(q, Precision::float32, ConvForm::automatic, 132, 227 << 10, [&](auto, ConvChoice c) { made = c; });
    return made;
  };
  const auto square = [](int64_t channels, int64_t outputs, int64_t size, int64_t groups) {
    return cape::ConvShape{1,         channels,  outputs,   groups,    {1, size, size},
                           {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {1, 1, 1}, {1, size, size}};
  };
  const auto expect = [](ConvChoice got, ConvForm want, const char* what) {
    testing::check(got.form == want, what, int(got.form), int(want));
  };
  expect(choice(square(256, 256, 8, 1)), ConvForm::shifted, "256 to 256 at 8 x 8 is shifted");
  expect(choice(square(64, 64, 32, 1)), ConvForm::direct, "64 to 64 at 32 x 32 is direct");
  expect(choice(square(128, 128, 16, 128)), ConvForm::narrow, "depthwise is narrow");
  testing::check(choice(square(128, 256, 56, 1)).large, "wide layers take large tiles", 0, 1);
}

}  // namespace

int main() {
  check_choices();
  int n = 0;
  for (const auto& s : kShapes) {
    Case<float>(s, 2, 1).all(n == 3);
    Case<double>(s, 2, 1, n % 2, n % 2).all(false);
    if (n % 3 == 0) Case<float>(s, 1, 2, 3, 1).all(false);
    ++n;
  }
  // More positions than a warp takes on alone.
  Case<float>({1, 2, 2, 2, {1, 70, 70}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {1, 1, 1}, {1, 70, 70}}, 2, 1).narrow();
  Case<float>({1, 3, 4, 1, {1, 33, 31}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {1, 1, 1}, {1, 33, 31}}, 1, 1).split();
  return testing::report("conv_sq_norms on the emulated device");
}
