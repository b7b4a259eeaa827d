// Picks the kernels once, by what the processor says of itself.
#include <cape/kernels.h>

namespace cape {

namespace {
#if defined(__x86_64__)
bool wide() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}
bool medium() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif
}  // namespace

template <>
const Kernels<float>& kernels<float>() {
#if defined(__x86_64__)
  static const Kernels<float>* chosen = wide()     ? avx512_kernels_f32()
                                        : medium() ? avx2_kernels_f32()
                                                   : portable_kernels_f32();
#else
  static const Kernels<float>* chosen = portable_kernels_f32();
#endif
  return *chosen;
}

template <>
const Kernels<double>& kernels<double>() {
#if defined(__x86_64__)
  static const Kernels<double>* chosen = wide()     ? avx512_kernels_f64()
                                         : medium() ? avx2_kernels_f64()
                                                    : portable_kernels_f64();
#else
  static const Kernels<double>* chosen = portable_kernels_f64();
#endif
  return *chosen;
}

}  // namespace cape
