"""What is built and packed, without building: setup.py, the source distribution, wheels."""

import json
import os
import runpy
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from setuptools import Distribution

ROOT = Path(__file__).resolve().parent.parent
CUDA = "13.0"


@pytest.fixture
def setup_py(monkeypatch) -> dict[str, Any]:
    """The names that setup.py defines."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    return runpy.run_path(str(ROOT / "setup.py"))


def write_script(path: Path, text: str = "") -> None:
    path.write_text(f"#!/bin/sh\n{text}")
    path.chmod(0o755)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with nvcc on PATH, in CUDACXX or nowhere, and MAEFAST_CUDA as asked."""

    def made(asked: str | None, nvcc: str) -> None:
        for name, value in (("MAEFAST_CUDA", asked), ("CUDACXX", "/opt/nvcc" if nvcc == "CUDACXX" else None)):
            monkeypatch.delenv(name, raising=False)
            if value is not None:
                monkeypatch.setenv(name, value)
        if nvcc == "PATH":
            write_script(tmp_path / "nvcc")
        monkeypatch.setenv("PATH", str(tmp_path))

    return made


@pytest.mark.parametrize("nvcc", ["PATH", "CUDACXX"])
@pytest.mark.parametrize(("asked", "expected"), [(None, True), ("auto", True), ("1", True), ("0", False)])
def test_where_torch_has_cuda_and_there_is_nvcc(setup_py, machine, asked, expected, nvcc):
    machine(asked, nvcc)
    assert setup_py["wants_cuda"](CUDA) is expected


@pytest.mark.parametrize(
    ("torch_cuda", "nvcc", "missing"),
    [(None, "PATH", "this torch has no CUDA"), (CUDA, "", "there is no nvcc on PATH or in CUDACXX")],
)
def test_where_something_is_missing(setup_py, machine, torch_cuda, nvcc, missing):
    for asked in (None, "auto", "0"):
        machine(asked, nvcc)
        assert setup_py["wants_cuda"](torch_cuda) is False
    machine("1", nvcc)
    with pytest.raises(SystemExit, match=f"MAEFAST_CUDA=1 cannot be honoured: {missing}"):
        setup_py["wants_cuda"](torch_cuda)


@pytest.mark.parametrize("asked", ["yes", "", "ON", "2"])
def test_anything_else(setup_py, machine, cutlass_options, asked):
    machine(asked, "PATH")
    with pytest.raises(SystemExit, match=f"MAEFAST_CUDA must be auto, 0 or 1; it is '{asked}'"):
        setup_py["wants_cuda"](CUDA)
    with pytest.raises(SystemExit, match=f"MAEFAST_CUTLASS must be auto, 0 or 1; it is '{asked}'"):
        cutlass_options(asked, True, True)


def test_the_torch_to_build_against(setup_py, monkeypatch, tmp_path):
    installed = Path(torch.__file__).parent
    assert setup_py["torch_root"]() == installed
    # pip builds in an isolated environment without torch, inside one that has it.
    monkeypatch.setitem(setup_py["torch_root"].__globals__, "find_spec", lambda name: None)
    assert setup_py["torch_root"]() == installed
    write_script(tmp_path / "python", "echo\n")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert setup_py["torch_root"]() is None


def test_what_the_build_needs(setup_py, monkeypatch):
    monkeypatch.setitem(setup_py["torch_root"].__globals__, "torch_root", lambda: None)
    monkeypatch.setenv("PATH", "")
    build = setup_py["CMakeBuild"](Distribution({"name": "maefast"}))
    with pytest.raises(SystemExit, match=r"the build needs torch>=2.10, cmake, ninja: without --no-build-isolation pip"):
        build.build_extension(setup_py["objects"][0])


@pytest.mark.parametrize("native", [True, False])
def test_a_wheel_serves_every_python(setup_py, native):
    distribution = Distribution({"name": "maefast", "ext_modules": setup_py["objects"] if native else []})
    wheel = setup_py["Wheel"](distribution)
    wheel.ensure_finalized()
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.get_tag() == ("py3", "none", platform if native else "any")


def test_files_of_the_source_distribution(tmp_path):
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"MAEFAST_NATIVE": "1"}, capture_output=True, check=True)
    packed = set((tmp_path / "maefast.egg-info" / "SOURCES.txt").read_text().splitlines())
    needed = {"CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml", "setup.py"}
    for pattern in ("csrc/**/*.*", "maefast/**/*.py", "maefast/*.inc", "maefast/*.json", "maefast/py.typed"):
        needed |= {str(path.relative_to(ROOT)) for path in ROOT.glob(pattern)}
    assert needed <= packed
    assert not {name for name in packed if name.startswith(("tests", "build")) or name.endswith(".so")}


@pytest.fixture
def tag(monkeypatch, tmp_path) -> Callable[..., Path]:
    """scripts/wheels.py's tag() of a wheel about which auditwheel finds the given facts."""
    script = runpy.run_path(str(ROOT / "scripts" / "wheels.py"))
    wheel = tmp_path / "maefast-1.0-py3-none-linux_x86_64.whl"
    wheel.touch()

    def tagged(*external: str) -> Path:
        def output(*command: Any) -> str:
            if "show" in command:
                return json.dumps({"sym_tag": "manylinux_2_24_x86_64", "external_libs": dict.fromkeys(external)})
            assert command[-2:] == ("manylinux_2_24_x86_64", wheel)
            named = wheel.with_name("maefast-1.0-py3-none-manylinux_2_24_x86_64.whl")
            wheel.rename(named)
            return f"{named.name}\n"

        monkeypatch.setitem(script["tag"].__globals__, "output", output)
        monkeypatch.setitem(script["tag"].__globals__, "DIST", tmp_path / "dist")
        (tmp_path / "dist").mkdir()
        return script["tag"](wheel)

    return tagged


def test_a_wheel_is_named_after_what_it_loads_beside(tag, tmp_path):
    wheel = tag("libtorch_cpu.so", "libc10.so", "libtorch_cuda.so")
    assert wheel == tmp_path / "dist" / "maefast-1.0-py3-none-manylinux_2_24_x86_64.whl"
    assert wheel.exists()


def test_a_wheel_that_needs_a_library_of_others_is_refused(tag):
    with pytest.raises(SystemExit, match=r"linux_x86_64.whl needs libgomp.so.1, which torch does not bring"):
        tag("libtorch_cpu.so", "libgomp.so.1")


@pytest.fixture
def cutlass_options(setup_py, monkeypatch, tmp_path) -> Callable[[str | None, bool, bool], dict[str, str]]:
    """Return the options by MAEFAST_CUTLASS, the package nvidia-cutlass and the CUDA kernels."""

    def made(asked: str | None, installed: bool, with_cuda: bool) -> dict[str, str]:
        monkeypatch.delenv("MAEFAST_CUTLASS", raising=False)
        if asked is not None:
            monkeypatch.setenv("MAEFAST_CUTLASS", asked)
        globals_of_setup = setup_py["cutlass_options"].__globals__
        monkeypatch.setitem(globals_of_setup, "root_of", {"cutlass_library": tmp_path if installed else None}.get)
        return setup_py["cutlass_options"](with_cuda)

    return made


@pytest.mark.parametrize(("asked", "option"), [(None, "auto"), ("auto", "auto"), ("1", "ON"), ("0", "OFF")])
def test_where_cutlass_is_installed(cutlass_options, tmp_path, asked, option):
    expected = {"MAEFAST_CUTLASS": option, "CUTLASS_INCLUDE": str(tmp_path / "source" / "include")}
    assert cutlass_options(asked, True, True) == expected


@pytest.mark.parametrize(
    ("installed", "with_cuda", "missing"),
    [(False, True, "the package nvidia-cutlass is not installed"), (True, False, "the CUDA kernels are not built")],
)
def test_where_cutlass_cannot_be_built(cutlass_options, installed, with_cuda, missing):
    for asked in (None, "auto", "0"):
        assert cutlass_options(asked, installed, with_cuda)["MAEFAST_CUTLASS"] in ("auto", "OFF")
    with pytest.raises(SystemExit, match=f"MAEFAST_CUTLASS=1 cannot be honoured: {missing}"):
        cutlass_options("1", installed, with_cuda)
