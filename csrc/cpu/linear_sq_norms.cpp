// CPU kernels of cape::linear_sq_norms and cape::sq_norms: threads over samples, register tiles reduced in place,
// squares accumulated in float64.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/stack.h>
#include <torch/library.h>

#include <cape/linear_sq_norms.h>
#include <cape/sample_norms.h>

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
double strided_squares(const scalar_t* x, int64_t n, int64_t stride) {
  if (stride == 1) return cape::sum_of_squares(x, n);
  double total = 0.0;
  for (int64_t i = 0; i < n; ++i) total += double(x[i * stride]) * double(x[i * stride]);
  return total;
}

template <typename scalar_t>
double one_sample(const cape::Tiles<scalar_t>& tile, cape::Scratch<scalar_t>& scratch, cape::MatrixView<scalar_t> a,
                  cape::MatrixView<scalar_t> g, int64_t t, int64_t d, int64_t p) {
  if (t == 1) {  // a rank-one gradient: its norm is a product of norms
    return strided_squares(a.data, d, a.col_stride) * strided_squares(g.data, p, g.col_stride);
  }
  if (cape::choose_form(t, d, p) == cape::Form::gram) {
    const int64_t ld = cape::gram_stride(tile, t);
    scalar_t* x = scratch.grow(scratch.a, d * ld);
    scalar_t* y = scratch.grow(scratch.g, p * ld);
    cape::pack(a.data, a.col_stride, a.row_stride, d, t, ld, x);
    cape::pack(g.data, g.col_stride, g.row_stride, p, t, ld, y);
    return cape::gram_squares(tile, scratch, x, d, y, p, ld, t);
  }
  scalar_t* panels = scratch.grow(scratch.g, t * cape::round_up(p, tile.cols));
  cape::pack_panels(g.data, g.row_stride, g.col_stride, t, p, int64_t(tile.cols), panels);
  const int64_t padded = cape::round_up(d, tile.rows);
  const scalar_t* rows = a.data;
  int64_t stride = a.row_stride;
  if (a.col_stride != 1 || padded != d) {
    scalar_t* copy = scratch.grow(scratch.a, t * padded);
    cape::pack(a.data, a.row_stride, a.col_stride, t, d, padded, copy);
    rows = copy;
    stride = padded;
  }
  const int64_t* offset = scratch.steps(scratch.a_offset, t, stride);
  return cape::direct_squares(tile, rows, offset, padded, panels, t, p);
}

Tensor one_cotangent(const Tensor& a, const Tensor& g) {
  check_inputs(a, g);
  const int64_t batch = a.size(0), t = a.size(1), d = a.size(2), p = g.size(2);
  Tensor out = at::empty({batch}, a.options().dtype(at::kDouble));
  double* result = out.mutable_data_ptr<double>();
  if (t == 0 || d == 0 || p == 0) return out.zero_();
  AT_DISPATCH_FLOATING_TYPES(a.scalar_type(), "linear_sq_norms", [&] {
    const auto& tile = cape::tiles<scalar_t>();
    const scalar_t* a_data = a.const_data_ptr<scalar_t>();
    const scalar_t* g_data = g.const_data_ptr<scalar_t>();
    at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      cape::Scratch<scalar_t> scratch;
      for (int64_t b = begin; b < end; ++b) {
        result[b] = one_sample<scalar_t>(tile, scratch, {a_data + b * a.stride(0), a.stride(1), a.stride(2)},
                                         {g_data + b * g.stride(0), g.stride(1), g.stride(2)}, t, d, p);
      }
    });
  });
  return out;
}

Tensor linear_sq_norms(const Tensor& a, const Tensor& g, c10::string_view) {
  std::vector<Tensor> norms;
  for (const Tensor& cotangent : g.unbind()) norms.push_back(one_cotangent(a, cotangent));
  return at::stack(norms);
}

Tensor sq_norms(const Tensor& x) {
  TORCH_CHECK(x.dim() == 2, "sq_norms: x must be [B, n]; got ", x.sizes(), ".");
  const Tensor rows = x.contiguous();
  const int64_t batch = x.size(0), n = x.size(1);
  Tensor out = at::empty({batch}, x.options().dtype(at::kDouble));
  double* result = out.mutable_data_ptr<double>();
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "sq_norms", [&] {
    const scalar_t* data = rows.const_data_ptr<scalar_t>();
    const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(n, 1));
    at::parallel_for(0, batch, grain, [&](int64_t begin, int64_t end) {
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
