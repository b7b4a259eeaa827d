// The Mersenne Twister (Matsumoto and Nishimura, 1998), a block of 624 numbers at a time, and what torch makes of its
// numbers: the same draws, bit for bit, as torch's serial loops, in vector registers.
#pragma once

#include <cape/isa/tile.h>
#include <cape/twister.h>

namespace cape {
namespace CAPE_ISA {

CAPE_INLINE uint32_t twisted(uint32_t a, uint32_t b) {
  return (((a & 0x80000000u) | (b & 0x7fffffffu)) >> 1) ^ (0x9908b0dfu & (0u - (b & 1u)));
}

// Replace the block by the next one.
inline void next_block(uint32_t* p) {
  constexpr int n = Twister::kBlock, m = 397;
  for (int i = 0; i < n - m; ++i) p[i] = p[i + m] ^ twisted(p[i], p[i + 1]);
  // In pieces no longer than the distance to what is read: their numbers do not depend on each other.
  for (int start = n - m; start < n - 1; start += n - m) {
    const int end = start + (n - m) < n - 1 ? start + (n - m) : n - 1;
    uint32_t* __restrict out = p + start;
    const uint32_t* before = p + start - (n - m);
    for (int i = 0; i < end - start; ++i) out[i] = before[i] ^ twisted(out[i], out[i + 1]);
  }
  p[n - 1] = p[m - 1] ^ twisted(p[n - 1], p[0]);
}

// The next n numbers, tempered.
inline void numbers(Twister& twister, uint32_t* __restrict out, int64_t n) {
  while (n > 0) {
    if (twister.next == Twister::kBlock) {
      next_block(twister.block);
      twister.next = 0;
    }
    const int64_t left = Twister::kBlock - twister.next, count = n < left ? n : left;
    const uint32_t* __restrict from = twister.block + twister.next;
    for (int64_t i = 0; i < count; ++i) {
      uint32_t y = from[i];
      y ^= y >> 11;
      y ^= (y << 7) & 0x9d2c5680u;
      y ^= (y << 15) & 0xefc60000u;
      out[i] = y ^ (y >> 18);
    }
    twister.next += int32_t(count);
    out += count;
    n -= count;
  }
}

// Ones with a probability of threshold / 2^53, else zeros. A draw is 53 bits of two numbers, the first the high ones.
template <typename scalar>
void draw_ones(Twister& twister, uint64_t threshold, scalar* out, int64_t n) {
  constexpr int64_t kPiece = 512;
  uint32_t buffer[2 * kPiece];
  for (int64_t start = 0; start < n; start += kPiece) {
    const int64_t count = n - start < kPiece ? n - start : kPiece;
    numbers(twister, buffer, 2 * count);
    for (int64_t i = 0; i < count; ++i) {
      const uint64_t bits = (uint64_t(buffer[2 * i] & 0x1fffffu) << 32) | buffer[2 * i + 1];
      out[start + i] = bits < threshold ? scalar(1) : scalar(0);
    }
  }
}

// Uniform in [0, 1) with 24 bits, as torch draws a float32.
inline void draw_uniform(Twister& twister, float* out, int64_t n) {
  constexpr int64_t kPiece = 1024;
  uint32_t buffer[kPiece];
  for (int64_t start = 0; start < n; start += kPiece) {
    const int64_t count = n - start < kPiece ? n - start : kPiece;
    numbers(twister, buffer, count);
    for (int64_t i = 0; i < count; ++i) out[start + i] = float(int32_t(buffer[i] & 0xffffffu)) * 0x1p-24f;
  }
}

}  // namespace CAPE_ISA
}  // namespace cape
