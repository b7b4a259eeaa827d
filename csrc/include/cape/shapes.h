// What the plain CPU kernels are told: sizes, strided views, scratch memory. No torch, nothing of the standard library,
// plain structs only: the kernels are compiled once per instruction set, and whatever the linker could share between
// them must be inlined always.
#pragma once

#include <cstdint>

#define CAPE_INLINE inline __attribute__((always_inline))

namespace cape {

// A matrix that is only read.
template <typename scalar>
struct Strided {
  const scalar* data;
  int64_t row, col;
};

// Memory of one thread, large enough for the form at hand (see scratch_of below).
template <typename scalar>
struct Scratch {
  scalar* values;
  int64_t* offsets;
};

// One linear map of one sample: A [t, d], G_k [t, p] for `cotangents` k, and `biases` with the same output gradient.
struct LinearShape {
  int64_t t, d, p, cotangents, biases;
};

// One convolution of one sample: `frames` images of `channels` x size, and G_k [frames, outputs, *out]. Three spatial
// dimensions always; absent ones have size, kernel, stride and dilation 1 and padding 0.
struct ConvShape {
  int64_t frames, channels, outputs, groups;
  int64_t size[3], kernel[3], stride[3], padding[3], dilation[3], out[3];
  int64_t cotangents = 1;

  CAPE_INLINE int64_t out_pixels() const { return out[0] * out[1] * out[2]; }
  CAPE_INLINE int64_t positions() const { return frames * out_pixels(); }
  CAPE_INLINE int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
  CAPE_INLINE int64_t group_channels() const { return channels / groups; }
  CAPE_INLINE int64_t group_outputs() const { return outputs / groups; }
  CAPE_INLINE int64_t pixels() const { return size[0] * size[1] * size[2]; }
  CAPE_INLINE int64_t padded(int i) const { return size[i] + 2 * padding[i]; }
  CAPE_INLINE int64_t padded_pixels() const { return padded(0) * padded(1) * padded(2); }
  CAPE_INLINE bool dense() const {  // one image, every pixel a window
    return frames == 1 && stride[0] == 1 && stride[1] == 1 && stride[2] == 1;
  }
  CAPE_INLINE bool three_by_three() const {  // one flat image, every window an output
    return dense() && size[0] == 1 && kernel[0] == 1 && padding[0] == 0 && kernel[1] == 3 && kernel[2] == 3 &&
           dilation[1] == 1 && dilation[2] == 1 && out[1] == padded(1) - 2 && out[2] == padded(2) - 2;
  }
};

// Scale and shift of one sample: rows x channels x s numbers, statistics at row * row_step + channel * channel_step.
struct AffineShape {
  int64_t rows, channels, s, cotangents, row_step, channel_step;
  bool scale, shift;  // which of the two are wanted
  bool own = false;   // the statistics are each row's own, over its channels (s is 1)
};

// The exact ways to one number. `automatic` lets the cost model choose.
enum class Form { automatic, direct, gram, shifted, winograd, channelwise, narrow };

// The tile that a processor runs: rows x two vectors of `width` numbers.
struct TileSize {
  int64_t rows, width;
  CAPE_INLINE int64_t cols() const { return 2 * width; }
};

// Blocks of 2 x 2 outputs that Winograd's form cuts n rows or columns into.
CAPE_INLINE int64_t winograd_tiles(int64_t n) { return (n + 1) / 2; }

}  // namespace cape
