// The kernels for one instruction set: CMakeLists.txt compiles this file with the flags of its name.
#define CAPE_ISA portable
#define CAPE_VECTOR_BYTES 16
#define CAPE_TILE_ROWS 4
#include <cape/isa/table.h>

namespace cape {

const Kernels<float>* portable_kernels_f32() {
  static constexpr Kernels<float> kernels = CAPE_ISA::table<float>("portable");
  return &kernels;
}
const Kernels<double>* portable_kernels_f64() {
  static constexpr Kernels<double> kernels = CAPE_ISA::table<double>("portable");
  return &kernels;
}

}  // namespace cape
