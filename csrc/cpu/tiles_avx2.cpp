// Register tiles for one instruction set: CMakeLists.txt compiles this file with the flags of its name.
#define CAPE_ISA avx2
#define CAPE_VECTOR_BYTES 32
#define CAPE_TILE_ROWS 6
#include <cape/tile.h>
#include <cape/tiles.h>

namespace cape {

namespace {
template <typename scalar>
constexpr Tiles<scalar> table{CAPE_ISA::Tile<scalar>::kRows, CAPE_ISA::Tile<scalar>::kCols, "avx2",
                              CAPE_ISA::Tile<scalar>::squares, CAPE_ISA::Tile<scalar>::gram};
}  // namespace

const Tiles<float>* avx2_tiles_f32() { return &table<float>; }
const Tiles<double>* avx2_tiles_f64() { return &table<double>; }

}  // namespace cape
