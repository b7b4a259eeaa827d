// The arguments of cape::conv_sq_norms, checked once for every device.
#pragma once

#include <ATen/core/Tensor.h>

#include <cape/shapes.h>

namespace cape {

// What a convolution of x [B, F, C, *S] with output gradients g [K, B, F, O, *L] is; raises where they cannot be one.
inline ConvShape conv_shape_of(const at::Tensor& x, const at::Tensor& g, at::IntArrayRef kernel, at::IntArrayRef stride,
                               at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  const int64_t spatial = int64_t(kernel.size());
  TORCH_CHECK(spatial >= 1 && spatial <= 3 && int64_t(stride.size()) == spatial && int64_t(padding.size()) == spatial &&
                  int64_t(dilation.size()) == spatial,
              "conv_sq_norms: kernel, stride, padding and dilation must have 1 to 3 entries each.");
  TORCH_CHECK(x.dim() == spatial + 3 && g.dim() == spatial + 4,
              "conv_sq_norms: x must be [B, F, C, *S] and g [K, B, F, O, *L]; got ", x.sizes(), " and ", g.sizes(),
              ".");
  TORCH_CHECK(x.size(0) == g.size(1) && x.size(1) == g.size(2), "conv_sq_norms: x ", x.sizes(), " and g ", g.sizes(),
              " must agree in B and F.");
  TORCH_CHECK(x.scalar_type() == g.scalar_type() && x.device() == g.device(), "conv_sq_norms: x is ", x.scalar_type(),
              " on ", x.device(), " but g is ", g.scalar_type(), " on ", g.device(), ".");
  TORCH_CHECK(groups >= 1 && x.size(2) % groups == 0 && g.size(3) % groups == 0, "conv_sq_norms: ", groups,
              " groups do not divide ", x.size(2), " and ", g.size(3), " channels.");
  ConvShape s{x.size(1), x.size(2), g.size(3), groups,    {1, 1, 1}, {1, 1, 1},
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

}  // namespace cape
