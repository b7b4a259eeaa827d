// The Python module cape._C. Importing it loads the static initialisers that register the operators of namespace
// `cape` (ops.cpp, cpu/, cuda/) with torch; build_info() says what was built.
#include <pybind11/pybind11.h>

namespace py = pybind11;

static py::dict build_info() {
  py::dict info;
  info["torch"] = CAPE_TORCH_VERSION;
  info["compiler"] = CAPE_COMPILER;
  info["cpu_flags"] = CAPE_CXX_FLAGS;
#ifdef CAPE_CUDA_ARCHS
  info["cuda"] = true;
  info["cuda_archs"] = CAPE_CUDA_ARCHS;
  info["cuda_compiler"] = CAPE_CUDA_COMPILER;
#else
  info["cuda"] = false;
  info["cuda_archs"] = "";
  info["cuda_compiler"] = "";
#endif
  return info;
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native operators of CAPE; importing it registers torch.ops.cape.*";
  m.def("build_info", &build_info,
        "Return what the extension was built with: torch, compiler, cpu_flags, cuda, cuda_archs, cuda_compiler.");
}
