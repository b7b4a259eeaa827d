// cape::linear_sq_norms on CUDA; see the .cuh for the kernels.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/square.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <iterator>
#include <string>
#include <vector>

#include <cape/linear_sq_norms.cuh>

#include "launch.h"

namespace cape::cuda {

using at::Tensor;

Tensor linear_sq_norms_on_device(const Tensor& a, const Tensor& g, std::string_view precision, std::string_view form) {
  TORCH_CHECK(a.dim() == 3 && g.dim() == 4, "linear_sq_norms: a must be [B, T, d] and g [K, B, T, p]; got ", a.sizes(),
              " and ", g.sizes(), ".");
  TORCH_CHECK(a.size(0) == g.size(1) && a.size(1) == g.size(2), "linear_sq_norms: a ", a.sizes(), " and g ", g.sizes(),
              " must agree in samples and positions.");
  TORCH_CHECK(a.scalar_type() == g.scalar_type() && a.device() == g.device(),
              "linear_sq_norms: a and g must share dtype and device.");
  TORCH_CHECK(form == "auto" || form == "direct" || form == "gram", "Unknown form '", form,
              "'. Known: auto, direct, gram.");
  const Precision arithmetic = precision_of(precision);
  const auto options = a.options().dtype(at::kDouble);
  if (a.numel() == 0 || g.numel() == 0) return at::zeros({g.size(0), g.size(1)}, options);
  StreamLaunch launch(a);
  Tensor out = at::empty({g.size(0), g.size(1)}, options);
  AT_DISPATCH_FLOATING_TYPES(a.scalar_type(), "linear_sq_norms", [&] {
    const LinearProblem<scalar_t> problem{a.const_data_ptr<scalar_t>(),
                                          g.const_data_ptr<scalar_t>(),
                                          a.stride(0),
                                          a.stride(1),
                                          a.stride(2),
                                          g.stride(0),
                                          g.stride(1),
                                          g.stride(2),
                                          g.stride(3),
                                          g.size(0),
                                          a.size(0),
                                          a.size(1),
                                          a.size(2),
                                          g.size(3)};
    linear_sq_norms(launch, problem, arithmetic,
                    form == "direct" ? LinearForm::direct
                    : form == "gram" ? LinearForm::gram
                                     : LinearForm::automatic,
                    out.mutable_data_ptr<double>());
  });
  return out;
}

}  // namespace cape::cuda

namespace {

at::Tensor linear_sq_norms(const at::Tensor& a, const at::Tensor& g, int64_t biases, c10::string_view precision,
                           c10::string_view form) {
  const at::Tensor weight = cape::cuda::linear_sq_norms_on_device(a, g, precision, form);
  if (biases == 0) return weight;
  return weight.add(g.sum({2}).to(at::kDouble).square().sum({2}), double(biases));
}

// The form that the time model chooses, for calibrating it.
std::string linear_form(const at::Tensor& a, const at::Tensor& g, c10::string_view precision) {
  const cape::cuda::StreamLaunch launch(a);
  const auto choice =
      cape::cuda::choose_linear(cape::cuda::time_model(), g.size(0), a.size(0), a.size(1), a.size(2), g.size(3),
                                cape::cuda::precision_of(precision), a.scalar_type() == at::kDouble,
                                double(launch.processors()), cape::cuda::LinearForm::automatic);
  return choice.form == cape::cuda::LinearForm::gram ? "gram" : "direct";
}

// Replace the constants of the time model (in the order of its members) unless `constants` is empty; return them.
std::vector<double> cuda_time_model(const at::Tensor&, at::ArrayRef<double> constants) {
  cape::cuda::TimeModel& m = cape::cuda::time_model();
  double* const members[] = {&m.launch,      &m.rate_3xtf32, &m.rate_tf32, &m.rate_bf16,
                             &m.rate_simt32, &m.rate_simt64, &m.copies,    &m.gathers};
  TORCH_CHECK(constants.empty() || constants.size() == std::size(members), "The time model has ", std::size(members),
              " constants, not ", constants.size(), ".");
  std::vector<double> now;
  for (size_t i = 0; i < std::size(members); ++i) {
    if (!constants.empty()) *members[i] = constants[i];
    now.push_back(*members[i]);
  }
  return now;
}

}  // namespace

TORCH_LIBRARY_IMPL(cape, CUDA, m) {
  m.impl("linear_sq_norms", &linear_sq_norms);
  m.impl("_linear_form", &linear_form);
  m.impl("_cuda_time_model", &cuda_time_model);
}
