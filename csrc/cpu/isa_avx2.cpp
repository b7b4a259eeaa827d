// The kernels for one instruction set: CMakeLists.txt compiles this file with the flags of its name.
#define CAPE_ISA avx2
#define CAPE_VECTOR_BYTES 32
#define CAPE_TILE_ROWS 4
#include <cape/isa/table.h>

namespace cape {

const Kernels<float>* avx2_kernels_f32() {
  static constexpr Kernels<float> kernels = CAPE_ISA::table<float>("avx2");
  return &kernels;
}
const Kernels<double>* avx2_kernels_f64() {
  static constexpr Kernels<double> kernels = CAPE_ISA::table<double>("avx2");
  return &kernels;
}

}  // namespace cape
