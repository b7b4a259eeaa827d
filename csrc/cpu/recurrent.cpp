// CPU kernels of cape::lstm_sequence, cape::gru_sequence and their backward passes. The recurrent weights are packed
// once; each thread takes its samples through all steps: a product of rows, then one fused pointwise pass.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <cape/kernels.h>

#include <tuple>

#include "check.h"
#include "scratch.h"

namespace {

using at::Tensor;
using cape::check_argument;

struct Sizes {
  int64_t steps, batch, hidden, cotangents;
};

Sizes check(const char* name, const Tensor& gates, const Tensor& w_hh, int64_t count) {
  TORCH_CHECK(
      gates.dim() == 3 && w_hh.dim() == 2 && w_hh.size(0) == gates.size(2) && w_hh.size(0) == count * w_hh.size(1),
      name, ": the gates must be [T, B, ", count, " H] and w_hh [", count, " H, H]; got ", gates.sizes(), " and ",
      w_hh.sizes(), ".");
  check_argument(name, "w_hh", w_hh, w_hh.sizes(), gates);
  return {gates.size(0), gates.size(1), w_hh.size(1), 1};
}

// The sizes of a backward pass, with the K of its gradients [T, K, B, H].
Sizes check_backward(const char* name, const Tensor& grad_h, const Tensor& gates, const Tensor& w_hh, int64_t count) {
  Sizes n = check(name, gates, w_hh, count);
  if (grad_h.dim() == 4) n.cotangents = grad_h.size(1);
  check_argument(name, "grad_h", grad_h, {n.steps, n.cotangents, n.batch, n.hidden}, gates);
  return n;
}

// The last dimension of gradients [T, K, B, H] must be contiguous; the others may have any stride.
Tensor rows_of(const Tensor& grad) { return grad.stride(-1) == 1 ? grad : grad.contiguous(); }

template <typename scalar>
cape::Scratch<scalar> product_scratch(const cape::Kernels<scalar>& kernels, int64_t rows, int64_t depth) {
  return cape::scratch<scalar>({cape::round_to(rows, kernels.tile.width) * depth, depth});
}

// Panels of a matrix [depth, columns] whose number (k, n) lies at k * k_step + n * n_step.
template <typename scalar>
Tensor panels_of(const cape::Kernels<scalar>& kernels, const Tensor& w, int64_t k_step, int64_t n_step, int64_t depth,
                 int64_t columns) {
  const Tensor panels = at::empty({cape::round_to(columns, kernels.tile.cols()) * depth}, w.options());
  kernels.pack_matrix(w.const_data_ptr<scalar>(), k_step, n_step, depth, columns, panels.mutable_data_ptr<scalar>());
  return panels;
}

// Samples are independent: each thread takes some of them through all steps.
template <typename Body>
void over_samples(int64_t batch, const Body& body) {
  const int64_t threads = at::get_num_threads();
  at::parallel_for(0, batch, std::max<int64_t>(1, (batch + threads - 1) / threads), body);
}

std::tuple<Tensor, Tensor, Tensor> lstm_sequence(const Tensor& pre, const Tensor& w_hh, const Tensor& h0,
                                                 const Tensor& c0) {
  const at::AutoDispatchBelowAutograd guard;
  const Sizes n = check("lstm_sequence", pre, w_hh, 4);
  check_argument("lstm_sequence", "h0", h0, {n.batch, n.hidden}, pre);
  check_argument("lstm_sequence", "c0", c0, {n.batch, n.hidden}, pre);
  const Tensor input = pre.contiguous(), w = w_hh.contiguous(), first_h = h0.contiguous(), first_c = c0.contiguous();
  const Tensor gates = at::empty({n.steps, n.batch, 4 * n.hidden}, pre.options());
  const Tensor h = at::empty({n.steps, n.batch, n.hidden}, pre.options()), c = at::empty_like(h);
  AT_DISPATCH_FLOATING_TYPES(pre.scalar_type(), "lstm_sequence", [&] {
    const auto& kernels = cape::kernels<scalar_t>();
    const int64_t row = n.hidden, step = n.batch * row;
    const Tensor panels = panels_of<scalar_t>(kernels, w, 1, row, row, 4 * row);
    over_samples(n.batch, [&](int64_t begin, int64_t end) {
      const auto scratch = product_scratch<scalar_t>(kernels, end - begin, row);
      for (int64_t t = 0; t < n.steps; ++t) {
        scalar_t* g = gates.mutable_data_ptr<scalar_t>() + 4 * t * step;
        scalar_t* cell = c.mutable_data_ptr<scalar_t>() + t * step;
        scalar_t* out = h.mutable_data_ptr<scalar_t>() + t * step;
        const scalar_t* before_c = t ? cell - step : first_c.const_data_ptr<scalar_t>();
        const scalar_t* before_h = t ? out - step : first_h.const_data_ptr<scalar_t>();
        const scalar_t* from = input.const_data_ptr<scalar_t>() + 4 * t * step;
        kernels.multiply_rows(before_h + begin * row, row, end - begin, row, panels.const_data_ptr<scalar_t>(), 4 * row,
                              from + 4 * begin * row, 4 * row, g + 4 * begin * row, 4 * row, scratch);
        for (int64_t b = begin; b < end; ++b) {
          kernels.lstm_step(g + 4 * b * row, before_c + b * row, cell + b * row, out + b * row, row);
        }
      }
    });
  });
  return {h, gates, c};
}

std::tuple<Tensor, Tensor, Tensor> lstm_sequence_backward(const Tensor& grad_h, const Tensor& grad_c,
                                                          const Tensor& kept_gates, const Tensor& kept_c,
                                                          const Tensor& w_hh, const Tensor& c0) {
  const at::AutoDispatchBelowAutograd guard;
  const char* name = "lstm_sequence_backward";
  const Sizes n = check_backward(name, grad_h, kept_gates, w_hh, 4);
  check_argument(name, "grad_c", grad_c, {n.cotangents, n.batch, n.hidden}, kept_gates);
  check_argument(name, "c", kept_c, {n.steps, n.batch, n.hidden}, kept_gates);
  check_argument(name, "c0", c0, {n.batch, n.hidden}, kept_gates);
  const Tensor gates = kept_gates.contiguous(), c = kept_c.contiguous(), w = w_hh.contiguous();
  const Tensor grad = rows_of(grad_h), first_c = c0.contiguous();
  const Tensor d_pre = at::empty({n.steps, n.cotangents, n.batch, 4 * n.hidden}, gates.options());
  const Tensor dh = at::zeros({n.cotangents, n.batch, n.hidden}, gates.options()), zero = at::zeros_like(dh);
  const Tensor dc = at::empty_like(dh).copy_(grad_c);
  AT_DISPATCH_FLOATING_TYPES(gates.scalar_type(), "lstm_sequence_backward", [&] {
    const auto& kernels = cape::kernels<scalar_t>();
    const int64_t row = n.hidden, step = n.batch * row;
    const Tensor panels = panels_of<scalar_t>(kernels, w, row, 1, 4 * row, row);
    over_samples(n.batch, [&](int64_t begin, int64_t end) {
      const auto scratch = product_scratch<scalar_t>(kernels, end - begin, 4 * row);
      scalar_t* back = dh.mutable_data_ptr<scalar_t>();
      scalar_t* dcell = dc.mutable_data_ptr<scalar_t>();
      for (int64_t t = n.steps - 1; t >= 0; --t) {
        const scalar_t* g = gates.const_data_ptr<scalar_t>() + 4 * t * step;
        const scalar_t* cell = c.const_data_ptr<scalar_t>() + t * step;
        const scalar_t* before = t ? cell - step : first_c.const_data_ptr<scalar_t>();
        const scalar_t* from = grad.const_data_ptr<scalar_t>() + t * grad.stride(0);
        scalar_t* out = d_pre.mutable_data_ptr<scalar_t>() + 4 * t * n.cotangents * step;
        for (int64_t b = begin; b < end; ++b) {
          kernels.lstm_step_back(g + 4 * b * row, before + b * row, cell + b * row, back + b * row,
                                 from + b * grad.stride(2), grad.stride(1), dcell + b * row, out + 4 * b * row, row,
                                 n.cotangents, n.batch);
        }
        for (int64_t k = 0; k < n.cotangents; ++k) {
          const int64_t at = k * step + begin * row;
          kernels.multiply_rows(out + 4 * at, 4 * row, end - begin, 4 * row, panels.const_data_ptr<scalar_t>(), row,
                                zero.const_data_ptr<scalar_t>() + at, row, back + at, row, scratch);
        }
      }
    });
  });
  return {d_pre, dh, dc};
}

std::tuple<Tensor, Tensor, Tensor> gru_sequence(const Tensor& pre, const Tensor& w_hh, const Tensor& b_hh,
                                                const Tensor& h0) {
  const at::AutoDispatchBelowAutograd guard;
  const Sizes n = check("gru_sequence", pre, w_hh, 3);
  check_argument("gru_sequence", "b_hh", b_hh, {3 * n.hidden}, pre);
  check_argument("gru_sequence", "h0", h0, {n.batch, n.hidden}, pre);
  const Tensor w = w_hh.contiguous(), bias = b_hh.contiguous(), first = h0.contiguous();
  const Tensor gates = at::empty({n.steps, n.batch, 3 * n.hidden}, pre.options()).copy_(pre);
  const Tensor h = at::empty({n.steps, n.batch, n.hidden}, pre.options()), side = at::empty_like(h);
  const Tensor hidden = at::empty({n.batch, 3 * n.hidden}, pre.options());
  AT_DISPATCH_FLOATING_TYPES(pre.scalar_type(), "gru_sequence", [&] {
    const auto& kernels = cape::kernels<scalar_t>();
    const int64_t row = n.hidden, step = n.batch * row;
    const Tensor panels = panels_of<scalar_t>(kernels, w, 1, row, row, 3 * row);
    over_samples(n.batch, [&](int64_t begin, int64_t end) {
      const auto scratch = product_scratch<scalar_t>(kernels, end - begin, row);
      scalar_t* projected = hidden.mutable_data_ptr<scalar_t>();
      for (int64_t t = 0; t < n.steps; ++t) {
        scalar_t* g = gates.mutable_data_ptr<scalar_t>() + 3 * t * step;
        scalar_t* out = h.mutable_data_ptr<scalar_t>() + t * step;
        const scalar_t* before = t ? out - step : first.const_data_ptr<scalar_t>();
        scalar_t* kept = side.mutable_data_ptr<scalar_t>() + t * step;
        kernels.multiply_rows(before + begin * row, row, end - begin, row, panels.const_data_ptr<scalar_t>(), 3 * row,
                              bias.const_data_ptr<scalar_t>(), 0, projected + 3 * begin * row, 3 * row, scratch);
        for (int64_t b = begin; b < end; ++b) {
          kernels.gru_step(g + 3 * b * row, projected + 3 * b * row, before + b * row, kept + b * row, out + b * row,
                           row);
        }
      }
    });
  });
  return {h, gates, side};
}

std::tuple<Tensor, Tensor, Tensor> gru_sequence_backward(const Tensor& grad_h, const Tensor& kept_gates,
                                                         const Tensor& kept_side, const Tensor& kept_h,
                                                         const Tensor& w_hh, const Tensor& h0) {
  const at::AutoDispatchBelowAutograd guard;
  const char* name = "gru_sequence_backward";
  const Sizes n = check_backward(name, grad_h, kept_gates, w_hh, 3);
  check_argument(name, "side", kept_side, {n.steps, n.batch, n.hidden}, kept_gates);
  check_argument(name, "h", kept_h, {n.steps, n.batch, n.hidden}, kept_gates);
  check_argument(name, "h0", h0, {n.batch, n.hidden}, kept_gates);
  const Tensor gates = kept_gates.contiguous(), side = kept_side.contiguous(), h = kept_h.contiguous();
  const Tensor grad = rows_of(grad_h), first = h0.contiguous(), w = w_hh.contiguous();
  const Tensor d_pre = at::empty({n.steps, n.cotangents, n.batch, 3 * n.hidden}, gates.options());
  const Tensor d_side = at::empty_like(d_pre);
  const Tensor dh = at::zeros({n.cotangents, n.batch, n.hidden}, gates.options());
  AT_DISPATCH_FLOATING_TYPES(gates.scalar_type(), "gru_sequence_backward", [&] {
    const auto& kernels = cape::kernels<scalar_t>();
    const int64_t row = n.hidden, step = n.batch * row;
    const Tensor panels = panels_of<scalar_t>(kernels, w, row, 1, 3 * row, row);
    over_samples(n.batch, [&](int64_t begin, int64_t end) {
      const auto scratch = product_scratch<scalar_t>(kernels, end - begin, 3 * row);
      scalar_t* back = dh.mutable_data_ptr<scalar_t>();
      for (int64_t t = n.steps - 1; t >= 0; --t) {
        const scalar_t* g = gates.const_data_ptr<scalar_t>() + 3 * t * step;
        const scalar_t* kept = side.const_data_ptr<scalar_t>() + t * step;
        const scalar_t* before = t ? h.const_data_ptr<scalar_t>() + (t - 1) * step : first.const_data_ptr<scalar_t>();
        const scalar_t* from = grad.const_data_ptr<scalar_t>() + t * grad.stride(0);
        scalar_t* out = d_pre.mutable_data_ptr<scalar_t>() + 3 * t * n.cotangents * step;
        scalar_t* hidden = d_side.mutable_data_ptr<scalar_t>() + 3 * t * n.cotangents * step;
        for (int64_t b = begin; b < end; ++b) {
          kernels.gru_step_back(g + 3 * b * row, kept + b * row, before + b * row, back + b * row,
                                from + b * grad.stride(2), grad.stride(1), out + 3 * b * row, hidden + 3 * b * row, row,
                                n.cotangents, n.batch);
        }
        for (int64_t k = 0; k < n.cotangents; ++k) {
          const int64_t at = k * step + begin * row;
          kernels.multiply_rows(hidden + 3 * at, 3 * row, end - begin, 3 * row, panels.const_data_ptr<scalar_t>(), row,
                                back + at, row, back + at, row, scratch);
        }
      }
    });
  });
  return {d_pre, d_side, dh};
}

}  // namespace

TORCH_LIBRARY_IMPL(cape, CPU, m) {
  m.impl("lstm_sequence", &lstm_sequence);
  m.impl("lstm_sequence_backward", &lstm_sequence_backward);
  m.impl("gru_sequence", &gru_sequence);
  m.impl("gru_sequence_backward", &gru_sequence_backward);
}
