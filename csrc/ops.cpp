// Schemas of the operators, and nothing else: cpu/ and cuda/ hold one file per operator and backend, each of which
// ends with its own registration.
#include <torch/library.h>

TORCH_LIBRARY(cape, m) {
  // a [B, T, d], g [B, T, p] (any strides, float32 or float64) -> float64 [B]:
  // out[b] = || sum_t a[b, t, :]^T g[b, t, :] ||_F^2, the squared norm of one linear map's weight gradient per sample.
  m.def("linear_sq_norms(Tensor a, Tensor g) -> Tensor");
  // x [B, n] -> float64 [B]: sum of squares of each row.
  m.def("sq_norms(Tensor x) -> Tensor");
}
