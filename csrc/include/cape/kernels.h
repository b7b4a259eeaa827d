// The kernels of the processor at hand (isa/), behind one table per precision. No torch.
#pragma once

#include <cape/shapes.h>
#include <cape/twister.h>

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
                 const scalar* inverse, const scalar* weight, double* sums, scalar* runs, double* total, scalar* dx);
  // Sums of |x| and of x^2 (isa/sums.h).
  void (*size_sums)(const scalar* x, int64_t n, double* out);
  // Rows times a packed matrix (isa/product.h).
  void (*pack_matrix)(const scalar* w, int64_t k_step, int64_t n_step, int64_t depth, int64_t columns, scalar* panels);
  void (*multiply_rows)(const scalar* a, int64_t a_row, int64_t rows, int64_t depth, const scalar* panels,
                        int64_t columns, const scalar* add, int64_t add_row, scalar* out, int64_t out_row,
                        Scratch<scalar> scratch);
  // The pointwise part of a step of a recurrent cell, for one sample (isa/recurrent.h).
  void (*lstm_step)(scalar* gates, const scalar* c_prev, scalar* c, scalar* h, int64_t n);
  void (*lstm_step_back)(const scalar* gates, const scalar* c_prev, const scalar* c, const scalar* dh,
                         const scalar* grad, int64_t grad_step, scalar* dc, scalar* d_pre, int64_t n,
                         int64_t cotangents, int64_t batch);
  void (*gru_step)(scalar* gates, const scalar* hidden, const scalar* h_prev, scalar* side, scalar* h, int64_t n);
  void (*gru_step_back)(const scalar* gates, const scalar* side, const scalar* h_prev, scalar* dh, const scalar* grad,
                        int64_t grad_step, scalar* d_pre, scalar* d_side, int64_t n, int64_t cotangents, int64_t batch);
  // Batch norm of vectors in train mode, for one model (isa/batch_norm.h).
  void (*batch_norm)(const scalar* x, int64_t rows, int64_t channels, const scalar* weight, const scalar* bias,
                     double eps, int64_t chunk, scalar* y, scalar* mean, scalar* inverse, scalar* parts,
                     double* totals);
  void (*batch_norm_back)(const scalar* grad, const scalar* x, int64_t rows, int64_t channels, const scalar* weight,
                          const scalar* mean, const scalar* inverse, int64_t chunk, scalar* passed, scalar* d_weight,
                          scalar* d_bias, scalar* parts, double* totals);
  // torch's random numbers (isa/draws.h).
  void (*draw_ones)(Twister& twister, uint64_t threshold, scalar* out, int64_t n);
  void (*draw_uniform)(Twister& twister, float* out, int64_t n);
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
