// CPU kernel of cape::pair_sums: per sample and channel, the sums of G and of G * X in one pass over both.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

namespace {

using at::Tensor;

constexpr int64_t kLanes = 16;
constexpr int64_t kRun = 256;  // numbers added in the tensor's precision before they join the float64 sum

// Sums over s contiguous numbers.
template <typename scalar_t>
void row_sums(const scalar_t* g, const scalar_t* x, int64_t s, double* sum, double* product) {
  for (int64_t start = 0; start < s; start += kRun) {
    const int64_t end = std::min(s, start + kRun);
    scalar_t plain[kLanes] = {}, times[kLanes] = {};
    int64_t i = start;
    for (; i + kLanes <= end; i += kLanes) {
      for (int64_t k = 0; k < kLanes; ++k) {
        plain[k] += g[i + k];
        times[k] += g[i + k] * x[i + k];
      }
    }
    for (; i < end; ++i) {
      plain[0] += g[i];
      times[0] += g[i] * x[i];
    }
    for (int64_t k = 0; k < kLanes; ++k) {
      *sum += double(plain[k]);
      *product += double(times[k]);
    }
  }
}

// g, x [B, R, C, S] -> float64 [2, B, C].
Tensor pair_sums(const Tensor& g, const Tensor& x) {
  TORCH_CHECK(g.dim() == 4 && g.sizes() == x.sizes(), "pair_sums: g and x must be [B, R, C, S] alike; got ", g.sizes(),
              " and ", x.sizes(), ".");
  TORCH_CHECK(g.scalar_type() == x.scalar_type(), "pair_sums: g is ", g.scalar_type(), " but x is ", x.scalar_type(),
              ".");
  const int64_t batch = g.size(0), rows = g.size(1), channels = g.size(2), s = g.size(3);
  Tensor out = at::zeros({2, batch, channels}, g.options().dtype(at::kDouble));
  const Tensor gc = g.contiguous(), xc = x.contiguous();
  double* sums = out.mutable_data_ptr<double>();
  double* products = sums + batch * channels;
  AT_DISPATCH_FLOATING_TYPES(g.scalar_type(), "pair_sums", [&] {
    const scalar_t* g_data = gc.const_data_ptr<scalar_t>();
    const scalar_t* x_data = xc.const_data_ptr<scalar_t>();
    at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        double* sum = sums + b * channels;
        double* product = products + b * channels;
        for (int64_t r = 0; r < rows; ++r) {
          const scalar_t* gr = g_data + (b * rows + r) * channels * s;
          const scalar_t* xr = x_data + (b * rows + r) * channels * s;
          if (s == 1) {
            for (int64_t c = 0; c < channels; ++c) {
              sum[c] += double(gr[c]);
              product[c] += double(gr[c]) * double(xr[c]);
            }
          } else {
            for (int64_t c = 0; c < channels; ++c) row_sums(gr + c * s, xr + c * s, s, sum + c, product + c);
          }
        }
      }
    });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(cape, CPU, m) { m.impl("pair_sums", &pair_sums); }
