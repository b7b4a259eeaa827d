// CPU kernel of cape::affine_sq_norms: threads over samples; x^ is formed on the way, no sum leaves the thread.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cape/kernels.h>

#include <optional>

namespace {

using at::Tensor;

Tensor affine_sq_norms(const Tensor& g, const Tensor& x, const std::optional<Tensor>& mean, const Tensor& inverse,
                       bool scale, bool shift) {
  TORCH_CHECK(g.dim() == 5 && x.dim() == 4 && g.sizes().slice(1) == x.sizes(),
              "affine_sq_norms: g must be [K, B, R, C, S] and x [B, R, C, S]; got ", g.sizes(), " and ", x.sizes(),
              ".");
  TORCH_CHECK(g.scalar_type() == x.scalar_type() && inverse.scalar_type() == x.scalar_type() &&
                  (!mean || mean->scalar_type() == x.scalar_type()),
              "affine_sq_norms: g, x and the statistics must share one dtype.");
  const int64_t cotangents = g.size(0), batch = x.size(0), rows = x.size(1), channels = x.size(2), s = x.size(3);
  Tensor out = at::empty({cotangents, batch}, g.options().dtype(at::kDouble));
  if (rows == 0 || channels == 0 || s == 0) return out.zero_();
  const Tensor gc = g.contiguous(), xc = x.contiguous();
  // [B, R, C] views with stride 0 where the statistics do not vary.
  const Tensor inv = inverse.expand({batch, rows, channels});
  const Tensor mu = mean ? mean->expand({batch, rows, channels}) : inv;
  TORCH_CHECK(mu.strides() == inv.strides(), "affine_sq_norms: mean and inverse must vary alike.");
  double* result = out.mutable_data_ptr<double>();
  AT_DISPATCH_FLOATING_TYPES(g.scalar_type(), "affine_sq_norms", [&] {
    const auto& kernels = cape::kernels<scalar_t>();
    const cape::AffineShape shape{rows, channels, s, cotangents, inv.stride(1), inv.stride(2), scale, shift};
    const int64_t step = rows * channels * s;
    const scalar_t* g_data = gc.const_data_ptr<scalar_t>();
    const scalar_t* x_data = xc.const_data_ptr<scalar_t>();
    const scalar_t* inv_data = inv.const_data_ptr<scalar_t>();
    const scalar_t* mean_data = mean ? mu.const_data_ptr<scalar_t>() : nullptr;
    const int64_t grain = std::max<int64_t>(1, 16384 / step);
    at::parallel_for(0, batch, grain, [&](int64_t begin, int64_t end) {
      std::vector<double> sums(static_cast<size_t>(2 * channels + cotangents));
      double* total = sums.data() + 2 * channels;
      for (int64_t b = begin; b < end; ++b) {
        const int64_t at = b * inv.stride(0);
        kernels.affine(shape, x_data + b * step, g_data + b * step, batch * step, mean_data ? mean_data + at : nullptr,
                       inv_data + at, sums.data(), total);
        for (int64_t k = 0; k < cotangents; ++k) result[k * batch + b] = total[k];
      }
    });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(cape, CPU, m) { m.impl("affine_sq_norms", &affine_sq_norms); }
