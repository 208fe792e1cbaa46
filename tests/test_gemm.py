"""The products of csrc/cuda/gemm without a GPU: fakes, the choice, and what is built."""

import re
import sys
from pathlib import Path

import aot_gemm
import pytest
import torch
import torch.nn.functional as F
from support import NATIVE, Calls
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import maefast
from maefast import _torch, gemm, ops, tuned
from maefast.kernels.tune import products
from maefast.kernels.tune.products import Size, inputs, plain
from maefast.ops.linear import LinearAsk, Products, input_gradient, is_fused, native_products, product

ROOT = Path(__file__).resolve().parent.parent
linear_module = sys.modules["maefast.ops.linear"]  # ops.linear is the function
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
EACH_KIND = pytest.mark.parametrize("kind", gemm.KINDS)
needs_native = pytest.mark.skipif(not NATIVE, reason="the CPU's kernel stands in for that of the GPU")


@EACH_KIND
def test_fakes(kind):
    """Shapes, dtypes and strides of what the plain ops give."""
    case = inputs(kind, Size(6, 16, 24), torch.device("cpu"), BF16)
    case = (case[0].view(2, 3, 16), *case[1:3], case[3].view(2, 3, 24))
    x, weight, bias, hidden = (t.to("meta") for t in case)
    fakes = {
        "linear": lambda: (torch.ops.maefast.linear_fwd(x, weight, bias, False),),
        "input_gradient": lambda: (torch.ops.maefast.linear_fwd(x, weight.t(), None, False),),
        "linear_gelu_fwd": lambda: torch.ops.maefast.linear_gelu_fwd(x, weight, bias),
        "linear_gelu_bwd": lambda: torch.ops.maefast.linear_gelu_bwd(x, weight, hidden)[:1],
        "linear_gelu_bwd_sum": lambda: torch.ops.maefast.linear_gelu_bwd(x, weight, hidden, True),
    }
    real = plain(kind, *case)
    if kind == "linear_gelu_bwd_sum":
        real = real[0], real[0].flatten(0, 1).sum(0, dtype=F32)
    assert [(t.shape, t.dtype, t.stride()) for t in fakes[kind]()] == [(t.shape, t.dtype, t.stride()) for t in real]
    assert torch.ops.maefast.linear_gelu_bwd(hidden, weight.new_empty(24, 16), x)[1].shape == (0,)


@pytest.fixture
def hopper(monkeypatch) -> None:
    """A GPU of compute capability 9.0 in name, and a build with the kernels."""
    monkeypatch.setattr(gemm, "HAS_KERNELS", True)
    monkeypatch.setattr(gemm.gpu, "capability", lambda device: (9, 0))


def on_gpu(kind: str, rows: int, depth: int, features: int, dtype: torch.dtype = BF16) -> tuple[Tensor, Tensor]:
    weight = (features, depth) if kind in gemm.FORWARD else (depth, features)
    return tuple(torch.empty(shape, dtype=dtype, device="cuda") for shape in ((rows, depth), weight))


@pytest.mark.usefixtures("hopper")
@EACH_KIND
def test_why_not(kind, monkeypatch):
    with FakeTensorMode():
        x, weight = on_gpu(kind, 40, 16, 24)
        assert gemm.why_not(kind, x, weight, BF16) is None
        assert gemm.why_not(kind, x, weight, F16) is None, "autocast's dtype"
        for given, reason in (
            ((x.cpu(), weight.cpu(), BF16), "the products from CUTLASS run on a GPU, x is on cpu"),
            ((x, weight, F32), "the products from CUTLASS are in bfloat16 and float16, not in float32"),
            ((*on_gpu(kind, 0, 16, 24), BF16), "x has no rows"),
            ((*on_gpu(kind, 40, 20, 24), BF16), "take summed values in positive multiples of 8, there are 20"),
            ((*on_gpu(kind, 40, 16, 20), BF16), "take features in positive multiples of 8, there are 20"),
            ((*on_gpu(kind, 40, 16, 0), BF16), "take features in positive multiples of 8, there are 0"),
            ((torch.empty(16, 40, dtype=BF16, device="cuda").t(), weight, BF16), "the strides of x are (1, 40)"),
            ((torch.empty_strided((40, 16), (0, 1), dtype=BF16, device="cuda"), weight, BF16), "the strides of x are (0, 1)"),
            ((torch.empty_strided((40, 16), (18, 1), dtype=BF16, device="cuda"), weight, BF16), "the strides of x are (18, 1)"),
        ):
            assert reason in gemm.why_not(kind, *given)
        apart = torch.empty_strided((40, 16), (32, 1), dtype=BF16, device="cuda")
        assert gemm.why_not(kind, apart, weight, BF16) is None
        monkeypatch.setattr(gemm.gpu, "capability", lambda device: (10, 0))
        assert (
            gemm.why_not(kind, x, weight, BF16) == "the products from CUTLASS need compute capability 9.0, x is on a GPU of 10.0"
        )
        monkeypatch.setattr(gemm, "HAS_KERNELS", False)
        assert gemm.why_not(kind, x, weight, BF16) == "maefast was built without CUTLASS"


@pytest.mark.usefixtures("hopper")
def test_the_table_chooses(monkeypatch):
    entries = (
        tuned.Gemm("9.0", "linear", (10, 16), (20, 32), 40, 1.2, "here"),
        tuned.Gemm("8.0", "linear", (10, 64), (20, 64), 40, 1.2, "here"),
    )
    monkeypatch.setattr(tuned, "_committed", tuned._committed._replace(gemm=entries))
    with FakeTensorMode():
        for size, expected in (
            ((40, 16, 24), True),
            ((39, 16, 24), False),
            ((40, 8, 24), False),
            ((40, 24, 24), False),
            ((40, 16, 16), False),
            ((40, 16, 40), False),
            ((40, 12, 24), False),  # in the range, but no kernel takes it
        ):
            assert gemm.is_faster("linear", *on_gpu("linear", *size), BF16) is expected, size
        assert not gemm.is_faster("linear_gelu_fwd", *on_gpu("linear_gelu_fwd", 40, 16, 24), BF16), "another kind"
        assert not gemm.is_faster("linear", *on_gpu("linear", 40, 16, 24), F32)
        monkeypatch.setattr(_torch, "is_exporting", lambda: True)
        assert not gemm.is_faster("linear", *on_gpu("linear", 40, 16, 24), BF16), "a graph runs on other GPUs too"


def test_committed_sizes():
    """The products of the blocks of ViT-B that were measured, and none that were not."""
    for kind in gemm.KINDS[:4]:
        assert tuned.has_faster_product((9, 0), kind, 201_728, 512, 2048)
        assert tuned.has_faster_product((9, 0), kind, 12_800, 768, 3072)
        assert not tuned.has_faster_product((9, 0), kind, 400, 768, 3072)
        assert not tuned.has_faster_product((9, 0), kind, 201_728, 2048, 512)
        assert not tuned.has_faster_product((8, 0), kind, 201_728, 512, 2048)
    assert not tuned.has_faster_product((9, 0), "linear_gelu_bwd_sum", 201_728, 512, 2048)


@pytest.mark.usefixtures("hopper")
def test_which_linears_ask():
    """No choice for a GPU is remembered from before the fixture: no other test asks for one."""
    ask = LinearAsk(torch.device("cuda", 7), BF16, BF16, None, BF16)
    assert native_products(ask) == Products(False, False, None, True)
    with maefast.backend("eager"):
        assert native_products(ask) == Products(False, False, None, False)
    assert native_products(ask._replace(device=torch.device("cpu"))).on_gpu is False


@needs_native
@pytest.mark.parametrize(
    "chosen",
    [set(), {"linear"}, {"input_gradient"}, {"linear", "input_gradient"}],
    ids=lambda kinds: "+".join(sorted(kinds)) or "none",
)
def test_linear_takes_what_is_chosen(chosen, monkeypatch):
    """Forward and input gradient, each by itself."""
    monkeypatch.setattr(linear_module, "native_products", lambda ask: Products(False, False, None, True))
    monkeypatch.setattr(gemm, "is_faster", lambda kind, x, weight, dtype: kind in chosen and dtype == BF16)
    x, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((5, 16), (24, 16), (24,)))
    with Calls() as calls, torch.autocast("cpu", BF16):
        out = ops.linear(x, weight, bias)
    assert calls.names == ["linear_fwd"] * ("linear" in chosen)
    with Calls() as calls:
        dx, dweight, dbias = torch.autograd.grad(out, (x, weight, bias), torch.ones_like(out))
    assert calls.names == ["linear_fwd"] * ({"linear", "input_gradient"} <= chosen), "where forward is torch's, so is backward"
    with torch.autocast("cpu", BF16):
        expected = F.linear(x, weight, bias)
    for mine, theirs in zip(
        (out, dx, dweight, dbias),
        (expected, *torch.autograd.grad(expected, (x, weight, bias), torch.ones_like(out))),
        strict=True,
    ):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=0.02, atol=0.02)


@needs_native
def test_products_of_a_block(monkeypatch):
    x, weight, bias, _ = inputs("linear", Size(40, 16, 24), torch.device("cpu"), BF16)
    on = Products(False, False, None, True)
    monkeypatch.setattr(gemm, "is_faster", lambda kind, *_: kind == "linear_gelu_fwd")
    with Calls() as calls:
        product(x, weight, bias, on)
        input_gradient(x, weight.t().contiguous(), on)
    assert calls.names == []
    with Calls() as calls:
        product(x, weight, bias, on, gelu=True)
    assert calls.names == ["linear_fwd"]
    assert is_fused("linear_gelu_fwd", x, weight, on)
    assert not is_fused("linear_gelu_bwd", x, weight, on)
    assert not is_fused("linear_gelu_fwd", x, weight, on._replace(on_gpu=False))


@needs_native
@pytest.mark.usefixtures("hopper", "fresh_dynamo")
def test_compiled_code_sees_through_the_choice(monkeypatch):
    """One graph for each number of rows in the table; an exported one has torch's product."""
    entry = tuned.Gemm("9.0", "linear", (16, 16), (24, 24), 40, 1.2, "here")
    monkeypatch.setattr(tuned, "_committed", tuned._committed._replace(gemm=(entry, entry._replace(kind="input_gradient"))))
    monkeypatch.setattr(linear_module, "native_products", lambda ask: Products(False, False, None, True))
    monkeypatch.setattr(gemm, "_DEVICE", "cpu")
    graphs = []

    def backend(graph, example):
        graphs.append("maefast.linear_fwd" in graph.print_readable(print_output=False))
        return graph

    linear = torch.compile(ops.linear, fullgraph=True, backend=backend, dynamic=False)
    weight, bias = torch.randn(24, 16).bfloat16(), torch.randn(24).bfloat16()
    for rows in (40, 39):
        assert linear(torch.randn(rows, 16).bfloat16(), weight, bias).shape == (rows, 24)
    assert graphs == [True, False]

    class Layer(torch.nn.Module):
        def forward(self, x):
            return ops.linear(x, weight, bias)

    exported = torch.export.export(Layer(), (torch.randn(40, 16).bfloat16(),), dynamic_shapes=({0: torch.export.Dim("rows")},))
    assert "maefast" not in str(exported.graph)
    assert exported.module()(torch.randn(7, 16).bfloat16()).shape == (7, 24)


def test_sizes_that_are_timed():
    """The sizes of the committed table are among them."""
    for entry in tuned.read().gemm:
        assert (entry.depth[1], entry.features[1]) in {size[1:] for size in products.product_sizes(entry.kind)}


EPILOGUES = {"linear": "bias", "input_gradient": "none", "linear_gelu_fwd": "gelu", "linear_gelu_bwd": "gelu_slope"}


def test_each_instantiation_is_a_file_and_is_built():
    names = {f"{kind}_{dtype}" for kind in EPILOGUES for dtype in ("bf16", "f16")}
    assert set(aot_gemm.sources()) == names
    listed = re.findall(r"csrc/cuda/gemm/(\w+)\.cu", (ROOT / "CMakeLists.txt").read_text())
    assert sorted(listed) == sorted({*names, "linear"})
    for name, path in aot_gemm.sources().items():
        kind, dtype = name.rsplit("_", 1)
        made = re.findall(r"multiply<Epilogue::(\w+), DType::(\w+)>", path.read_text())
        assert made == [(EPILOGUES[kind], dtype)]
    assert {f"`{name}`" for name in names} <= set(re.findall("`[^`]+`", (ROOT / "docs" / "notes" / "linear.md").read_text()))


GOOD = {"HGMMA.64": 16, "UTMALDG.3D": 2, "UTMASTG.3D": 8, "STSM.16.MT88.4": 16}


@pytest.mark.parametrize(
    ("name", "changes", "problem"),
    [
        ("linear_bf16", {}, None),
        ("linear_gelu_bwd_bf16", {"instructions": GOOD | {"STG.E": 4}}, None),
        ("linear_bf16", {"instructions": GOOD | {"STG.E": 4}}, "linear_bf16 has STG.E"),
        ("linear_gelu_bwd_bf16", {"instructions": GOOD | {"STG.E.U16": 4}}, "linear_gelu_bwd_bf16 has STG.E.U16"),
        ("linear_bf16", {"instructions": GOOD | {"STSM.16.MT88.2": 4}}, "linear_bf16 has STSM.16.MT88.2"),
        ("linear_bf16", {"instructions": GOOD | {"STL.64": 4}}, "linear_bf16 has STL.64"),
        ("linear_bf16", {"instructions": {"HGMMA.64": 1, "UTMALDG.3D": 1}}, "nothing in linear_bf16 writes by TMA"),
        ("linear_bf16", {"stack": 8}, "linear_bf16 keeps 8 bytes a thread in local memory"),
        ("linear_bf16", {"registers": 170}, "linear_bf16 takes 170 registers, there are 168"),
        ("linear_bf16", {"warnings": ("(C7510) Potential Performance Loss",)}, "linear_bf16: (C7510) Potential Performance Loss"),
    ],
)
def test_what_the_machine_code_must_not_have(name, changes, problem):
    kernel = aot_gemm.Kernel(name, 168, 0, (), GOOD)._replace(**changes)
    assert aot_gemm.problems_of(kernel) == ([] if problem is None else [problem])
