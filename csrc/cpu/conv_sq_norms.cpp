// CPU kernel of cape::conv_sq_norms: threads over samples, each in the form that the cost model chose.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cape/kernels.h>

#include "form.h"
#include "scratch.h"

namespace {

using at::IntArrayRef;
using at::Tensor;

cape::ConvShape shape_of(const Tensor& x, const Tensor& g, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding,
                         IntArrayRef dilation, int64_t groups) {
  const int64_t spatial = int64_t(kernel.size());
  TORCH_CHECK(spatial >= 1 && spatial <= 3 && int64_t(stride.size()) == spatial && int64_t(padding.size()) == spatial &&
                  int64_t(dilation.size()) == spatial,
              "conv_sq_norms: kernel, stride, padding and dilation must have 1 to 3 entries each.");
  TORCH_CHECK(x.dim() == spatial + 3 && g.dim() == spatial + 4,
              "conv_sq_norms: x must be [B, F, C, *S] and g [K, B, F, O, *L]; got ", x.sizes(), " and ", g.sizes(),
              ".");
  TORCH_CHECK(x.size(0) == g.size(1) && x.size(1) == g.size(2), "conv_sq_norms: x ", x.sizes(), " and g ", g.sizes(),
              " must agree in B and F.");
  TORCH_CHECK(x.scalar_type() == g.scalar_type(), "conv_sq_norms: x is ", x.scalar_type(), " but g is ",
              g.scalar_type(), ".");
  TORCH_CHECK(groups >= 1 && x.size(2) % groups == 0 && g.size(3) % groups == 0, "conv_sq_norms: ", groups,
              " groups do not divide ", x.size(2), " and ", g.size(3), " channels.");
  cape::ConvShape s{x.size(1), x.size(2), g.size(3), groups,    {1, 1, 1}, {1, 1, 1},
                    {1, 1, 1}, {0, 0, 0}, {1, 1, 1}, {1, 1, 1}, g.size(0)};
  for (int64_t i = 0; i < spatial; ++i) {
    const int64_t to = 3 - spatial + i;
    s.size[to] = x.size(3 + i);
    s.kernel[to] = kernel[i];
    s.stride[to] = stride[i];
    s.padding[to] = padding[i];
    s.dilation[to] = dilation[i];
    s.out[to] = g.size(4 + i);
    TORCH_CHECK(s.kernel[to] >= 1 && s.stride[to] >= 1 && s.padding[to] >= 0 && s.dilation[to] >= 1 &&
                    (s.out[to] == 0 || (s.out[to] - 1) * s.stride[to] + (s.kernel[to] - 1) * s.dilation[to] <
                                           s.size[to] + 2 * s.padding[to]),
                "conv_sq_norms: windows of kernel ", kernel, ", stride ", stride, ", padding ", padding, ", dilation ",
                dilation, " over ", x.sizes(), " do not reach the positions of ", g.sizes(), ".");
  }
  return s;
}

// The CPU always works in the tensors' own precision, whatever lower one is allowed.
Tensor conv_sq_norms(const Tensor& x, const Tensor& g, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding,
                     IntArrayRef dilation, int64_t groups, c10::string_view, c10::string_view form_name) {
  const cape::ConvShape s = shape_of(x, g, kernel, stride, padding, dilation, groups);
  const int64_t batch = x.size(0), cotangents = g.size(0);
  Tensor out = at::empty({cotangents, batch}, x.options().dtype(at::kDouble));
  if (s.positions() == 0 || s.channels == 0 || s.outputs == 0) return out.zero_();
  const Tensor xc = x.contiguous(), gc = g.contiguous();
  double* result = out.mutable_data_ptr<double>();
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "conv_sq_norms", [&] {
    const auto& kernels = cape::kernels<scalar_t>();
    cape::Form form = cape::form_of({form_name.data(), form_name.size()});
    if (form == cape::Form::automatic) form = cape::choose(kernels.tile, s);
    TORCH_CHECK((form != cape::Form::shifted || s.dense()) && (form != cape::Form::winograd || s.three_by_three()) &&
                    (form != cape::Form::channelwise || (s.group_channels() == 1 && s.group_outputs() == 1)),
                "conv_sq_norms: this convolution has no form '", form_name, "'.");
    const scalar_t* x_data = xc.const_data_ptr<scalar_t>();
    const scalar_t* g_data = gc.const_data_ptr<scalar_t>();
    const int64_t x_step = s.frames * s.channels * s.pixels(), g_step = s.outputs * s.positions();
    at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      std::vector<double> total(static_cast<size_t>(2 * cotangents));
      const auto scratch = cape::scratch<scalar_t>(cape::scratch_of(kernels.tile, form, s));
      for (int64_t b = begin; b < end; ++b) {
        kernels.conv(form, s, x_data + b * x_step, g_data + b * g_step, batch * g_step, scratch, total.data());
        for (int64_t k = 0; k < cotangents; ++k) result[k * batch + b] = total[size_t(k)];
      }
    });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(cape, CPU, m) { m.impl("conv_sq_norms", &conv_sq_norms); }
