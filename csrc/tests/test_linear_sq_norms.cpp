// The plain kernels against the definition, in float64, over awkward sizes, strides and values.
#include <cape/linear_sq_norms.h>

#include <cmath>
#include <cstdio>
#include <random>

namespace {

int failures = 0;

void expect(bool ok, const char* what, int64_t t, int64_t d, int64_t p, double got, double want) {
  if (ok) return;
  ++failures;
  std::printf("FAIL %s T=%ld d=%ld p=%ld: got %.17g, want %.17g\n", what, long(t), long(d), long(p), got, want);
}

double definition(const cape::MatrixView<double>& a, const cape::MatrixView<double>& g, int64_t t, int64_t d,
                  int64_t p) {
  double total = 0.0;
  for (int64_t i = 0; i < d; ++i) {
    for (int64_t j = 0; j < p; ++j) {
      double entry = 0.0;
      for (int64_t s = 0; s < t; ++s) entry += a(s, i) * g(s, j);
      total += entry * entry;
    }
  }
  return total;
}

template <typename scalar>
void compare(int64_t t, int64_t d, int64_t p, bool transposed, double tolerance) {
  std::mt19937_64 rng(uint64_t(t * 1000003 + d * 1009 + p));
  std::normal_distribution<double> normal;
  std::vector<double> a64(size_t(t * d)), g64(size_t(t * p));
  for (double& v : a64) v = double(scalar(normal(rng)));
  for (double& v : g64) v = double(scalar(normal(rng)));
  const std::vector<scalar> a(a64.begin(), a64.end()), g(g64.begin(), g64.end());
  const int64_t ar = transposed ? 1 : d, ac = transposed ? t : 1;
  const int64_t gr = transposed ? 1 : p, gc = transposed ? t : 1;
  const double want = definition({a64.data(), ar, ac}, {g64.data(), gr, gc}, t, d, p);
  const cape::MatrixView<scalar> av{a.data(), ar, ac}, gv{g.data(), gr, gc};
  std::vector<scalar> scratch;
  const double direct = cape::linear_sq_norm_direct(av, gv, t, d, p, scratch);
  const double gram = cape::linear_sq_norm_gram(av, gv, t, d, p);
  const double chosen = cape::linear_sq_norm(av, gv, t, d, p, scratch);
  const auto close = [&](double got) { return std::abs(got - want) <= tolerance * std::max(want, 1e-300); };
  expect(close(direct), "direct", t, d, p, direct, want);
  expect(close(gram), "gram", t, d, p, gram, want);
  expect(close(chosen), "chosen", t, d, p, chosen, want);
  expect(chosen == cape::linear_sq_norm(av, gv, t, d, p, scratch), "repeatable", t, d, p, chosen, chosen);
}

}  // namespace

int main() {
  for (int64_t t : {1, 2, 7, 33}) {
    for (int64_t d : {1, 3, 17, 64}) {
      for (int64_t p : {1, 5, 31}) {
        for (bool transposed : {false, true}) {
          compare<float>(t, d, p, transposed, 1e-5);
          compare<double>(t, d, p, transposed, 1e-12);
        }
      }
    }
  }
  std::vector<double> scratch;
  const double empty = cape::linear_sq_norm<double>({nullptr, 3, 1}, {nullptr, 2, 1}, 0, 3, 2, scratch);
  expect(empty == 0.0, "T=0 is zero", 0, 3, 2, empty, 0.0);
  expect(cape::choose_form(1, 512, 512) == cape::Form::gram, "T=1 chooses Gram", 1, 512, 512, 0, 0);
  expect(cape::choose_form(1024, 3, 64) == cape::Form::direct, "long T chooses direct", 1024, 3, 64, 0, 0);
  if (failures == 0) std::printf("all plain kernels agree with the definition\n");
  return failures == 0 ? 0 : 1;
}
