// The kernels for one instruction set: CMakeLists.txt compiles this file with the flags of its name.
#define CAPE_ISA avx512
#define CAPE_VECTOR_BYTES 64
#define CAPE_TILE_ROWS 8
#include <cape/isa/table.h>

namespace cape {

const Kernels<float>* avx512_kernels_f32() {
  static constexpr Kernels<float> kernels = CAPE_ISA::table<float>("avx512");
  return &kernels;
}
const Kernels<double>* avx512_kernels_f64() {
  static constexpr Kernels<double> kernels = CAPE_ISA::table<double>("avx512");
  return &kernels;
}

}  // namespace cape
