// What the kernels must know of an argument before they read it by pointer.
#pragma once

#include <ATen/core/Tensor.h>

namespace cape {

// Raise unless `value` has this shape, and the dtype and device of `like`.
inline void check_argument(const char* op, const char* name, const at::Tensor& value, at::IntArrayRef shape,
                           const at::Tensor& like) {
  TORCH_CHECK(value.sizes() == shape, "cape: ", op, ": ", name, " must have shape ", shape, ", got ", value.sizes(),
              ".");
  TORCH_CHECK(value.scalar_type() == like.scalar_type() && value.device() == like.device(), "cape: ", op, ": ", name,
              " must be ", like.scalar_type(), " on ", like.device(), ", got ", value.scalar_type(), " on ",
              value.device(), ".");
}

}  // namespace cape
