"""Print, as JSON, where torch and pybind11 live; CMakeLists.txt runs this with the interpreter it builds for."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path


def _nvidia(folder: str) -> list[str]:
    """The ``include`` or ``lib`` folders of the NVIDIA pip packages that torch depends on."""
    spec = importlib.util.find_spec("nvidia")
    roots = list(spec.submodule_search_locations or []) if spec else []
    return sorted(str(p) for root in roots for p in Path(root).glob(f"*/{folder}") if p.is_dir())


def main() -> int:
    """Print the JSON object; return 1 with one sentence on stderr where something is missing."""
    try:
        import torch
        from torch.utils.cpp_extension import include_paths
    except ImportError as error:
        print(
            f"Building cape needs torch in {sys.executable} ({error}): pip install 'torch>=2.9', then build with"
            " --no-build-isolation.",
            file=sys.stderr,
        )
        return 1
    try:
        import pybind11
    except ImportError:
        print(f"Building cape needs pybind11 in {sys.executable}: pip install pybind11.", file=sys.stderr)
        return 1
    answer = {
        "version": torch.__version__,
        "cuda": torch.version.cuda or "",
        "cxx11_abi": int(torch.compiled_with_cxx11_abi()),
        "includes": ";".join(p for p in include_paths() if str(torch.__path__[0]) in p),
        "libdir": str(Path(torch.__path__[0]) / "lib"),
        "pybind11": pybind11.get_include(),
        "nvidia_includes": ";".join(_nvidia("include")),
        "nvidia_libs": ";".join(_nvidia("lib")),
    }
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
