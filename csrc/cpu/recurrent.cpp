// CPU kernels of cape::lstm_sequence, cape::gru_sequence and their backward passes: one product per step for all samples
// and cotangents, and one fused pointwise pass.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cape/kernels.h>

#include <tuple>

namespace {

using at::Tensor;

constexpr int64_t kGrain = 8192;  // gate numbers that are worth a thread

struct Sizes {
  int64_t steps, batch, hidden, cotangents;
};

Sizes check(const char* name, const Tensor& gates, const Tensor& w_hh, int64_t count) {
  TORCH_CHECK(gates.dim() == 3 && w_hh.dim() == 2 && w_hh.size(0) == gates.size(2) &&
                  w_hh.size(0) == count * w_hh.size(1),
              name, ": the gates must be [T, B, ", count, " H] and w_hh [", count, " H, H]; got ", gates.sizes(),
              " and ", w_hh.sizes(), ".");
  return {gates.size(0), gates.size(1), w_hh.size(1), 1};
}

// dst[T, K, B, H] gradients, any strides but the last.
Tensor rows_of(const Tensor& grad) { return grad.stride(-1) == 1 || grad.size(-1) == 1 ? grad : grad.contiguous(); }

std::tuple<Tensor, Tensor, Tensor> lstm_sequence(const Tensor& pre, const Tensor& w_hh, const Tensor& h0,
                                                 const Tensor& c0) {
  const at::AutoDispatchBelowAutograd guard;
  const Sizes n = check("lstm_sequence", pre, w_hh, 4);
  const Tensor gates = at::empty({n.steps, n.batch, 4 * n.hidden}, pre.options());
  const Tensor h = at::empty({n.steps, n.batch, n.hidden}, pre.options()), c = at::empty_like(h);
  const Tensor start = c0.contiguous(), w = w_hh.t();
  AT_DISPATCH_FLOATING_TYPES(pre.scalar_type(), "lstm_sequence", [&] {
    const auto& kernels = cape::kernels<scalar_t>();
    const int64_t row = n.hidden, step = n.batch * row;
    for (int64_t t = 0; t < n.steps; ++t) {
      Tensor now = gates.select(0, t);
      at::addmm_out(now, pre.select(0, t), t ? h.select(0, t - 1) : h0, w);
      scalar_t* g = gates.mutable_data_ptr<scalar_t>() + 4 * t * step;
      scalar_t* cell = c.mutable_data_ptr<scalar_t>() + t * step;
      const scalar_t* before = t ? cell - step : start.const_data_ptr<scalar_t>();
      scalar_t* out = h.mutable_data_ptr<scalar_t>() + t * step;
      at::parallel_for(0, n.batch, std::max<int64_t>(1, kGrain / (4 * row)), [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
          kernels.lstm_step(g + 4 * b * row, before + b * row, cell + b * row, out + b * row, row);
        }
      });
    }
  });
  return {h, gates, c};
}

std::tuple<Tensor, Tensor, Tensor> lstm_sequence_backward(const Tensor& grad_h, const Tensor& grad_c,
                                                          const Tensor& kept_gates, const Tensor& kept_c,
                                                          const Tensor& w_hh, const Tensor& c0) {
  const at::AutoDispatchBelowAutograd guard;
  const Tensor gates = kept_gates.contiguous(), c = kept_c.contiguous();
  Sizes n = check("lstm_sequence_backward", gates, w_hh, 4);
  n.cotangents = grad_h.size(1);
  const Tensor grad = rows_of(grad_h), start = c0.contiguous();
  const Tensor d_pre = at::empty({n.steps, n.cotangents, n.batch, 4 * n.hidden}, gates.options());
  Tensor dh = at::zeros({n.cotangents * n.batch, n.hidden}, gates.options());
  const Tensor dc = at::empty({n.cotangents, n.batch, n.hidden}, gates.options()).copy_(grad_c);
  AT_DISPATCH_FLOATING_TYPES(gates.scalar_type(), "lstm_sequence_backward", [&] {
    const auto& kernels = cape::kernels<scalar_t>();
    const int64_t row = n.hidden, step = n.batch * row;
    for (int64_t t = n.steps - 1; t >= 0; --t) {
      const scalar_t* g = gates.const_data_ptr<scalar_t>() + 4 * t * step;
      const scalar_t* cell = c.const_data_ptr<scalar_t>() + t * step;
      const scalar_t* before = t ? cell - step : start.const_data_ptr<scalar_t>();
      const scalar_t* from = grad.const_data_ptr<scalar_t>() + t * grad.stride(0);
      const scalar_t* next = dh.const_data_ptr<scalar_t>();
      scalar_t* dcell = dc.mutable_data_ptr<scalar_t>();
      scalar_t* out = d_pre.mutable_data_ptr<scalar_t>() + 4 * t * n.cotangents * step;
      at::parallel_for(0, n.batch, std::max<int64_t>(1, kGrain / (4 * row)), [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
          kernels.lstm_step_back(g + 4 * b * row, before + b * row, cell + b * row, next + b * row,
                                 from + b * grad.stride(2), grad.stride(1), dcell + b * row, out + 4 * b * row, row,
                                 n.cotangents, n.batch);
        }
      });
      at::mm_out(dh, d_pre.select(0, t).view({n.cotangents * n.batch, 4 * row}), w_hh);
    }
  });
  return {d_pre, dh.view({n.cotangents, n.batch, n.hidden}), dc};
}

std::tuple<Tensor, Tensor, Tensor> gru_sequence(const Tensor& pre, const Tensor& w_hh, const Tensor& b_hh,
                                                const Tensor& h0) {
  const at::AutoDispatchBelowAutograd guard;
  const Sizes n = check("gru_sequence", pre, w_hh, 3);
  const Tensor gates = at::empty({n.steps, n.batch, 3 * n.hidden}, pre.options()).copy_(pre);
  const Tensor h = at::empty({n.steps, n.batch, n.hidden}, pre.options()), side = at::empty_like(h);
  const Tensor start = h0.contiguous(), w = w_hh.t();
  Tensor hidden = at::empty({n.batch, 3 * n.hidden}, pre.options());
  AT_DISPATCH_FLOATING_TYPES(pre.scalar_type(), "gru_sequence", [&] {
    const auto& kernels = cape::kernels<scalar_t>();
    const int64_t row = n.hidden, step = n.batch * row;
    for (int64_t t = 0; t < n.steps; ++t) {
      at::addmm_out(hidden, b_hh, t ? h.select(0, t - 1) : start, w);
      scalar_t* g = gates.mutable_data_ptr<scalar_t>() + 3 * t * step;
      scalar_t* out = h.mutable_data_ptr<scalar_t>() + t * step;
      const scalar_t* before = t ? out - step : start.const_data_ptr<scalar_t>();
      scalar_t* kept = side.mutable_data_ptr<scalar_t>() + t * step;
      const scalar_t* from = hidden.const_data_ptr<scalar_t>();
      at::parallel_for(0, n.batch, std::max<int64_t>(1, kGrain / (4 * row)), [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
          kernels.gru_step(g + 3 * b * row, from + 3 * b * row, before + b * row, kept + b * row, out + b * row, row);
        }
      });
    }
  });
  return {h, gates, side};
}

std::tuple<Tensor, Tensor, Tensor> gru_sequence_backward(const Tensor& grad_h, const Tensor& kept_gates,
                                                         const Tensor& kept_side, const Tensor& kept_h,
                                                         const Tensor& w_hh, const Tensor& h0) {
  const at::AutoDispatchBelowAutograd guard;
  const Tensor gates = kept_gates.contiguous(), side = kept_side.contiguous(), h = kept_h.contiguous();
  Sizes n = check("gru_sequence_backward", gates, w_hh, 3);
  n.cotangents = grad_h.size(1);
  const Tensor grad = rows_of(grad_h), start = h0.contiguous();
  const Tensor d_pre = at::empty({n.steps, n.cotangents, n.batch, 3 * n.hidden}, gates.options());
  const Tensor d_side = at::empty_like(d_pre);
  Tensor dh = at::zeros({n.cotangents * n.batch, n.hidden}, gates.options());
  AT_DISPATCH_FLOATING_TYPES(gates.scalar_type(), "gru_sequence_backward", [&] {
    const auto& kernels = cape::kernels<scalar_t>();
    const int64_t row = n.hidden, step = n.batch * row;
    for (int64_t t = n.steps - 1; t >= 0; --t) {
      const scalar_t* g = gates.const_data_ptr<scalar_t>() + 3 * t * step;
      const scalar_t* kept = side.const_data_ptr<scalar_t>() + t * step;
      const scalar_t* before = t ? h.const_data_ptr<scalar_t>() + (t - 1) * step : start.const_data_ptr<scalar_t>();
      const scalar_t* from = grad.const_data_ptr<scalar_t>() + t * grad.stride(0);
      scalar_t* back = dh.mutable_data_ptr<scalar_t>();
      scalar_t* out = d_pre.mutable_data_ptr<scalar_t>() + 3 * t * n.cotangents * step;
      scalar_t* hidden = d_side.mutable_data_ptr<scalar_t>() + 3 * t * n.cotangents * step;
      at::parallel_for(0, n.batch, std::max<int64_t>(1, kGrain / (4 * row)), [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
          kernels.gru_step_back(g + 3 * b * row, kept + b * row, before + b * row, back + b * row,
                                from + b * grad.stride(2), grad.stride(1), out + 3 * b * row, hidden + 3 * b * row, row,
                                n.cotangents, n.batch);
        }
      });
      at::addmm_out(dh, dh, d_side.select(0, t).view({n.cotangents * n.batch, 3 * row}), w_hh);
    }
  });
  return {d_pre, d_side, dh.view({n.cotangents, n.batch, n.hidden})};
}

}  // namespace

TORCH_LIBRARY_IMPL(cape, CPU, m) {
  m.impl("lstm_sequence", &lstm_sequence);
  m.impl("lstm_sequence_backward", &lstm_sequence_backward);
  m.impl("gru_sequence", &gru_sequence);
  m.impl("gru_sequence_backward", &gru_sequence_backward);
}
