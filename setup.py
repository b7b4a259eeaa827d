"""Drive CMakeLists.txt: it knows how to build the native code, this file only asks it to and puts the result in place.

Environment: ``CAPE_CUDA`` (auto, 0 or 1), ``CAPE_CUDA_ARCHS`` (e.g. ``"80;86;89;90+PTX"``), ``CUDA_HOME``,
``CMAKE_BUILD_PARALLEL_LEVEL``. Parsing this file needs nothing but setuptools; building needs torch.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-{sysconfig.get_platform()}"


def _tool(name: str) -> str:
    """Return the path of cmake or ninja: the pip package's own program, else the one on PATH."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise SystemExit(f"cape: error: building needs {name}: pip install {name}.")
    return found


class CMakeBuild(build_ext):
    """Build ``cape._C`` with CMake and Ninja in ``build/``, incrementally, and copy it to where setuptools wants it."""

    def run(self) -> None:
        if importlib.util.find_spec("torch") is None:
            raise SystemExit(
                f"cape: error: building needs torch, and {sys.executable} has none: pip install 'torch>=2.9', then"
                " install cape with --no-build-isolation."
            )
        super().run()

    def build_extension(self, ext: Extension) -> None:
        build = BUILD
        build.mkdir(parents=True, exist_ok=True)
        cmake, ninja = _tool("cmake"), _tool("ninja")
        # pip calls the same interpreter by another name (python3.11): settle on one, or every tool rebuilds all.
        python = Path(sys.prefix) / "bin" / "python"
        settings = {
            "CMAKE_MAKE_PROGRAM": ninja,
            "Python_EXECUTABLE": str(python if python.exists() else sys.executable),
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "CAPE_CUDA": os.environ.get("CAPE_CUDA", "auto"),
            "CAPE_CUDA_ARCHS": os.environ.get("CAPE_CUDA_ARCHS", "90"),
        }
        # A cache made by another cmake, torch or CUDA would be half right: start again where any of them changed.
        spec = importlib.util.find_spec("torch")
        key = json.dumps([str(ROOT), cmake, settings, spec and spec.origin, os.environ.get("CUDA_HOME")])
        stamp = build / "settings.json"
        same = stamp.exists() and stamp.read_text() == key
        configure = [cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        configure += [f"-D{k}={v}" for k, v in settings.items()] + ([] if same else ["--fresh"])
        stamp.unlink(missing_ok=True)
        self._call(configure)
        stamp.write_text(key)
        self._call([cmake, "--build", str(build), "--parallel", str(os.cpu_count() or 1)])

        name = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_suffix(".tmp")
        shutil.copy2(build / name, temporary)
        os.replace(temporary, target)  # a process that has the old one loaded keeps it

    @staticmethod
    def _call(command: list[str]) -> None:
        if subprocess.run(command, cwd=ROOT).returncode:
            raise SystemExit("cape: error: the native build failed; the lines above say why.")


class BuildDir(Command):
    """Print where CMake builds (``ctest --test-dir`` wants to know)."""

    user_options: list[tuple[str, str, str]] = []

    def initialize_options(self) -> None: ...

    def finalize_options(self) -> None: ...

    def run(self) -> None:
        print(BUILD)


setup(
    ext_modules=[Extension("cape._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "build_dir": BuildDir},
)
