"""setup.py's choice to build the CUDA kernels, without running it."""

import runpy
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path

import pytest

SETUP = Path(__file__).resolve().parent.parent / "setup.py"
CUDA = "13.0"


@pytest.fixture(scope="module")
def wants_cuda() -> Callable[[str | None], bool]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("setuptools.setup", lambda **_: None)
        return runpy.run_path(str(SETUP))["wants_cuda"]


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with nvcc on PATH, in CUDACXX or nowhere, and MAEFAST_CUDA as asked."""

    def made(asked: str | None, nvcc: str) -> None:
        for name, value in (("MAEFAST_CUDA", asked), ("CUDACXX", "/opt/nvcc" if nvcc == "CUDACXX" else None)):
            monkeypatch.delenv(name, raising=False)
            if value is not None:
                monkeypatch.setenv(name, value)
        if nvcc == "PATH":
            (tmp_path / "nvcc").write_text("#!/bin/sh\n")
            (tmp_path / "nvcc").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))

    return made


@pytest.mark.parametrize("nvcc", ["PATH", "CUDACXX"])
@pytest.mark.parametrize(("asked", "expected"), [(None, True), ("auto", True), ("1", True), ("0", False)])
def test_where_torch_has_cuda_and_there_is_nvcc(wants_cuda, machine, asked, expected, nvcc):
    machine(asked, nvcc)
    assert wants_cuda(CUDA) is expected


@pytest.mark.parametrize(
    ("torch_cuda", "nvcc", "missing"),
    [(None, "PATH", "this torch has no CUDA"), (CUDA, "", "there is no nvcc on PATH or in CUDACXX")],
)
def test_where_something_is_missing(wants_cuda, machine, torch_cuda, nvcc, missing):
    for asked in (None, "auto", "0"):
        machine(asked, nvcc)
        assert wants_cuda(torch_cuda) is False
    machine("1", nvcc)
    with pytest.raises(SystemExit, match=f"MAEFAST_CUDA=1 cannot be honoured: {missing}"):
        wants_cuda(torch_cuda)


@pytest.mark.parametrize("asked", ["yes", "", "ON", "2"])
def test_anything_else(wants_cuda, machine, asked):
    machine(asked, "PATH")
    with pytest.raises(SystemExit, match=f"MAEFAST_CUDA must be auto, 0 or 1; it is '{asked}'"):
        wants_cuda(CUDA)


@pytest.fixture
def cutlass_options(monkeypatch, tmp_path) -> Callable[[str | None, bool, bool], dict[str, str]]:
    """Of MAEFAST_CUTLASS, with or without the package nvidia-cutlass, with or without CUDA kernels."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)

    def made(asked: str | None, installed: bool, with_cuda: bool) -> dict[str, str]:
        monkeypatch.delenv("MAEFAST_CUTLASS", raising=False)
        if asked is not None:
            monkeypatch.setenv("MAEFAST_CUTLASS", asked)
        spec = ModuleSpec("cutlass_library", None, origin=str(tmp_path / "__init__.py")) if installed else None
        monkeypatch.setattr("importlib.util.find_spec", lambda name: spec if name == "cutlass_library" else find_spec(name))
        return runpy.run_path(str(SETUP))["cutlass_options"](with_cuda)

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


@pytest.mark.parametrize("asked", ["yes", "", "ON", "2"])
def test_anything_else_of_cutlass(cutlass_options, asked):
    with pytest.raises(SystemExit, match=f"MAEFAST_CUTLASS must be auto, 0 or 1; it is '{asked}'"):
        cutlass_options(asked, True, True)
