// How the plain kernels meet torch: launches on the current stream, memory from torch's allocator.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/cuda/CUDAContextLight.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <string_view>
#include <vector>

#include <cape/tiles.cuh>

namespace cape::cuda {

// Runs kernels on the current stream of the tensors' device. It never waits for the device and allocates only through
// torch, so that a CUDA graph can capture what it does.
class StreamLaunch {
 public:
  explicit StreamLaunch(const at::Tensor& like)
      : guard_(like.device()),
        stream_(c10::cuda::getCurrentCUDAStream()),
        properties_(at::cuda::getCurrentDeviceProperties()),
        options_(like.options()) {}

  int64_t processors() const { return properties_->multiProcessorCount; }
  // What a kernel may ask for beside its own static shared memory.
  size_t shared_limit() const { return properties_->sharedMemPerBlockOptin - 1024; }

  double* doubles(int64_t n) { return lend(n, at::kDouble).mutable_data_ptr<double>(); }
  template <typename scalar>
  scalar* scratch(int64_t n) {
    return lend(n, c10::CppTypeToScalarType<scalar>::value).template mutable_data_ptr<scalar>();
  }

  template <class... Parameters, class... Arguments>
  void run(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared, Arguments... arguments) {
    TORCH_CHECK(blocks < (int64_t(1) << 31), "cape: this batch needs ", blocks,
                " thread blocks in one launch, more than CUDA takes (2^31 - 1); use a smaller batch.");
    if (shared > (48 << 10)) {
      C10_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                          cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)));
    }
    kernel<<<unsigned(blocks), threads, shared, stream_>>>(Parameters(arguments)...);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  at::Tensor& lend(int64_t n, at::ScalarType type) {
    lent_.push_back(at::empty({n}, options_.dtype(type)));
    return lent_.back();
  }
  c10::cuda::CUDAGuard guard_;
  cudaStream_t stream_;
  const cudaDeviceProp* properties_;
  at::TensorOptions options_;
  std::vector<at::Tensor> lent_;  // returned to the allocator, which is ordered by the stream
};

inline Precision precision_of(std::string_view name) {
  TORCH_CHECK(name == "float32" || name == "tf32" || name == "bf16", "Unknown precision '", name,
              "'. Known: float32, tf32, bf16.");
  return name == "tf32" ? Precision::tf32 : name == "bf16" ? Precision::bf16 : Precision::float32;
}

// The operator, with the form fixed ("direct", "gram") or left to the time model ("auto"): linear_sq_norms.cu.
at::Tensor linear_sq_norms_on_device(const at::Tensor& a, const at::Tensor& g, std::string_view precision,
                                     std::string_view form);

}  // namespace cape::cuda
