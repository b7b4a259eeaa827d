// Scratch memory of the CPU kernels: one arena per thread, grown, never shrunk, so that no sample allocates.
#pragma once

#include <cape/cost.h>

#include <vector>

namespace cape {

template <typename scalar>
Scratch<scalar> scratch(ScratchSize size) {
  static thread_local std::vector<scalar> values;
  static thread_local std::vector<int64_t> offsets;
  constexpr int64_t kAlign = 64 / int64_t(sizeof(scalar));
  if (int64_t(values.size()) < size.values + kAlign) values.resize(size_t(size.values + kAlign));
  if (int64_t(offsets.size()) < size.offsets) offsets.resize(size_t(size.offsets));
  const auto address = reinterpret_cast<uintptr_t>(values.data());
  return {values.data() + (64 - address % 64) % 64 / sizeof(scalar), offsets.data()};
}

}  // namespace cape
