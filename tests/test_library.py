"""The package without its native library works, says once that it is slower, and says why."""

import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import NATIVE

import maefast
from maefast import _torch

PACKAGE = Path(maefast.__file__).parent
KERNELS = "scalar avx2 avx512 avx512bf16" if platform.machine() == "x86_64" else "scalar"
needs_native = pytest.mark.skipif(not NATIVE, reason="maefast was installed without its native library")

STEP = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import maefast
assert [str(w.message) for w in caught] == ["maefast runs without its native kernels: everything works, slower"], caught
import torch
assert not maefast._library.HAS_NATIVE
torch.manual_seed(0)
model = maefast.MAE((8, 12), 4, 3, 16, 1, 2, 16, 1, 2, norm_pix_loss=True)
reference = maefast.reference.ReferenceMAE((8, 12), 4, 3, 16, 1, 2, 16, 1, 2, norm_pix_loss=True)
reference.load_state_dict(model.state_dict())
imgs, noise = torch.rand(2, 3, 8, 12), torch.rand(2, 6)
losses = []
for m in (model, reference):
    loss, pred, mask = m(imgs, noise=noise)
    loss.backward()
    losses.append((loss, pred, m.blocks[0].attn.qkv.weight.grad))
assert torch.equal(model(imgs, noise=noise).mask, reference(imgs, noise=noise).mask)
torch.testing.assert_close(*losses)
torch.manual_seed(1)
noise = maefast.ops.masking_noise(2, 6, "cpu")
torch.manual_seed(1)
assert torch.equal(noise, torch.rand(2, 6))
# the schemas exist, so that other backends can be registered; there is no CPU kernel behind them
assert torch.ops.maefast.unshuffle_bwd.default._schema.returns[1].type.kind() == "TensorType"
try:
    torch.ops.maefast.random_masking_fwd(noise, 3)
except NotImplementedError:
    print("no kernel")
maefast.explain()
"""


@pytest.fixture(scope="module")
def plain_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package alone, no native object in it."""
    root = tmp_path_factory.mktemp("site")
    shutil.copytree(PACKAGE, root / "maefast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return root


def run_python(code: str, root: Path, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("MAEFAST_BACKEND", "MAEFAST_CPU_ISA")}
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(root)!r})\n{code}"]
    return subprocess.run(command, env=clean | env, cwd=root, capture_output=True, text=True, timeout=120, check=False)


def test_works_warns_once_and_explains(plain_package):
    done = run_python(STEP, plain_package)
    assert done.returncode == 0, done.stderr
    no_kernel, no_isa, _, *rows = done.stdout.splitlines()
    assert no_kernel == "no kernel"
    assert no_isa == "CPU kernels: none, maefast was installed without its native library (MAEFAST_NATIVE=0)"
    chosen = {op: "sdpa" if op == "attention" else "eager" for op in maefast.dispatch.OPS}
    assert dict(row.split()[:2] for row in rows) == chosen
    absent = "native: maefast was installed without its native library (MAEFAST_NATIVE=0)"
    assert all(absent in row for row in rows if not row.startswith("mask_patches"))  # whose kernel is a GPU's


def test_asking_for_native_raises(plain_package):
    done = run_python("import maefast", plain_package, MAEFAST_BACKEND="native")
    assert done.returncode != 0
    assert "CannotRunError: MAEFAST_BACKEND asks for native: maefast was installed without its native library" in done.stderr
    done = run_python("import maefast\nwith maefast.backend('native'): pass", plain_package)
    assert "CannotRunError: backend asks for native: maefast was installed without" in done.stderr


def test_a_native_library_that_does_not_load_is_an_error(plain_package, tmp_path):
    shutil.copytree(plain_package / "maefast", tmp_path / "maefast")
    (tmp_path / "maefast" / "libmaefast.so").write_bytes(b"not a library")
    done = run_python("import maefast", tmp_path)
    assert done.returncode != 0
    assert "ImportError: libmaefast.so does not load beside torch" in done.stderr


@pytest.fixture
def native_package(tmp_path) -> Path:
    """A folder with the package and its native objects."""
    if not NATIVE:
        pytest.skip("maefast was installed without its native library")
    shutil.copytree(PACKAGE, tmp_path / "maefast", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_a_native_library_of_another_release_is_refused(native_package):
    (native_package / "maefast" / "_version.py").write_text('__version__ = "98.7.6"\n')
    done = run_python("import maefast", native_package)
    assert done.stderr.splitlines()[-1] == (
        f"ImportError: libmaefast.so is of maefast {maefast.__version__}, the Python files around it are of maefast 98.7.6: "
        "reinstall maefast"
    )


def test_a_native_library_without_a_version_is_refused(native_package):
    library = native_package / "maefast" / "libmaefast.so"
    contents = library.read_bytes()
    assert b"\0maefast_build_info\0" in contents
    library.write_bytes(contents.replace(b"\0maefast_build_info\0", b"\0maefast_build_xxxx\0"))
    done = run_python("import maefast", native_package)
    assert done.stderr.splitlines()[-1].startswith("ImportError: libmaefast.so is of another release, the Python files around it")


def test_cuda_kernels_beside_a_torch_without_cuda_are_left_alone(native_package):
    """They could not be loaded there, and everything works without; beside CUDA they must load."""
    (native_package / "maefast" / "libmaefast_cuda.so").write_bytes(b"not a library")
    code = (
        "import torch; torch.version.cuda = {}; import maefast; print(maefast.ops.random_masking(torch.rand(2, 8), 2)[0].shape)"
    )
    done = run_python(code.format(None), native_package)
    assert (done.returncode, done.stdout) == (0, "torch.Size([2, 2])\n"), done.stderr
    done = run_python(code.format("'13.0'"), native_package)
    assert "ImportError: libmaefast_cuda.so does not load beside torch" in done.stderr


def test_explain_names_the_native_objects(native_package):
    code = "import torch; torch.version.cuda = None; import maefast; maefast.explain()"
    (native_package / "maefast" / "libmaefast_cuda.so").unlink(missing_ok=True)
    _, cpu, cuda, *_ = run_python(code, native_package).stdout.splitlines()
    assert re.fullmatch(rf"libmaefast\.so: \S+ [\d.]+, kernels for {KERNELS}", cpu)
    assert cuda == "libmaefast_cuda.so: not built"
    (native_package / "maefast" / "libmaefast_cuda.so").write_bytes(b"not a library")
    _, _, cuda, *_ = run_python(code, native_package).stdout.splitlines()
    assert cuda == "libmaefast_cuda.so: not loaded, this torch has no CUDA"


@pytest.mark.parametrize("version", ["2.9.1+cu128", "1.13.0", "nightly"])
def test_an_old_torch_is_refused(version):
    done = run_python(f"import torch\ntorch.__version__ = {version!r}\nimport maefast", PACKAGE.parent)
    message = f"ImportError: maefast needs torch 2.10 or newer; the installed torch is {version}"
    assert done.stderr.splitlines()[-1] == message


@pytest.mark.parametrize("version", ["2.10.0", "2.10.0a0+git1234", "2.100.1", "3.0.0.dev20270101+cpu"])
def test_versions_of_torch_that_are_new_enough(version):
    _torch.check_version(version)


@needs_native
def test_build_facts():
    from maefast import _C

    info = _C.build_info()
    assert (info["version"], info["kernels"]) == (maefast.__version__, KERNELS)
    assert info["compiler"]
    assert _C.cpu_isa() in ("scalar", "avx2", "avx512", "avx512bf16")


@needs_native
@pytest.mark.parametrize("name", ["sse2", "", "AVX2", "avx5", "scalar avx2", "scalar\0"])
def test_unknown_instruction_set(name):
    from maefast import _C

    before = _C.cpu_isa()
    message = f"name must be one of auto, scalar,.* and run on this CPU; it is {re.escape(repr(name))}"
    with pytest.raises(ValueError, match=message):
        _C.set_cpu_isa(name)
    assert _C.cpu_isa() == before


def undefined_symbols() -> list[tuple[str, str, str]]:
    """Return the kind, the name and the version of each."""
    command = ["nm", "-D", "--undefined-only", PACKAGE / "libmaefast.so"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    split = [(kind, *symbol.partition("@")) for kind, symbol in map(str.split, lines)]
    return [(kind, name, version.lstrip("@")) for kind, name, _, version in split]


@pytest.mark.skipif("MAEFAST_SANITIZE" not in os.environ, reason="for make test-sanitize")
def test_the_sanitizers_watch():
    names = {name for _, name, _ in undefined_symbols()}
    assert {"__asan_report_load4", "__ubsan_handle_add_overflow_abort"} <= names


@needs_native
def test_the_ops_need_no_python():
    """libmaefast.so refers to no symbol of Python, and to torch only by the stable C interface."""
    assert not [name for _, name, _ in undefined_symbols() if re.match(r"_?Py|_ZNK?(2at|3c10|5torch)", name)]


@needs_native
def test_the_library_holds_no_path_of_its_build():
    contents = (PACKAGE / "libmaefast.so").read_bytes()
    assert str(PACKAGE.parent).encode() not in contents
    assert str(Path(torch.__file__).parent).encode() not in contents
    dynamic = subprocess.run(["readelf", "-d", PACKAGE / "libmaefast.so"], capture_output=True, text=True, check=True).stdout
    assert "NEEDED" in dynamic
    assert not re.search("RPATH|RUNPATH", dynamic)


@pytest.mark.skipif(
    not NATIVE or "GNU 12." not in maefast._C.build_info()["compiler"] or "MAEFAST_SANITIZE" in os.environ,
    reason="wheels are built with GCC 12",
)
@pytest.mark.skipif(torch.__version__ >= "2.14", reason="headers of torch 2.14 call dlsym: wheels are built beside an older one")
def test_the_library_loads_beside_old_system_libraries():
    """Symbols are those of manylinux_2_28; one without version is torch's, or may be missing."""
    newest = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}
    for kind, name, version in undefined_symbols():
        if version:
            library, numbers = version.split("_")
            assert tuple(map(int, numbers.split("."))) <= newest[library], (name, version)
        else:
            assert kind == "w" or name.startswith(("aoti_torch_", "torch_")), name


EDGES = """
import torch
from maefast import _C, ops
from support import at_the_edge, channels_last, permutations, removed_mask

torch.manual_seed(0)

def run(op, **inputs):
    leaves = [t for t in inputs.values() if isinstance(t, torch.Tensor) and t.requires_grad]
    out = op(**inputs)
    outs = out if isinstance(out, tuple) else (out,)
    return [*outs, *(torch.autograd.grad(outs, leaves, [torch.ones_like(t) for t in outs]) if leaves else ())]

def check(op, options, **inputs):
    expected = run(op, **inputs, **options)
    for end in (True, False):
        edged = {name: at_the_edge(t.detach(), end).requires_grad_(t.requires_grad) for name, t in inputs.items()}
        for a, b in zip(run(op, **edged, **options), expected, strict=True):
            assert torch.equal(a, b), (op, end)

for isa in ("scalar", "avx2", "avx512", "avx512bf16"):
    try:
        _C.set_cpu_isa(isa)
    except ValueError:
        continue
    for L in (5, 300, 3000):
        check(ops.random_masking, {"len_keep": L // 4}, noise=torch.rand(2, L))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for D in (1, 5, 63, 768):
            check(ops.unshuffle, {}, x=torch.randn(2, 4, D, dtype=dtype).requires_grad_(), ids_restore=permutations(2, 9),
                  mask_token=torch.randn(1, 1, D).to(dtype).requires_grad_(), pos_embed=torch.randn(1, 10, D).to(dtype))
            x, residual = (torch.randn(3, D).to(dtype).requires_grad_() for _ in range(2))
            weight, bias = (torch.randn(D).to(dtype).requires_grad_() for _ in range(2))
            check(ops.layer_norm, {}, x=x, weight=weight, bias=bias)
            check(ops.add_layer_norm, {}, x=x, residual=residual, weight=weight, bias=bias)
            check(ops.bias_gelu, {}, x=x, bias=bias)
            check(ops.bias_gelu, {}, x=x)
    for C, patch in ((1, (3, 5)), (3, (7, 5)), (3, (4, 4)), (4, (2, 9))):
        shape = (2, C, 2 * patch[0], 3 * patch[1])
        pixels = torch.randn(shape)
        for imgs in (pixels, pixels.bfloat16(), pixels.half(), torch.randint(256, shape, dtype=torch.uint8)):
            for imgs in (imgs, channels_last(imgs)):
                check(ops.gather_patches, {"patch_size": patch}, imgs=imgs, ids=torch.tensor([[5, 0], [0, 5]]))
                check(ops.masked_mse, {"patch_size": patch, "norm_pix": True}, imgs=imgs, mask=removed_mask(2, 6, 2),
                      pred=torch.randn(2, 4, C * patch[0] * patch[1]).requires_grad_())
print("within")
"""


@needs_native
def test_kernels_read_nothing_beyond_their_inputs():
    """In a process of its own: a read across the edge ends it."""
    done = run_python(EDGES, Path(__file__).parent)
    assert done.stdout == "within\n", f"exit status {done.returncode}\n{done.stderr}"


@pytest.mark.parametrize(("end", "beyond"), [(True, "+ 20"), (False, "- 1")], ids=["behind", "before"])
def test_the_edge_is_there(end, beyond):
    """The byte behind the last of five fp32 values, or before the first, ends the process."""
    code = f"""
import ctypes, torch
from support import at_the_edge
ctypes.string_at(at_the_edge(torch.ones(5), {end}).data_ptr() {beyond}, 1)
"""
    assert run_python(code, Path(__file__).parent).returncode == -signal.SIGSEGV
