// The kernels of the processor at hand (isa/), behind one table per precision. No torch.
#pragma once

#include <cape/shapes.h>

namespace cape {

template <typename scalar>
struct Kernels {
  TileSize tile;
  const char* name;
  // total[k] for one sample; `form` must not be automatic.
  void (*linear)(Form form, const LinearShape& s, Strided<scalar> a, Strided<scalar> g, int64_t g_step,
                 Scratch<scalar> scratch, double* total);
  // The same; `total` has room for 2 K numbers, of which the last K are scratch.
  void (*conv)(Form form, const ConvShape& s, const scalar* x, const scalar* g, int64_t g_step, Scratch<scalar> scratch,
               double* total);
  void (*affine)(const AffineShape& a, const scalar* x, const scalar* g, int64_t g_step, const scalar* mean,
                 const scalar* inverse, double* sums, double* total);
};

// Defined once per instruction set, by cpu/isa_*.cpp.
#define CAPE_DECLARE_KERNELS(isa)            \
  const Kernels<float>* isa##_kernels_f32(); \
  const Kernels<double>* isa##_kernels_f64();
CAPE_DECLARE_KERNELS(avx512)
CAPE_DECLARE_KERNELS(avx2)
CAPE_DECLARE_KERNELS(portable)
#undef CAPE_DECLARE_KERNELS

// The widest kernels that this processor runs.
template <typename scalar>
const Kernels<scalar>& kernels();

}  // namespace cape
