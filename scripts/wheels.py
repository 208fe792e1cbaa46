"""Build the source distribution and the wheels into dist/, and test them with every Python found.

    [PYTHONS="3.10 3.12"] python scripts/wheels.py build
    [PYTHONS="3.10 3.12"] python scripts/wheels.py test torch==2.13.0 [PYTEST-ARGUMENT ...]

Pythons from 3.10 to 3.13 are tested. One wheel works with all of them, since libmaefast.so does not
use Python. `build` makes a wheel for CPUs, and one with CUDA kernels if torch has CUDA and nvcc is
found. auditwheel determines the platform tag, the oldest glibc and libstdc++ that the wheel works
with. The wheel is installed for each Python, and its library is loaded there with the torch of the
build. `test` installs the wheel for CPUs and a torch for each Python and runs tests, without a
compiler on PATH; each environment is removed after its tests. A Python for which pip cannot install
that torch is reported and skipped.
"""

import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
WORK = ROOT / "build" / "wheels"
PYTHONS = os.environ.get("PYTHONS", "3.10 3.11 3.12 3.13").split()
TESTS = ("tests/ops", "-k", "unshuffle or random_masking or masked_mse")

# Run by python -I: the folder it runs in may hold the sources.
LOAD = """
import ctypes, importlib.util
library = ctypes.CDLL(importlib.util.find_spec("maefast").submodule_search_locations[0] + "/libmaefast.so")
library.maefast_cpu_isa.restype = ctypes.c_char_p
print(library.maefast_cpu_isa().decode())
"""
STEP = """
import torch, maefast
model = maefast.mae_vit_tiny_patch16(img_size=32)
loss, _, _ = model(torch.rand(2, 3, 32, 32))
loss.backward()
maefast.explain()
"""

run = partial(subprocess.run, check=True)


def output(*command: str | Path, **options: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, **options).stdout


def pythons() -> Iterator[tuple[str, Path]]:
    """Yield the version and the path of each Python that is found: python3.X on PATH, else the
    newest 3.X of pyenv."""
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    for version in PYTHONS:
        newest_first = sorted(versions.glob(f"{version}.*/bin/python"), key=lambda path: int(path.parts[-3].split(".")[2]))[::-1]
        for path in (shutil.which(f"python{version}"), *newest_first):
            # A pyenv shim on PATH may have no Python.
            if path and subprocess.run([path, "-c", "import venv"], capture_output=True).returncode == 0:
                yield version, Path(path)
                break


def install(version: str, python: Path, *requirements: str | Path) -> Path:
    """Create an environment with the requirements and return its Python."""
    folder = WORK / f"python{version}"
    run([python, "-m", "venv", "--clear", folder])
    run([folder / "bin/python", "-m", "pip", "install", "-q", "--disable-pip-version-check", *requirements])
    return folder / "bin/python"


def tag(wheel: Path) -> Path:
    """Rename a wheel to the platform that auditwheel finds. It may need only torch's libraries."""
    facts = json.loads(output(sys.executable, "-m", "auditwheel", "show", "--json", wheel))
    if foreign := [name for name in facts["external_libs"] if not name.startswith(("libtorch", "libc10"))]:
        raise SystemExit(f"{wheel.name} needs {', '.join(foreign)}, which torch does not bring")
    named = output(sys.executable, "-m", "wheel", "tags", "--remove", "--platform-tag", facts["sym_tag"], wheel).strip()
    return shutil.move(wheel.with_name(named), DIST / named)


def build() -> None:
    shutil.rmtree(DIST, ignore_errors=True)
    shutil.rmtree(WORK, ignore_errors=True)
    run([sys.executable, "setup.py", "-q", "sdist", "--dist-dir", DIST], cwd=ROOT)
    torch = Path(find_spec("torch").origin).parent
    cuda = runpy.run_path(str(torch / "version.py"))["cuda"]
    with_nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    for local in ("", f"+cu{cuda.replace('.', '')}") if cuda and with_nvcc else ("",):
        options = ["-C--global-option=egg_info", f"-C--global-option=--tag-build={local}"]
        command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-cache-dir", "--no-build-isolation", "--no-deps"]
        run([*command, "-w", WORK, *options, *DIST.glob("*.tar.gz")], env=os.environ | {"MAEFAST_CUDA": "1" if local else "0"})
        wheel = tag(next(WORK.glob("*.whl")))
        print(f"{wheel.relative_to(ROOT)}: {wheel.stat().st_size / 1e6:.2f} MB")
        for version, python in pythons():
            python = install(version, python, "--no-deps", wheel)
            run([python, "-m", "compileall", "-q", python.parent.parent / f"lib/python{version}/site-packages/maefast"])
            isa = output(python, "-I", "-c", LOAD, env=os.environ | {"LD_LIBRARY_PATH": str(torch / "lib")}).strip()
            print(f"  Python {version}: installs and loads, kernels for {isa}")


def test(torch: str, *arguments: str) -> None:
    (wheel,) = (wheel for wheel in DIST.glob("*.whl") if "+" not in wheel.name)  # the one for CPUs has no local version
    tree = WORK / "tree"
    for folder in ("tests", "benchmarks"):
        shutil.copytree(ROOT / folder, tree / folder, dirs_exist_ok=True)
    shutil.copy(ROOT / "pyproject.toml", tree)
    for version, python in pythons():
        try:
            python = install(version, python, torch, f"{wheel}[train]", "pytest")
        except subprocess.CalledProcessError:
            print(f"Python {version}: left out, pip cannot install {torch}")
            continue
        print(f"Python {version}:", flush=True)
        alone = os.environ | {"PATH": str(python.parent)}
        run([python, "-c", STEP], cwd=tree, env=alone)
        run([python, "-m", "pytest", "-q", *(arguments or TESTS)], cwd=tree, env=alone)
        shutil.rmtree(python.parent.parent)


if __name__ == "__main__":
    {"build": build, "test": test}[sys.argv[1]](*sys.argv[2:])
