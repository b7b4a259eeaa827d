// The table of register tiles for the processor at hand (see tile.h). No torch.
#pragma once

#include <cstdint>

namespace cape {

template <typename scalar>
struct Tiles {
  int rows, cols;
  const char* name;
  double (*squares)(const scalar* a, const int64_t* offset, const scalar* b, int64_t ldb, int64_t depth);
  double (*gram)(const scalar* x, const int64_t* x_offset, int64_t dx, const scalar* g, const int64_t* g_offset,
                 int64_t dg, int64_t ld, int64_t i0, int64_t j0);
};

// Defined once per instruction set in cpu/tiles_*.cpp.
#define CAPE_DECLARE_TILES(isa)          \
  const Tiles<float>* isa##_tiles_f32(); \
  const Tiles<double>* isa##_tiles_f64();
CAPE_DECLARE_TILES(avx512)
CAPE_DECLARE_TILES(avx2)
CAPE_DECLARE_TILES(portable)
#undef CAPE_DECLARE_TILES

// The widest tiles that this processor runs.
template <typename scalar>
const Tiles<scalar>& tiles();

}  // namespace cape
