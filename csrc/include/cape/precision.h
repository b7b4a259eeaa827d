// The arithmetic of float32 products on tensor cores. No torch.
#pragma once

namespace cape::cuda {

// float32: three TF32 products per product (the operands split in two, the smallest term dropped), float32 accuracy.
enum class Precision { float32, tf32, bf16 };

}  // namespace cape::cuda
