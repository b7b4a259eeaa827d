// Schemas of the operators, and nothing else: cpu/ and cuda/ hold one file per operator and backend, each of which
// ends with its own registration.
#include <torch/library.h>

TORCH_LIBRARY(cape, m) {
  // a [B, T, d], g [B, T, p] (any strides, float32 or float64) -> float64 [B]:
  // out[b] = || sum_t a[b, t, :]^T g[b, t, :] ||_F^2, the squared norm of one linear map's weight gradient per sample.
  m.def("linear_sq_norms(Tensor a, Tensor g) -> Tensor");
  // x [B, F, C, *S] (F images per sample, unpadded), g [B, F, O, *L] -> float64 [B]: the squared norm of a
  // convolution's weight gradient per sample; 1 to 3 spatial dimensions.
  m.def(
      "conv_sq_norms(Tensor x, Tensor g, int[] kernel, int[] stride, int[] padding, int[] dilation, int groups)"
      " -> Tensor");
  // g, x [B, R, C, S] -> float64 [2, B, C]: sums over R and S of g and of g * x; what the shift and the scale of a
  // normalization layer need.
  m.def("pair_sums(Tensor g, Tensor x) -> Tensor");
  // x [B, n] -> float64 [B]: sum of squares of each row.
  m.def("sq_norms(Tensor x) -> Tensor");
}
