// What the tests of the CUDA kernels share: numbers between guard bands, both copy orders, and a report.
#pragma once

#include <cstdio>
#include <random>
#include <string>

#include <cuda_on_cpu.h>

namespace testing {

inline int failures = 0;
inline int checks = 0;

inline std::mt19937_64& generator() {
  static std::mt19937_64 g(0);
  return g;
}

// Normal numbers with NaN before and after them: a kernel that reads outside is seen. data() is a multiple of 16 bytes
// plus `shift` numbers.
template <typename scalar>
class Numbers {
 public:
  explicit Numbers(int64_t n, int64_t shift = 0) : all_(size_t(n + 2 * kGuard + 4), scalar(NAN)) {
    const auto misaligned = int64_t(reinterpret_cast<uintptr_t>(all_.data()) % 16 / sizeof(scalar));
    const int64_t per = 16 / int64_t(sizeof(scalar));
    begin_ = kGuard + (per - misaligned) % per + shift;
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < n; ++i) data()[i] = scalar(normal(generator()));
  }
  scalar* data() { return all_.data() + begin_; }

 private:
  static constexpr int64_t kGuard = 256;
  std::vector<scalar> all_;
  int64_t begin_;
};

inline void check(bool ok, const std::string& what, double got, double want) {
  ++checks;
  if (ok) return;
  ++failures;
  if (failures < 20) std::printf("FAIL %s: got %.17g, want %.17g\n", what.c_str(), got, want);
}

inline void check_close(double got, double want, double tolerance, const std::string& what) {
  check(std::abs(got - want) <= tolerance * std::abs(want) + 1e-300, what, got, want);
}

// Run `compute(out)` under every order of threads and copies; the bits must not depend on it.
template <class Compute>
std::vector<double> in_every_order(int64_t n, const std::string& what, Compute compute) {
  std::vector<double> first;
  for (const bool eager : {false, true}) {
    emulation::machine().eager_copies = eager;
    emulation::machine().backwards = eager;
    std::vector<double> out(size_t(n), -1.0);
    compute(out.data());
    if (!eager) first = out;
    for (int64_t i = 0; i < n; ++i) {
      const double a = first[size_t(i)], b = out[size_t(i)];
      if (!(a == b) && !(std::isnan(a) && std::isnan(b))) check(false, what + " depends on the order", b, a);
    }
  }
  return first;
}

inline int report(const char* name) {
  std::printf("%s: %d checks, %d failures\n", name, checks, failures);
  return failures == 0 && checks > 0 ? 0 : 1;
}

}  // namespace testing
