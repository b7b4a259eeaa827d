// CPU kernels of cape::affine_sq_norms and cape::affine_pull: threads over samples; x^ is formed on the way, no sum
// leaves the thread.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cape/kernels.h>

#include <optional>
#include <tuple>

namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

void check(const Tensor& g, const Tensor& x, const MaybeTensor& mean, const Tensor& inverse) {
  TORCH_CHECK(g.dim() == 5 && x.dim() == 4 && g.sizes().slice(1) == x.sizes(),
              "affine_sq_norms: g must be [K, B, R, C, S] and x [B, R, C, S]; got ", g.sizes(), " and ", x.sizes(),
              ".");
  TORCH_CHECK(g.scalar_type() == x.scalar_type() && inverse.scalar_type() == x.scalar_type() &&
                  (!mean || mean->scalar_type() == x.scalar_type()),
              "affine_sq_norms: g, x and the statistics must share one dtype.");
}

// Norms into out [K, B]; gradients pulled back into dx, [K, B, R, C, S] contiguous, unless it is not defined.
void run(const Tensor& g, const Tensor& x, const MaybeTensor& mean, const Tensor& inverse, const MaybeTensor& weight,
         bool scale, bool shift, bool own, const Tensor& out, const Tensor& dx) {
  const int64_t cotangents = g.size(0), batch = x.size(0), rows = x.size(1), channels = x.size(2), s = x.size(3);
  if (batch == 0 || rows == 0 || channels == 0 || s == 0) {
    out.zero_();
    return;
  }
  const Tensor gc = g.contiguous(), xc = x.contiguous();
  // [B, R, C] views with stride 0 where the statistics do not vary; channels side by side where they do.
  const auto spread = [&](const Tensor& t) {
    const Tensor wide = t.expand({batch, rows, channels});
    return wide.stride(2) > 1 ? wide.contiguous() : wide;
  };
  Tensor inv = spread(inverse), mu = mean ? spread(*mean) : inv;
  if (mu.strides() != inv.strides()) {  // the kernels step through both alike
    inv = inv.contiguous();
    mu = mu.contiguous();
  }
  const Tensor w = weight ? weight->contiguous() : inv;
  double* result = out.mutable_data_ptr<double>();
  AT_DISPATCH_FLOATING_TYPES(g.scalar_type(), "affine_sq_norms", [&] {
    const auto& kernels = cape::kernels<scalar_t>();
    const cape::AffineShape shape{rows, channels, s, cotangents, inv.stride(1), inv.stride(2), scale, shift, own};
    const int64_t step = rows * channels * s;
    const scalar_t* g_data = gc.const_data_ptr<scalar_t>();
    const scalar_t* x_data = xc.const_data_ptr<scalar_t>();
    const scalar_t* inv_data = inv.const_data_ptr<scalar_t>();
    const scalar_t* mean_data = mean ? mu.const_data_ptr<scalar_t>() : nullptr;
    const scalar_t* w_data = weight ? w.const_data_ptr<scalar_t>() : nullptr;
    scalar_t* dx_data = dx.defined() ? dx.mutable_data_ptr<scalar_t>() : nullptr;
    const int64_t grain = std::max<int64_t>(1, 16384 / step);
    at::parallel_for(0, batch, grain, [&](int64_t begin, int64_t end) {
      std::vector<double> sums(static_cast<size_t>((2 * channels + 1) * cotangents));
      std::vector<scalar_t> runs(static_cast<size_t>(2 * channels));
      double* total = sums.data() + 2 * channels * cotangents;
      for (int64_t b = begin; b < end; ++b) {
        const int64_t at = b * inv.stride(0);
        kernels.affine(shape, x_data + b * step, g_data + b * step, batch * step, mean_data ? mean_data + at : nullptr,
                       inv_data + at, w_data, sums.data(), runs.data(), total, dx_data ? dx_data + b * step : nullptr);
        for (int64_t k = 0; k < cotangents; ++k) result[k * batch + b] = total[k];
      }
    });
  });
}

Tensor affine_sq_norms(const Tensor& g, const Tensor& x, const MaybeTensor& mean, const Tensor& inverse, bool scale,
                       bool shift) {
  check(g, x, mean, inverse);
  Tensor out = at::empty({g.size(0), x.size(0)}, g.options().dtype(at::kDouble));
  run(g, x, mean, inverse, std::nullopt, scale, shift, false, out, Tensor());
  return out;
}

std::tuple<Tensor, Tensor> affine_pull(const Tensor& g, const Tensor& x, const MaybeTensor& mean, const Tensor& inverse,
                                       const MaybeTensor& weight, bool scale, bool shift, bool own) {
  check(g, x, mean, inverse);
  TORCH_CHECK(
      !weight || (weight->dim() == 1 && weight->size(0) == x.size(2) && weight->scalar_type() == x.scalar_type()),
      "affine_pull: the weight must be [C] and of x's dtype.");
  TORCH_CHECK(!own || (mean && x.size(3) == 1),
              "affine_pull: rows with statistics of their own have a mean and S = 1.");
  for (const Tensor& t : {mean.value_or(inverse), inverse}) {
    TORCH_CHECK(!own || t.dim() == 0 || t.size(-1) == 1,
                "cape: affine_pull: the statistics of rows of their own must have shape [B, R, 1], got ", t.sizes(),
                ".");
  }
  Tensor out = at::empty({g.size(0), x.size(0)}, g.options().dtype(at::kDouble));
  Tensor dx = at::empty(g.sizes(), g.options());
  run(g, x, mean, inverse, weight, scale, shift, own, out, dx);
  return {dx, out};
}

}  // namespace

TORCH_LIBRARY_IMPL(cape, CPU, m) {
  m.impl("affine_sq_norms", &affine_sq_norms);
  m.impl("affine_pull", &affine_pull);
}
