"""The build: what it makes, what it says when it cannot, and that parsing it needs nothing."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cape

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(not (ROOT / "CMakeLists.txt").exists(), reason="not a source checkout")


def run(*command: str | Path, env: dict[str, str] | None = None, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(c) for c in command],
        env={**os.environ, **(env or {})},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )


def tool(name: str) -> str:
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


@pytest.fixture
def without_torch(tmp_path: Path) -> dict[str, str]:
    """An environment in which torch, pybind11 and cape's other requirements cannot be found."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\n"
        "hidden = {'torch', 'pybind11', 'numpy'}\n"
        "class Hide:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in hidden: raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "import sys; sys.meta_path.insert(0, Hide())\n"
        "real = u.find_spec\n"
        "u.find_spec = lambda name, package=None: None if name.split('.')[0] in hidden else real(name, package)\n"
    )
    return {"PYTHONPATH": str(tmp_path)}


def test_parsing_setup_needs_no_torch(without_torch: dict[str, str]) -> None:
    done = run(sys.executable, "setup.py", "--quiet", "--name", "--version", env=without_torch)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-2:] == ["cape", cape.__version__]


def test_building_without_torch_says_so(without_torch: dict[str, str]) -> None:
    done = run(sys.executable, "setup.py", "--quiet", "build_ext", "--inplace", env=without_torch)
    assert done.returncode != 0
    assert "building needs torch" in done.stderr and "Traceback" not in done.stderr


@pytest.fixture
def no_compiler(tmp_path: Path) -> dict[str, str]:
    """An nvcc that fails: what CMake sees where the toolkit is broken or absent, wherever one is installed here."""
    fake = tmp_path / "nvcc"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    return {"CUDACXX": str(fake)}


def configure(build: Path, cuda: str, env: dict[str, str], *more: str) -> subprocess.CompletedProcess[str]:
    return run(
        tool("cmake"), "-S", ROOT, "-B", build, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
        f"-DPython_EXECUTABLE={sys.executable}", f"-DCAPE_CUDA={cuda}", *more, env=env,
    )  # fmt: skip


@pytest.mark.parametrize("cuda", ["1", "auto", "0", "yes"])
def test_cuda_is_never_dropped_in_silence(tmp_path: Path, no_compiler: dict[str, str], cuda: str) -> None:
    done = configure(tmp_path / "build", cuda, no_compiler)
    if cuda == "1":
        assert done.returncode != 0 and "CAPE_CUDA=1, but the CUDA kernels cannot be built" in done.stderr
    elif cuda == "yes":
        assert done.returncode != 0 and "must be auto, 0 or 1" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert "CAPE: CUDA kernels: no" in done.stdout


def test_several_cuda_architectures(tmp_path: Path) -> None:
    tool("nvcc")
    build = tmp_path / "build"
    done = configure(build, "1", {}, "-DCAPE_CUDA_ARCHS=80;8.6;90+PTX")
    assert done.returncode == 0, done.stderr
    rules = (build / "build.ninja").read_text()
    for code in ("arch=compute_80,code=sm_80", "arch=compute_86,code=sm_86", "arch=compute_90,code=compute_90"):
        assert code in rules
    assert "80;" not in rules, "a semicolon in a definition ends the shell's command"
    done = configure(tmp_path / "other", "1", {}, "-DCAPE_CUDA_ARCHS=hopper")
    assert done.returncode != 0 and "'hopper' is no compute capability" in done.stderr


def test_build_info_names_what_was_built() -> None:
    native = pytest.importorskip("cape._C", reason="the native extension is not built")
    info = native.build_info()
    assert info["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert info["compiler"] and "-O3" in info["cpu_flags"]
    assert isinstance(info["cuda"], bool) and bool(info["cuda_archs"]) == info["cuda"]
    for name in ("linear_sq_norms", "sq_norms"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"cape::{name}", "CPU")
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"cape::{name}", "CUDA") == info["cuda"]


def test_plain_headers_know_no_torch() -> None:
    for header in (ROOT / "csrc" / "include" / "cape").rglob("*.*"):
        text = header.read_text()
        assert "ATen/" not in text and "torch/" not in text and "c10/" not in text, header.name


def test_what_is_imported_is_declared() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {Requirement(text).name for text in project["dependencies"]}
    nodes = [n for file in (ROOT / "cape").rglob("*.py") for n in ast.walk(ast.parse(file.read_text()))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    foreign = {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"cape"}
    assert {{"sklearn": "scikit-learn", "PIL": "pillow"}.get(name, name) for name in foreign} <= declared


def test_lock_satisfies_the_ranges() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = {canonicalize_name(n): v for n, v in (line.split("==") for line in lines if line and line[0] != "#")}
    assert (pins["torch"], pins["torchvision"]) == ("2.14.1", "0.29.1")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in project["dependencies"] + project["optional-dependencies"]["dev"]:
        wanted = Requirement(text)
        assert wanted.specifier.contains(pins[canonicalize_name(wanted.name)]), text
