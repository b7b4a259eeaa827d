// The CUDA kernels of linear_sq_norms, emulated, against float64 loops over awkward shapes and strides.
#include <cape/linear_sq_norms.cuh>

#include "cuda_testing.h"

namespace {

using namespace cape::cuda;
using testing::Numbers;

struct Shape {
  int64_t cotangents, batch, length, d, p;
};

enum class Strides { rows, columns, time_major, odd };

struct Layout3 {
  int64_t batch, row, col, size;
};

Layout3 layout_of(Strides s, int64_t batch, int64_t length, int64_t n) {
  switch (s) {
    case Strides::rows:
      return {length * n, n, 1, batch * length * n};
    case Strides::columns:  // positions next to each other, as in a convolution's channels
      return {length * n, 1, length, batch * length * n};
    case Strides::time_major:
      return {n, batch * n, 1, batch * length * n};
    default:  // every second number, rows of odd length
      return {length * (2 * n + 1), 2 * n + 1, 2, batch * length * (2 * n + 1)};
  }
}

double tolerance(size_t bytes, Precision precision) {
  if (bytes == 8) return 1e-12;
  return precision == Precision::float32 ? 1e-5 : precision == Precision::tf32 ? 5e-3 : 4e-2;
}

const char* name_of(LinearForm f) {
  return f == LinearForm::direct ? "direct" : f == LinearForm::gram ? "gram" : "auto";
}

template <typename scalar>
class Case {
 public:
  Case(Shape s, Strides strides, int64_t shift) : s_(s) {
    const Layout3 a = layout_of(strides, s.batch, s.length, s.d), g = layout_of(strides, s.batch, s.length, s.p);
    a_ = std::make_unique<Numbers<scalar>>(a.size, shift);
    g_ = std::make_unique<Numbers<scalar>>(g.size * s.cotangents, shift);
    q = {a_->data(), g_->data(), a.batch,      a.row,   a.col,    g.size, g.batch,
         g.row,      g.col,      s.cotangents, s.batch, s.length, s.d,    s.p};
    for (int64_t k = 0; k < s.cotangents; ++k) {
      for (int64_t b = 0; b < s.batch; ++b) want.push_back(definition(k, b));
    }
    what = "T=" + std::to_string(s.length) + " d=" + std::to_string(s.d) + " p=" + std::to_string(s.p) +
           " strides=" + std::to_string(int(strides)) + (sizeof(scalar) == 8 ? " f64" : " f32");
  }

  void run(LinearForm form, TileKind tile, Precision precision) {
    const auto got = testing::in_every_order(s_.cotangents * s_.batch, what, [&](double* out) {
      emulation::Launch launch;
      run_linear_as(launch, q, precision, {form, tile}, out);
    });
    compare(got, std::string(name_of(form)) + " tile " + std::to_string(int(tile)), precision);
  }
  void run_chosen(Precision precision) {
    const auto got = testing::in_every_order(s_.cotangents * s_.batch, what, [&](double* out) {
      emulation::Launch launch;
      linear_sq_norms(launch, q, precision, LinearForm::automatic, out);
    });
    compare(got, "chosen", precision);
  }

  LinearProblem<scalar> q;
  std::vector<double> want;
  std::string what;

 private:
  double definition(int64_t k, int64_t b) const {
    double total = 0.0;
    for (int64_t i = 0; i < s_.d; ++i) {
      for (int64_t j = 0; j < s_.p; ++j) {
        double entry = 0.0;
        for (int64_t t = 0; t < s_.length; ++t) {
          entry += double(q.a[b * q.a_batch + t * q.a_row + i * q.a_col]) *
                   double(q.g[k * q.g_cotangent + b * q.g_batch + t * q.g_row + j * q.g_col]);
        }
        total += entry * entry;
      }
    }
    return total;
  }
  void compare(const std::vector<double>& got, const std::string& how, Precision precision) const {
    for (size_t n = 0; n < want.size(); ++n) {
      testing::check_close(got[n], want[n], tolerance(sizeof(scalar), precision),
                           what + " " + how + " precision " + std::to_string(int(precision)));
    }
  }
  Shape s_;
  std::unique_ptr<Numbers<scalar>> a_, g_;
};

template <typename scalar>
void every_tile(Shape s, Strides strides, int64_t shift, bool every_precision) {
  Case<scalar> c(s, strides, shift);
  for (const LinearForm form : {LinearForm::direct, LinearForm::gram}) {
    for (const TileKind tile : {TileKind::narrow, TileKind::tensor64, TileKind::tensor128}) {
      if (tile == TileKind::tensor128 && sizeof(scalar) == 8) continue;
      c.run(form, tile, Precision::float32);
      if (!every_precision || tile == TileKind::narrow || sizeof(scalar) == 8) continue;
      c.run(form, tile, Precision::tf32);
      c.run(form, tile, Precision::bf16);
    }
  }
  c.run_chosen(Precision::float32);
}

void check_divisions() {
  for (const int64_t d : {1, 2, 3, 5, 7, 9, 32, 49, 111, 12544, 65535, 1 << 20, 2147483647}) {
    const FastDivision by(d);
    for (int64_t n : {0, 1, 2, 6, 7, 48, 49, 12543, 12544, 65536, 99999999, 2147483646, 2147483647}) {
      testing::check(by(int(n)) == n / d, "division", double(by(int(n))), double(n / d));
    }
  }
}

// Rounding must not turn a vanishing sum negative, and NaN must reach the result of its sample alone.
void check_special_values() {
  for (const LinearForm form : {LinearForm::direct, LinearForm::gram}) {
    Case<float> c({1, 3, 40, 20, 24}, Strides::rows, 0);
    auto* a = const_cast<float*>(c.q.a);
    auto* g = const_cast<float*>(c.q.g);
    for (int64_t t = 0; t < 40; ++t) {
      for (int64_t i = 0; i < 20; ++i) a[t * 20 + i] = 1.0f;  // sample 0: equal rows, gradients that cancel
      for (int64_t j = 0; j < 24; ++j) g[t * 24 + j] = t % 2 ? -g[(t - 1) * 24 + j] : g[t * 24 + j];
    }
    a[c.q.a_batch + 3] = NAN;  // sample 1
    std::vector<double> out(3);
    emulation::Launch launch;
    run_linear_as(launch, c.q, Precision::float32, {form, TileKind::tensor64}, out.data());
    testing::check(out[0] >= 0.0 && out[0] < 1e-3, "a vanishing sum", out[0], 0.0);
    testing::check(std::isnan(out[1]), "NaN stays NaN", out[1], NAN);
    testing::check_close(out[2], c.want[2], 1e-5, "a neighbour of NaN");
  }
}

}  // namespace

int main() {
  check_divisions();
  check_special_values();
  every_tile<float>({2, 2, 1, 1, 1}, Strides::rows, 0, true);
  every_tile<float>({2, 2, 33, 40, 24}, Strides::rows, 0, true);   // 16-byte copies
  every_tile<float>({2, 2, 33, 40, 24}, Strides::rows, 1, false);  // the same, misaligned
  every_tile<float>({1, 1, 70, 133, 67}, Strides::rows, 0, true);
  every_tile<float>({3, 2, 36, 17, 70}, Strides::columns, 0, true);
  every_tile<float>({2, 3, 19, 31, 12}, Strides::time_major, 0, false);
  every_tile<float>({2, 1, 21, 9, 65}, Strides::odd, 3, false);
  every_tile<float>({11, 1, 5, 7, 3}, Strides::rows, 0, false);
  every_tile<double>({2, 2, 33, 40, 24}, Strides::rows, 0, false);
  every_tile<double>({1, 1, 70, 133, 67}, Strides::rows, 1, false);
  every_tile<double>({3, 2, 36, 17, 70}, Strides::columns, 0, false);
  every_tile<double>({2, 2, 5, 3, 9}, Strides::odd, 1, false);
  // Few tiles and many positions: every tile is split.
  for (const TileKind tile : {TileKind::narrow, TileKind::tensor64, TileKind::tensor128}) {
    Case<float>({1, 1, 1100, 20, 24}, Strides::rows, 0).run(LinearForm::direct, tile, Precision::float32);
  }
  Case<double>({1, 2, 600, 20, 24}, Strides::rows, 0).run(LinearForm::direct, TileKind::tensor64, Precision::float32);
  Case<float>({1, 1, 129, 260, 132}, Strides::rows, 0).run(LinearForm::direct, TileKind::tensor128, Precision::float32);
  Case<float>({2, 1, 150, 40, 16}, Strides::rows, 0).run(LinearForm::gram, TileKind::tensor128, Precision::float32);
  return testing::report("linear_sq_norms on the emulated device");
}
