// CUDA kernels of cape::linear_sq_norms and cape::sq_norms: launches on the current stream; see the .cuh for the
// bodies.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <cape/linear_sq_norms.h>
#include <cape/linear_sq_norms.cuh>

namespace {

using at::Tensor;

unsigned grid(int64_t batch, int64_t tiles) {
  TORCH_CHECK(batch * tiles < (int64_t(1) << 31), "cape: ", batch, " samples of ", tiles,
              " tiles exceed one launch; use a smaller batch.");
  return unsigned(batch * tiles);
}

Tensor finish(const Tensor& partials, int64_t batch, int64_t tiles, cudaStream_t stream) {
  Tensor out = at::empty({batch}, partials.options());
  cape::cuda::sum_partials<<<grid(batch, 1), cape::cuda::kThreads, 0, stream>>>(partials.const_data_ptr<double>(),
                                                                                tiles, out.mutable_data_ptr<double>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

template <typename scalar_t>
cape::cuda::BatchView<scalar_t> view(const Tensor& x) {
  return {x.const_data_ptr<scalar_t>(), x.stride(0), x.stride(1), x.stride(2)};
}

Tensor linear_sq_norms(const Tensor& a, const Tensor& g) {
  TORCH_CHECK(a.dim() == 3 && g.dim() == 3, "linear_sq_norms: a must be [B, T, d] and g [B, T, p]; got ", a.sizes(),
              " and ", g.sizes(), ".");
  TORCH_CHECK(a.size(0) == g.size(0) && a.size(1) == g.size(1), "linear_sq_norms: a ", a.sizes(), " and g ", g.sizes(),
              " must agree in their first two dimensions.");
  TORCH_CHECK(a.scalar_type() == g.scalar_type() && a.device() == g.device(),
              "linear_sq_norms: a and g must share dtype and device.");
  const int64_t batch = a.size(0), t = a.size(1), d = a.size(2), p = g.size(2);
  const auto options = a.options().dtype(at::kDouble);
  if (batch == 0 || t == 0 || d == 0 || p == 0) return at::zeros({batch}, options);
  const c10::cuda::CUDAGuard device(a.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const auto tiles_of = [](int64_t n) { return (n + cape::cuda::kTile - 1) / cape::cuda::kTile; };
  const bool gram = cape::choose_form(t, d, p) == cape::Form::gram;
  const int64_t tiles = gram ? tiles_of(t) * (tiles_of(t) + 1) / 2 : tiles_of(d) * tiles_of(p);
  const unsigned blocks = grid(batch, tiles);
  const Tensor partials = at::empty({batch, tiles}, options);
  AT_DISPATCH_FLOATING_TYPES(a.scalar_type(), "linear_sq_norms", [&] {
    const auto kernel = gram ? cape::cuda::linear_gram<scalar_t> : cape::cuda::linear_direct<scalar_t>;
    kernel<<<blocks, cape::cuda::kThreads, 0, stream>>>(view<scalar_t>(a), view<scalar_t>(g), t, d, p, tiles,
                                                        partials.mutable_data_ptr<double>());
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return finish(partials, batch, tiles, stream);
}

Tensor sq_norms(const Tensor& x) {
  TORCH_CHECK(x.dim() == 2, "sq_norms: x must be [B, n]; got ", x.sizes(), ".");
  const int64_t batch = x.size(0), n = x.size(1);
  const auto options = x.options().dtype(at::kDouble);
  if (batch == 0 || n == 0) return at::zeros({batch}, options);
  const c10::cuda::CUDAGuard device(x.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const int64_t slices = (n + cape::cuda::kSlice - 1) / cape::cuda::kSlice;
  const Tensor partials = at::empty({batch, slices}, options);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "sq_norms", [&] {
    cape::cuda::squares<scalar_t><<<grid(batch, slices), cape::cuda::kThreads, 0, stream>>>(
        x.const_data_ptr<scalar_t>(), x.stride(0), x.stride(1), n, slices, partials.mutable_data_ptr<double>());
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return finish(partials, batch, slices, stream);
}

}  // namespace

TORCH_LIBRARY_IMPL(cape, CUDA, m) {
  m.impl("linear_sq_norms", &linear_sq_norms);
  m.impl("sq_norms", &sq_norms);
}
