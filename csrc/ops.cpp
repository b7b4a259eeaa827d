// Schemas of the operators, and nothing else: cpu/ and cuda/ hold one file per operator and backend, each of which
// ends with its own registration.
//
// K cotangents share one forward pass: what the forward showed has no K dimension, gradients have it in front. Results
// are float64. `precision` (float32, tf32, bf16) is what CUDA may round products to; `form` names one of the exact ways
// to the same number (auto: the cheapest by the cost model).
#include <torch/library.h>

TORCH_LIBRARY(cape, m) {
  // a [B, T, d], g [K, B, T, p] (any strides, float32 or float64) -> [K, B]:
  // out[k, b] = || sum_t a[b, t, :]^T g[k, b, t, :] ||_F^2 + biases * || sum_t g[k, b, t, :] ||^2, the squared norm of
  // the gradient of a linear map's weight and of as many biases with the same output gradient.
  m.def("linear_sq_norms(Tensor a, Tensor g, int biases=0, str precision=\"float32\", str form=\"auto\") -> Tensor");
  // x [B, F, C, *S] (F images per sample, unpadded), g [K, B, F, O, *L] -> [K, B]: the squared norm of a convolution's
  // weight gradient; 1 to 3 spatial dimensions.
  m.def(
      "conv_sq_norms(Tensor x, Tensor g, int[] kernel, int[] stride, int[] padding, int[] dilation, int groups,"
      " str precision=\"float32\", str form=\"auto\") -> Tensor");
  // g [K, B, R, C, S], x [B, R, C, S], statistics that broadcast to [B, R, C] -> [K, B]: sum over channels of the
  // squares of sum_{r,s} g * (x - mean) * inverse (where `scale`) and of sum_{r,s} g (where `shift`).
  m.def("affine_sq_norms(Tensor g, Tensor x, Tensor? mean, Tensor inverse, bool scale, bool shift) -> Tensor");
  // On a CPU only. The same numbers, and g pulled back to x in the same pass: dx = g * inverse * weight [C] (absent: 1)
  // or, where the statistics are each row's `own` (layer norm, S = 1), what those add.
  m.def(
      "affine_pull(Tensor g, Tensor x, Tensor? mean, Tensor inverse, Tensor? weight, bool scale, bool shift, bool own)"
      " -> (Tensor dx, Tensor norms)");
  // A recurrent layer from its input projections pre [T, B, gates * H] on: h and what its backward pass needs.
  // Gradients are [T, K, B, ...]; the backward passes end at the gates and at the initial states.
  m.def("lstm_sequence(Tensor pre, Tensor w_hh, Tensor h0, Tensor c0) -> (Tensor h, Tensor gates, Tensor c)");
  m.def(
      "lstm_sequence_backward(Tensor grad_h, Tensor grad_c, Tensor gates, Tensor c, Tensor w_hh, Tensor c0)"
      " -> (Tensor d_pre, Tensor d_h0, Tensor d_c0)");
  m.def("gru_sequence(Tensor pre, Tensor w_hh, Tensor b_hh, Tensor h0) -> (Tensor h, Tensor gates, Tensor side)");
  m.def(
      "gru_sequence_backward(Tensor grad_h, Tensor gates, Tensor side, Tensor h, Tensor w_hh, Tensor h0)"
      " -> (Tensor d_pre, Tensor d_side, Tensor d_h0)");
  // Batch norm in train mode of k models at once, x [k, B, C], rounded as torch rounds each of them; then its gradients
  // in x, the weights and the biases.
  m.def(
      "stacked_batch_norm(Tensor x, Tensor? weight, Tensor? bias, float eps)"
      " -> (Tensor y, Tensor mean, Tensor inverse)");
  m.def(
      "stacked_batch_norm_backward(Tensor grad, Tensor x, Tensor? weight, Tensor mean, Tensor inverse)"
      " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)");
  // torch's CPU draws, bit for bit: of generators whose states are rows of an int32 tensor (begun by seed_draws_),
  // row i of `out` bernoulli_ by generator i; and normal_ of one contiguous float32 tensor.
  m.def("seed_draws_(Tensor(a!) states, int row, int seed) -> ()");
  m.def("draw_ones_(Tensor(a!) out, Tensor(b!) states, float probability) -> ()");
  m.def("normal_(Tensor(a!) out, float mean, float std, Generator? generator=None) -> ()");
  // x [N, n] -> [N]: sum of squares of each row.
  m.def("sq_norms(Tensor x) -> Tensor");
  // On a CPU only. n tensors -> [n, 2]: sums of the sizes |x| and of the squares of each.
  m.def("size_sums(Tensor[] xs) -> Tensor");
  // On CUDA only. g [K, B, R, C, S], x [B, R, C, S] -> [2, K, B, C]: sums over R and S of g and of g * x, which
  // affine_sq_norms is made of there.
  m.def("_pair_sums(Tensor g, Tensor x) -> Tensor");
  // The form that auto means for these tensors, and the constants that decide it (set unless empty, then returned).
  m.def("_linear_form(Tensor a, Tensor g, str precision) -> str");
  m.def(
      "_conv_form(Tensor x, Tensor g, int[] kernel, int[] stride, int[] padding, int[] dilation, int groups,"
      " str precision) -> str");
  m.def("_cuda_time_model(Tensor like, float[] constants) -> float[]");
}
