// The state of a Mersenne Twister.
#pragma once

#include <cstdint>

namespace cape {

struct Twister {
  static constexpr int kBlock = 624;
  uint32_t block[kBlock];
  int32_t next;  // of the block; kBlock where it is used up

  // As std::mt19937 and torch begin.
  void seed(uint64_t value) {
    block[0] = uint32_t(value);
    for (uint32_t i = 1; i < kBlock; ++i) block[i] = 1812433253u * (block[i - 1] ^ (block[i - 1] >> 30)) + i;
    next = kBlock;
  }
};

}  // namespace cape
