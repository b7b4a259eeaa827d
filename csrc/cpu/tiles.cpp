// Picks the register tiles once, by what the processor says of itself.
#include <cape/tiles.h>

namespace cape {

namespace {
#if defined(__x86_64__)
bool wide() { return __builtin_cpu_supports("avx512f"); }
bool medium() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#else
constexpr bool wide() { return false; }
constexpr bool medium() { return false; }
#endif
}  // namespace

template <>
const Tiles<float>& tiles<float>() {
#if defined(__x86_64__)
  static const Tiles<float>* chosen = wide() ? avx512_tiles_f32() : medium() ? avx2_tiles_f32() : portable_tiles_f32();
#else
  static const Tiles<float>* chosen = portable_tiles_f32();
#endif
  return *chosen;
}

template <>
const Tiles<double>& tiles<double>() {
#if defined(__x86_64__)
  static const Tiles<double>* chosen = wide() ? avx512_tiles_f64() : medium() ? avx2_tiles_f64() : portable_tiles_f64();
#else
  static const Tiles<double>* chosen = portable_tiles_f64();
#endif
  return *chosen;
}

}  // namespace cape
