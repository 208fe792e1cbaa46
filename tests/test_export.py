"""The encoder exported with a dynamic batch, run from a fresh process and from C++."""

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import NATIVE, images_for, small_mae, small_reference
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import maefast
from maefast.testing.errors import assert_close_to_float64

PACKAGE = Path(maefast.__file__).parent
TORCH = Path(torch.__file__).parent
EXAMPLE = PACKAGE.parent / "examples" / "cpp"
OPTIONS = {"depth": 1}
BATCHES = (1, 2, 5)  # exported with 3

pytestmark = pytest.mark.skipif(not NATIVE, reason="maefast was installed without its native library")


class Encoder(nn.Module):
    def __init__(self, model: maefast.MAE):
        super().__init__()
        self.model = model

    def forward(self, imgs: Tensor) -> Tensor:
        return self.model.encode(imgs)


@pytest.fixture(scope="module")
def exported() -> ExportedProgram:
    model = small_mae(**OPTIONS)
    with torch.no_grad():
        return torch.export.export(Encoder(model), (images_for(model, N=3),), dynamic_shapes=({0: Dim.DYNAMIC},))


@pytest.fixture(scope="module")
def package(exported: ExportedProgram, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled ahead of time; the code around the kernels without optimisation, to save time."""
    if torch.__version__ < "2.12":
        pytest.skip("packages of AOTInductor before torch 2.12 call ops with another dtype than the one they were traced with")
    path = tmp_path_factory.mktemp("package") / "encoder.pt2"
    with torch.no_grad():
        options = {"aot_inductor.compile_wrapper_opt_level": "O0", "aot_inductor.precompile_headers": False}
        torch._inductor.aoti_compile_and_package(exported, package_path=str(path), inductor_configs=options)
    return path


def check(features: list[Tensor]) -> None:
    """Hold the features of each batch to the error rule, beside the reference's."""
    reference = small_reference(**OPTIONS)
    exact = copy.deepcopy(reference).double()
    assert [len(got) for got in features] == list(BATCHES)
    for N, got in zip(BATCHES, features, strict=True):
        imgs, in_order = images_for(reference, N=N), torch.linspace(0, 1, 24).expand(N, -1)
        with torch.no_grad():
            eager, truth = (m.forward_encoder(x, 0.0, in_order)[0] for m, x in ((reference, imgs), (exact, imgs.double())))
        assert_close_to_float64(f"N = {N}", got, eager, truth)


def test_the_graph_calls_native_ops(exported):
    """Each op of maefast in it is in libmaefast.so, no fused one is missing, and any batch runs."""
    targets = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    names = {target.split(".")[1] for target in targets if target.startswith("maefast.")}
    assert {"gather_patches_fwd", "layer_norm_fwd", "attention_fwd", "add_layer_norm_fwd"} <= names
    assert names <= {schema.split("(")[0] for schema in maefast._library.schemas()}
    model, module = small_mae(**OPTIONS), exported.module()
    for N in BATCHES:
        with torch.no_grad():
            assert torch.equal(module(images_for(model, N=N)), model.encode(images_for(model, N=N)))


RUN = """
import sys
import torch
torch.ops.load_library(sys.argv[1])
run = {}
assert "maefast" not in sys.modules
with torch.no_grad():
    torch.save([run(batch) for batch in torch.load(sys.argv[3])], sys.argv[4])
"""


def output_of(*command: object) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_in_a_fresh_process(file: Path, load: str) -> None:
    """With torch and libmaefast.so alone."""
    imgs, features = file.with_name("imgs.pt"), file.with_name("features.pt")
    torch.save([images_for(small_mae(), N=N) for N in BATCHES], imgs)
    output_of(sys.executable, "-c", RUN.format(load), PACKAGE / "libmaefast.so", file, imgs, features)
    check(torch.load(features))


def test_the_exported_program_in_a_fresh_process(exported, tmp_path):
    torch.export.save(exported, tmp_path / "program.pt2")
    run_in_a_fresh_process(tmp_path / "program.pt2", "torch.export.load(sys.argv[2]).module()")


def test_the_package_in_a_fresh_process(package):
    run_in_a_fresh_process(package, "torch._inductor.aoti_load_package(sys.argv[2])")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example in C++, built."""
    if shutil.which("cmake") is None or shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("needs CMake and a C++ compiler")
    build = tmp_path_factory.mktemp("cpp")
    output_of("cmake", "-S", EXAMPLE, "-B", build, f"-DTORCH_ROOT={TORCH}", f"-DMAEFAST_ROOT={PACKAGE}")
    output_of("cmake", "--build", build)
    return build / "encode"


def test_in_cpp(program, package, tmp_path):
    features = []
    for N in BATCHES:
        torch.save(images_for(small_mae(), N=N), tmp_path / "imgs.pt")
        printed = output_of(program, package, tmp_path / "imgs.pt", tmp_path / "features.pt")
        assert printed == f"[{N}, 3, 64, 48] -> [{N}, 25, 32]\n"
        features.append(torch.load(tmp_path / "features.pt"))
    check(features)


def test_the_program_knows_no_python(program):
    names = {line.split()[0] for line in output_of("ldd", program).splitlines()}
    assert {"libmaefast.so", "libtorch_cpu.so"} <= names
    assert not [name for name in names if "python" in name]


def test_bad_files_are_named(program, package, tmp_path):
    imgs, features, nowhere = tmp_path / "imgs.pt", tmp_path / "features.pt", tmp_path / "nowhere" / "features.pt"

    def failure(*arguments: Path) -> tuple[int, str]:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
        return done.returncode, done.stderr

    assert failure(package, imgs, features) == (1, f"{imgs} cannot be read, or is empty\n")
    torch.save(images_for(small_mae()), imgs)
    assert failure(package, imgs, nowhere) == (1, f"{nowhere} cannot be written\n")
    assert failure() == (2, "usage: encode ENCODER.pt2 IMAGES.pt FEATURES.pt\n")
