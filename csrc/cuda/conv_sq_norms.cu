// cape::conv_sq_norms on CUDA; see the .cuh for the kernels.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <string>

#include <cape/conv_sq_norms.cuh>

#include "../conv_arguments.h"
#include "launch.h"

namespace {

using at::IntArrayRef;
using at::Tensor;
using cape::cuda::ConvForm;

cape::ConvShape shape_of(const Tensor& x, const Tensor& g, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding,
                         IntArrayRef dilation, int64_t groups) {
  const cape::ConvShape s = cape::conv_shape_of(x, g, kernel, stride, padding, dilation, groups);
  constexpr int64_t kMost = (int64_t(1) << 31) - 1;
  TORCH_CHECK(s.positions() <= kMost - 128 && s.frames * s.pixels() <= kMost - 128 &&
                  s.group_channels() * s.taps() <= kMost - 128,
              "conv_sq_norms: a sample of ", x.sizes(), " has too many pixels for the CUDA kernels (2^31).");
  return s;
}

// The tensor itself where its images are contiguous (any strides above), else a copy.
Tensor with_contiguous_images(const Tensor& x, int64_t spatial) {
  int64_t expected = 1;
  for (int64_t i = x.dim() - 1; i >= x.dim() - spatial; expected *= x.size(i), --i) {
    if (x.size(i) != 1 && x.stride(i) != expected) return x.contiguous();
  }
  return x;
}

ConvForm form_of(c10::string_view form) {
  if (form == "direct") return ConvForm::direct;
  if (form == "gram") return ConvForm::gram;
  if (form == "shifted") return ConvForm::shifted;
  if (form == "narrow") return ConvForm::narrow;
  TORCH_CHECK(form == "auto", "Unknown form '", form, "'. Known: auto, direct, gram, shifted, narrow.");
  return ConvForm::automatic;
}

const char* name_of(ConvForm form) {
  switch (form) {
    case ConvForm::gram:
      return "gram";
    case ConvForm::shifted:
      return "shifted";
    case ConvForm::narrow:
      return "narrow";
    default:
      return "direct";
  }
}

bool is_linear(const cape::ConvShape& s) {
  bool plain = s.taps() == 1 && s.frames == 1 && s.groups == 1;
  for (size_t i = 0; i < 3; ++i) plain = plain && s.stride[i] == 1 && s.padding[i] == 0;
  return plain && s.pixels() == s.positions();
}

template <typename scalar_t>
cape::cuda::ConvProblem<scalar_t> problem_of(const cape::ConvShape& s, const Tensor& x, const Tensor& g) {
  const cape::cuda::ConvData<scalar_t> data(s, x.const_data_ptr<scalar_t>(), {x.stride(0), x.stride(1), x.stride(2)},
                                            g.const_data_ptr<scalar_t>(),
                                            {g.stride(0), g.stride(1), g.stride(2), g.stride(3)});
  return {s, data, g.size(0), g.size(1)};
}

Tensor conv_sq_norms(const Tensor& x, const Tensor& g, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding,
                     IntArrayRef dilation, int64_t groups, c10::string_view precision, c10::string_view form) {
  const cape::ConvShape s = shape_of(x, g, kernel, stride, padding, dilation, groups);
  const ConvForm wanted = form_of(form);
  const auto arithmetic = cape::cuda::precision_of(precision);
  const auto options = x.options().dtype(at::kDouble);
  if (x.numel() == 0 || g.numel() == 0) return at::zeros({g.size(0), g.size(1)}, options);
  const int64_t spatial = int64_t(kernel.size());
  const c10::cuda::CUDAGuard device(x.device());
  const Tensor xc = with_contiguous_images(x, spatial), gc = with_contiguous_images(g, spatial);
  if (wanted == ConvForm::automatic && is_linear(s)) {  // positions are the rows of a linear map
    return cape::cuda::linear_sq_norms_on_device(xc.select(1, 0).flatten(2).transpose(1, 2),
                                                 gc.select(2, 0).flatten(3).transpose(2, 3), precision, "auto");
  }
  cape::cuda::StreamLaunch launch(x);
  Tensor out = at::empty({g.size(0), g.size(1)}, options);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "conv_sq_norms", [&] {
    cape::cuda::conv_sq_norms(launch, problem_of<scalar_t>(s, xc, gc), arithmetic, wanted,
                              out.mutable_data_ptr<double>());
  });
  return out;
}

// The form that the time model chooses, for calibrating it.
std::string conv_form(const Tensor& x, const Tensor& g, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding,
                      IntArrayRef dilation, int64_t groups, c10::string_view precision) {
  const cape::ConvShape s = shape_of(x, g, kernel, stride, padding, dilation, groups);
  if (x.numel() == 0 || g.numel() == 0) return name_of(ConvForm::automatic);  // nothing is launched
  const cape::cuda::StreamLaunch launch(x);
  std::string name;
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "conv_sq_norms", [&] {
    cape::cuda::with_conv_choice(problem_of<scalar_t>(s, x, g), cape::cuda::precision_of(precision),
                                 ConvForm::automatic, launch.processors(), launch.shared_limit(),
                                 [&](auto, cape::cuda::ConvChoice choice) { name = name_of(choice.form); });
  });
  return name;
}

}  // namespace

TORCH_LIBRARY_IMPL(cape, CUDA, m) {
  m.impl("conv_sq_norms", &conv_sq_norms);
  m.impl("_conv_form", &conv_form);
}
