// CPU kernels of cape::linear_sq_norms and cape::sq_norms: threads over samples, the vendor's matrix product inside,
// squares accumulated in float64.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <cape/linear_sq_norms.h>

namespace {

using at::Tensor;

void check_inputs(const Tensor& a, const Tensor& g) {
  TORCH_CHECK(a.dim() == 3 && g.dim() == 3, "linear_sq_norms: a must be [B, T, d] and g [B, T, p]; got ", a.sizes(),
              " and ", g.sizes(), ".");
  TORCH_CHECK(a.size(0) == g.size(0) && a.size(1) == g.size(1), "linear_sq_norms: a ", a.sizes(), " and g ", g.sizes(),
              " must agree in their first two dimensions.");
  TORCH_CHECK(a.scalar_type() == g.scalar_type(), "linear_sq_norms: a is ", a.scalar_type(), " but g is ",
              g.scalar_type(), ".");
}

template <typename scalar_t>
double one_sample(const Tensor& a, const Tensor& g) {
  const int64_t t = a.size(0), d = a.size(1), p = g.size(1);
  if (t == 0 || d == 0 || p == 0) return 0.0;
  if (t == 1) {  // a rank-one gradient: its norm is a product of norms
    const Tensor ac = a.contiguous(), gc = g.contiguous();
    return cape::sum_of_squares(ac.const_data_ptr<scalar_t>(), d) *
           cape::sum_of_squares(gc.const_data_ptr<scalar_t>(), p);
  }
  if (cape::choose_form(t, d, p) == cape::Form::direct) {
    const Tensor product = at::mm(a.t(), g).contiguous();
    return cape::sum_of_squares(product.const_data_ptr<scalar_t>(), d * p);
  }
  const Tensor aa = at::mm(a, a.t()).contiguous();
  const Tensor gg = at::mm(g, g.t()).contiguous();
  return std::max(cape::inner_product(aa.const_data_ptr<scalar_t>(), gg.const_data_ptr<scalar_t>(), t * t), 0.0);
}

Tensor linear_sq_norms(const Tensor& a, const Tensor& g) {
  check_inputs(a, g);
  const int64_t batch = a.size(0);
  Tensor out = at::empty({batch}, a.options().dtype(at::kDouble));
  double* result = out.mutable_data_ptr<double>();
  AT_DISPATCH_FLOATING_TYPES(a.scalar_type(), "linear_sq_norms", [&] {
    at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      at::AutoDispatchBelowADInplaceOrView guard;  // dispatch state is per thread
      for (int64_t b = begin; b < end; ++b) result[b] = one_sample<scalar_t>(a.select(0, b), g.select(0, b));
    });
  });
  return out;
}

Tensor sq_norms(const Tensor& x) {
  TORCH_CHECK(x.dim() == 2, "sq_norms: x must be [B, n]; got ", x.sizes(), ".");
  const Tensor rows = x.contiguous();
  const int64_t batch = x.size(0), n = x.size(1);
  Tensor out = at::empty({batch}, x.options().dtype(at::kDouble));
  double* result = out.mutable_data_ptr<double>();
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "sq_norms", [&] {
    const scalar_t* data = rows.const_data_ptr<scalar_t>();
    at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) result[b] = cape::sum_of_squares(data + b * n, n);
    });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(cape, CPU, m) {
  m.impl("linear_sq_norms", &linear_sq_norms);
  m.impl("sq_norms", &sq_norms);
}
