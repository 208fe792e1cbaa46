"""Build libmaefast.so and libmaefast_cuda.so into the package with CMake.

MAEFAST_NATIVE=0      installs pure Python
MAEFAST_CUDA=0, 1     leaves out or demands the CUDA kernels, by default built if torch has CUDA and
                      nvcc is found
MAEFAST_CUTLASS=0, 1  leaves out or demands the products for Hopper among them, by default built if
                      nvidia-cutlass is installed
MAEFAST_SANITIZE=1    builds with the sanitizers, for `make test-sanitize`
"""

import os
import runpy
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NATIVE = os.environ.get("MAEFAST_NATIVE", "1") != "0"


def root_of(package: str) -> Path | None:
    """Return the folder of a package, here or around the environment that pip isolates."""
    if (spec := find_spec(package)) and spec.origin:
        return Path(spec.origin).parent
    # pip isolates by PYTHONPATH, which -I ignores.
    probe = f"from importlib.util import find_spec; print(getattr(find_spec({package!r}), 'origin', ''))"
    origin = subprocess.run([sys.executable, "-I", "-c", probe], capture_output=True, text=True, check=True).stdout.strip()
    return Path(origin).parent if origin else None


def torch_root() -> Path | None:
    """Return the folder of the torch to build against."""
    return root_of("torch")


def wants_cuda(torch_cuda: str | None) -> bool:
    """Return whether to build CUDA kernels beside a torch of this CUDA version, or of none."""
    asked = os.environ.get("MAEFAST_CUDA", "auto")
    if asked not in ("auto", "0", "1"):
        raise SystemExit(f"MAEFAST_CUDA must be auto, 0 or 1; it is {asked!r}")
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    missing = "this torch has no CUDA" if torch_cuda is None else None if nvcc else "there is no nvcc on PATH or in CUDACXX"
    if asked == "1" and missing:
        raise SystemExit(f"MAEFAST_CUDA=1 cannot be honoured: {missing}")
    return asked != "0" and missing is None


def cutlass_options(with_cuda: bool) -> dict[str, str]:
    """Return the options of CMakeLists.txt for CUTLASS."""
    asked = os.environ.get("MAEFAST_CUTLASS", "auto")
    if asked not in ("auto", "0", "1"):
        raise SystemExit(f"MAEFAST_CUTLASS must be auto, 0 or 1; it is {asked!r}")
    library = root_of("cutlass_library")  # of the wheel nvidia-cutlass, which has the headers
    missing = None if library else "the package nvidia-cutlass is not installed"
    if not with_cuda:
        missing = "the CUDA kernels are not built"
    if asked == "1" and missing:
        raise SystemExit(f"MAEFAST_CUTLASS=1 cannot be honoured: {missing}")
    include = str(library / "source" / "include") if library else ""
    return {"MAEFAST_CUTLASS": {"auto": "auto", "0": "OFF", "1": "ON"}[asked], "CUTLASS_INCLUDE": include}


def remove_objects(package: Path) -> None:
    """Remove the objects of an earlier build, some of which this one may leave out."""
    for path in package.glob("*.so"):
        path.unlink()


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        torch = torch_root()
        missing = ["torch>=2.10"] if torch is None else []
        missing += [tool for tool in ("cmake", "ninja") if shutil.which(tool) is None]
        if missing:
            raise SystemExit(f"the build needs {', '.join(missing)}: without --no-build-isolation pip fetches them")
        source = Path(__file__).resolve().parent
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        remove_objects(output)
        sanitize = os.environ.get("MAEFAST_SANITIZE", "0") != "0"
        build = source / "build" / ("sanitize" if sanitize else "native")
        with_cuda = wants_cuda(runpy.run_path(str(torch / "version.py"))["cuda"])
        options = {
            "CMAKE_BUILD_TYPE": os.environ.get("MAEFAST_BUILD_TYPE", "Release"),
            "MAEFAST_OUTPUT_DIR": output,
            "MAEFAST_CUDA": "ON" if with_cuda else "OFF",
            "MAEFAST_SANITIZE": "ON" if sanitize else "OFF",
            "CMAKE_MAKE_PROGRAM": shutil.which("ninja"),  # the last build's may be gone
            "TORCH_ROOT": torch,
            **cutlass_options(with_cuda),
        }
        arguments = [f"-D{name}={value}" for name, value in options.items()]
        subprocess.run(["cmake", "-S", source, "-B", build, "-G", "Ninja", *arguments], check=True)
        subprocess.run(["cmake", "--build", build], check=True)

    def copy_extensions_to_source(self) -> None:
        """Replace the objects of an earlier build."""
        package = Path(__file__).resolve().parent / "maefast"
        remove_objects(package)
        for made in Path(self.build_lib, "maefast").glob("*.so"):
            shutil.copy2(made, package)

    def get_ext_filename(self, ext_name: str) -> str:
        return os.path.join(*ext_name.split(".")) + ".so"


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        """Name only the platform: libmaefast.so uses no Python, so one wheel serves all."""
        return "py3", "none", super().get_tag()[2]


# CMake makes libmaefast_cuda.so beside it, where there is CUDA.
objects = [Extension("maefast.libmaefast", sources=[])] if NATIVE else []
setup(
    ext_modules=objects,
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
    # not in pyproject.toml: an isolated build need not fetch a torch that the environment has
    setup_requires=["torch>=2.10"] if NATIVE and torch_root() is None else [],
)
