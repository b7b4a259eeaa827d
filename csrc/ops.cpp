// Schemas of the operators, and nothing else: cpu/ and cuda/ hold one file per operator and backend, each of which
// ends with its own registration.
#include <torch/library.h>

TORCH_LIBRARY(cape, m) {
  // a [B, T, d], g [K, B, T, p] (any strides, float32 or float64; K cotangents share a) -> float64 [K, B]:
  // out[k, b] = || sum_t a[b, t, :]^T g[k, b, t, :] ||_F^2, the squared norm of one linear map's weight gradient per
  // sample. `precision` is that of float32 products: float32, tf32 or bf16 (a processor always computes in float32).
  m.def("linear_sq_norms(Tensor a, Tensor g, str precision=\"float32\") -> Tensor");
  // x [B, F, C, *S] (F images per sample, unpadded), g [K, B, F, O, *L] -> float64 [K, B]: the squared norm of a
  // convolution's weight gradient per sample; 1 to 3 spatial dimensions.
  m.def(
      "conv_sq_norms(Tensor x, Tensor g, int[] kernel, int[] stride, int[] padding, int[] dilation, int groups,"
      " str precision=\"float32\") -> Tensor");
  // g [K, B, R, C, S], x [B, R, C, S] -> float64 [2, K, B, C]: sums over R and S of g and of g * x; what the shift and
  // the scale of a normalization layer need.
  m.def("pair_sums(Tensor g, Tensor x) -> Tensor");
  // x [N, n] -> float64 [N]: sum of squares of each row.
  m.def("sq_norms(Tensor x) -> Tensor");
  // On CUDA only: the same with the form fixed, for tests and for calibrating the choice among forms. `form` is auto,
  // direct or gram, and for convolutions also shifted or narrow.
  m.def("_linear_sq_norms_as(Tensor a, Tensor g, str precision, str form) -> Tensor");
  m.def(
      "_conv_sq_norms_as(Tensor x, Tensor g, int[] kernel, int[] stride, int[] padding, int[] dilation, int groups,"
      " str precision, str form) -> Tensor");
  // The form that auto means for these tensors, and the constants that decide it (set unless empty, then returned).
  m.def("_linear_form(Tensor a, Tensor g, str precision) -> str");
  m.def(
      "_conv_form(Tensor x, Tensor g, int[] kernel, int[] stride, int[] padding, int[] dilation, int groups,"
      " str precision) -> str");
  m.def("_cuda_time_model(Tensor like, float[] constants) -> float[]");
}
