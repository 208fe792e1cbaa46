"""Drives CMake: builds libmaefast.so, libmaefast_cuda.so and maefast._C into the package. What to build is described in CMakeLists.txt alone.

MAEFAST_NATIVE=0 installs pure Python. Any other failure to build is an error. MAEFAST_CUDA=0 or 1 leaves out or demands the CUDA
kernels, which are otherwise built where torch has CUDA and nvcc is found. MAEFAST_SANITIZE=1 builds with the sanitizers, for
`make test-sanitize`.
"""

import os
import runpy
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


def torch_cuda() -> str | None:
    """The CUDA version of the installed torch, None without CUDA; torch is not imported."""
    spec = find_spec("torch")
    return runpy.run_path(str(Path(spec.origin).with_name("version.py")))["cuda"] if spec and spec.origin else None


def wants_cuda(torch_cuda: str | None) -> bool:
    """Whether to build the CUDA kernels beside a torch of this CUDA version, None without CUDA."""
    asked = os.environ.get("MAEFAST_CUDA", "auto")
    if asked not in ("auto", "0", "1"):
        raise SystemExit(f"MAEFAST_CUDA must be auto, 0 or 1; it is {asked!r}")
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    missing = "this torch has no CUDA" if torch_cuda is None else None if nvcc else "there is no nvcc on PATH or in CUDACXX"
    if asked == "1" and missing:
        raise SystemExit(f"MAEFAST_CUDA=1 cannot be honoured: {missing}")
    return asked != "0" and missing is None


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11
        import torch

        source = Path(__file__).resolve().parent
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        sanitize = os.environ.get("MAEFAST_SANITIZE", "0") != "0"
        build = source / "build" / ("sanitize" if sanitize else "native")
        options = {
            "CMAKE_BUILD_TYPE": os.environ.get("MAEFAST_BUILD_TYPE", "Release"),
            "MAEFAST_OUTPUT_DIR": output,
            "MAEFAST_CUDA": "ON" if wants_cuda(torch_cuda()) else "OFF",
            "MAEFAST_SANITIZE": "ON" if sanitize else "OFF",
            "Python_EXECUTABLE": sys.executable,
            "TORCH_ROOT": Path(torch.__file__).resolve().parent,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        arguments = [f"-D{name}={value}" for name, value in options.items()]
        subprocess.run(["cmake", "-S", source, "-B", build, "-G", "Ninja", *arguments], check=True)
        subprocess.run(["cmake", "--build", build], check=True)

    def get_ext_filename(self, ext_name: str) -> str:
        return os.path.join(*ext_name.split(".")) + ".so"


objects = []  # every one is listed, so that setuptools installs it; CMake builds them in one go
if os.environ.get("MAEFAST_NATIVE", "1") != "0":
    objects = ["libmaefast", "_C", *(["libmaefast_cuda"] if wants_cuda(torch_cuda()) else [])]
setup(
    ext_modules=[Extension(f"maefast.{name}", sources=[]) for name in objects],
    cmdclass={"build_ext": CMakeBuild},
)
