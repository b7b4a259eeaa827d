// The kernels of one instruction set, as a table.
#pragma once

#include <cape/isa/affine.h>
#include <cape/isa/batch_norm.h>
#include <cape/isa/conv.h>
#include <cape/isa/draws.h>
#include <cape/isa/linear.h>
#include <cape/isa/product.h>
#include <cape/isa/recurrent.h>
#include <cape/isa/sums.h>
#include <cape/isa/winograd.h>
#include <cape/kernels.h>

namespace cape {
namespace CAPE_ISA {

template <typename scalar>
void linear(Form form, const LinearShape& s, Strided<scalar> a, Strided<scalar> g, int64_t g_step,
            Scratch<scalar> scratch, double* total) {
  return form == Form::gram ? linear_gram(s, a, g, g_step, scratch, total)
                            : linear_direct(s, a, g, g_step, scratch, total);
}

template <typename scalar>
void conv(Form form, const ConvShape& s, const scalar* x, const scalar* g, int64_t g_step, Scratch<scalar> scratch,
          double* total) {
  for (int64_t k = 0; k < s.cotangents; ++k) total[k] = 0.0;
  switch (form) {
    case Form::gram:
      return conv_gram(s, x, g, g_step, scratch, total, total + s.cotangents);
    case Form::shifted:
      return conv_shifted(s, x, g, g_step, scratch, total);
    case Form::winograd:
      return conv_winograd(s, x, g, g_step, scratch, total);
    case Form::channelwise:
      return conv_channelwise(s, x, g, g_step, scratch, total);
    case Form::narrow:
      return conv_narrow(s, x, g, g_step, total);
    default:
      return conv_direct(s, x, g, g_step, scratch, total);
  }
}

template <typename scalar>
constexpr Kernels<scalar> table(const char* name) {
  return {{Tile<scalar>::kRows, Tile<scalar>::kWidth},
          name,
          linear<scalar>,
          conv<scalar>,
          affine<scalar>,
          size_sums<scalar>,
          pack_matrix<scalar>,
          multiply_rows<scalar>,
          lstm_step<scalar>,
          lstm_step_back<scalar>,
          gru_step<scalar>,
          gru_step_back<scalar>,
          batch_norm<scalar>,
          batch_norm_back<scalar>,
          draw_ones<scalar>,
          draw_uniform};
}

}  // namespace CAPE_ISA
}  // namespace cape
