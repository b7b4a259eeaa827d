// CPU kernel of cape::conv_sq_norms: threads over samples, each in the form that the cost model chose.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cape/kernels.h>

#include "../conv_arguments.h"
#include "cancelled.h"
#include "form.h"
#include "scratch.h"

namespace {

using at::IntArrayRef;
using at::Tensor;

// The CPU always works in the tensors' own precision, whatever lower one is allowed.
Tensor conv_sq_norms(const Tensor& x, const Tensor& g, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding,
                     IntArrayRef dilation, int64_t groups, c10::string_view, c10::string_view form_name) {
  const cape::ConvShape s = cape::conv_shape_of(x, g, kernel, stride, padding, dilation, groups);
  const int64_t batch = x.size(0), cotangents = g.size(0);
  Tensor out = at::empty({cotangents, batch}, x.options().dtype(at::kDouble));
  if (s.positions() == 0 || s.channels == 0 || s.outputs == 0) return out.zero_();
  const Tensor xc = x.contiguous(), gc = g.contiguous();
  double* result = out.mutable_data_ptr<double>();
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "conv_sq_norms", [&] {
    const auto& kernels = cape::kernels<scalar_t>();
    cape::Form form = cape::form_of({form_name.data(), form_name.size()});
    const bool chosen = form == cape::Form::automatic;
    if (chosen) form = cape::choose(kernels.tile, s);
    const bool signed_terms = chosen && (form == cape::Form::gram || form == cape::Form::shifted) && s.positions() > 1;
    TORCH_CHECK((form != cape::Form::shifted || s.dense()) && (form != cape::Form::winograd || s.three_by_three()) &&
                    (form != cape::Form::channelwise || (s.group_channels() == 1 && s.group_outputs() == 1)),
                "conv_sq_norms: this convolution has no form '", form_name, "'.");
    const scalar_t* x_data = xc.const_data_ptr<scalar_t>();
    const scalar_t* g_data = gc.const_data_ptr<scalar_t>();
    const int64_t x_step = s.frames * s.channels * s.pixels(), g_step = s.outputs * s.positions();
    at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      std::vector<double> total(static_cast<size_t>(2 * cotangents));
      const auto norms = [&](cape::Form one, int64_t b) {
        const auto scratch = cape::scratch<scalar_t>(cape::scratch_of(kernels.tile, one, s));
        kernels.conv(one, s, x_data + b * x_step, g_data + b * g_step, batch * g_step, scratch, total.data());
      };
      for (int64_t b = begin; b < end; ++b) {
        norms(form, b);
        if (signed_terms && cape::cancelled(s, x_data + b * x_step, g_data + b * g_step, batch * g_step, total)) {
          norms(cape::Form::direct, b);
        }
        for (int64_t k = 0; k < cotangents; ++k) result[k * batch + b] = total[size_t(k)];
      }
    });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(cape, CPU, m) { m.impl("conv_sq_norms", &conv_sq_norms); }
