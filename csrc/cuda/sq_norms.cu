// cape::sq_norms on CUDA; see the .cuh for the kernel.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cape/sq_norms.cuh>

#include "launch.h"

namespace {

at::Tensor sq_norms(const at::Tensor& x) {
  TORCH_CHECK(x.dim() == 2, "sq_norms: x must be [N, n]; got ", x.sizes(), ".");
  const auto options = x.options().dtype(at::kDouble);
  if (x.numel() == 0) return at::zeros({x.size(0)}, options);
  cape::cuda::StreamLaunch launch(x);
  at::Tensor out = at::empty({x.size(0)}, options);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "sq_norms", [&] {
    cape::cuda::sq_norms(launch, x.const_data_ptr<scalar_t>(), x.stride(0), x.stride(1), x.size(0), x.size(1),
                         out.mutable_data_ptr<double>());
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(cape, CUDA, m) { m.impl("sq_norms", &sq_norms); }
