// cape::_pair_sums and cape::affine_sq_norms on CUDA; see the .cuh for the kernels.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/square.h>
#include <ATen/ops/sub.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cape/pair_sums.cuh>

#include <optional>

#include "launch.h"

namespace {

// g [K, B, R, C, S], x [B, R, C, S] -> float64 [2, K, B, C].
at::Tensor pair_sums(const at::Tensor& g, const at::Tensor& x) {
  TORCH_CHECK(g.dim() == 5 && x.dim() == 4 && g.sizes().slice(1) == x.sizes(),
              "pair_sums: g must be [K, B, R, C, S] and x [B, R, C, S]; got ", g.sizes(), " and ", x.sizes(), ".");
  TORCH_CHECK(g.scalar_type() == x.scalar_type() && g.device() == x.device(),
              "pair_sums: g and x must share dtype and device.");
  const int64_t count = x.size(1) * x.size(3);
  TORCH_CHECK(count < (int64_t(1) << 31), "pair_sums: ", count,
              " numbers per channel are more than the CUDA kernels count (2^31 - 1).");
  const auto options = g.options().dtype(at::kDouble);
  if (g.numel() == 0) return at::zeros({2, g.size(0), g.size(1), g.size(3)}, options);
  cape::cuda::StreamLaunch launch(g);
  at::Tensor out = at::empty({2, g.size(0), g.size(1), g.size(3)}, options);
  AT_DISPATCH_FLOATING_TYPES(g.scalar_type(), "pair_sums", [&] {
    const cape::cuda::PairProblem<scalar_t> problem{g.const_data_ptr<scalar_t>(),
                                                    x.const_data_ptr<scalar_t>(),
                                                    g.stride(0),
                                                    g.stride(1),
                                                    g.stride(2),
                                                    g.stride(3),
                                                    g.stride(4),
                                                    x.stride(0),
                                                    x.stride(1),
                                                    x.stride(2),
                                                    x.stride(3),
                                                    g.size(0),
                                                    x.size(0),
                                                    x.size(2),
                                                    count,
                                                    cape::cuda::FastDivision(x.size(3))};
    cape::cuda::pair_sums(launch, problem, out.mutable_data_ptr<double>());
  });
  return out;
}

// x^ is formed first (statistics may vary from row to row); both sums then come from one pass over g and x^.
at::Tensor affine_sq_norms(const at::Tensor& g, const at::Tensor& x, const std::optional<at::Tensor>& mean,
                           const at::Tensor& inverse, bool scale, bool shift) {
  if (!scale && !shift) return at::zeros({g.size(0), g.size(1)}, g.options().dtype(at::kDouble));
  const at::Tensor centred = mean ? x.sub(mean->unsqueeze(-1)) : x;
  const at::Tensor squares = pair_sums(g, scale ? centred.mul(inverse.unsqueeze(-1)) : x).square().sum({3});
  if (scale && shift) return squares.sum({0});
  return squares.select(0, scale ? 1 : 0).contiguous();
}

}  // namespace

TORCH_LIBRARY_IMPL(cape, CUDA, m) {
  m.impl("_pair_sums", &pair_sums);
  m.impl("affine_sq_norms", &affine_sq_norms);
}
