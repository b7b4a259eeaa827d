// Register tiles for one instruction set: CMakeLists.txt compiles this file with the flags of its name.
#define CAPE_ISA avx512
#define CAPE_VECTOR_BYTES 64
#define CAPE_TILE_ROWS 12
#include <cape/tile.h>
#include <cape/tiles.h>

namespace cape {

namespace {
template <typename scalar>
constexpr Tiles<scalar> table{CAPE_ISA::Tile<scalar>::kRows, CAPE_ISA::Tile<scalar>::kCols, "avx512",
                              CAPE_ISA::Tile<scalar>::squares, CAPE_ISA::Tile<scalar>::gram};
}  // namespace

const Tiles<float>* avx512_tiles_f32() { return &table<float>; }
const Tiles<double>* avx512_tiles_f64() { return &table<double>; }

}  // namespace cape
