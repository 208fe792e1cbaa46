"""Attention on other kernels than maefast's: who chooses, and what tells GPUs apart."""

import copy
import json
import math
import pickle
import re
from pathlib import Path

import pytest
import torch
from support import Results, assert_steps, images_for, noise_for, pretend_hopper, set_fact, small_mae, small_reference, step
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import maefast
from maefast import MAE, _flash_attn, _library, dispatch, ops, tuned
from maefast import gpu as gpu_facts
from maefast.ops.attention import OP as ATTENTION
from maefast.ops.attention import AttentionAsk

CPU = torch.device("cpu")
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "h200" / "attention.json"


class Seen(TorchDispatchMode):
    """The ops that ran within the block."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func.name()))
        return func(*args, **(kwargs or {}))


def ops_of(model: MAE, imgs: Tensor, noise: Tensor) -> set[str]:
    with Seen() as seen:
        model(imgs, noise=noise)
    return seen.names


NATIVE_ATTENTION, SDPA = "maefast::attention_fwd", "aten::_scaled_dot_product_flash_attention_for_cpu"


# a model that asks


@pytest.mark.parametrize("options", [{}, {"return_pred": False}])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_a_model_on_another_attention(native, backend, options):
    """Attention alone is torch's, forward and backward; norms and GELU stay maefast's."""
    model, reference = small_mae(attn_backend=backend), small_reference(seed=1)
    model.load_state_dict(reference.state_dict())
    seen = []

    def run(imgs: Tensor, noise: Tensor) -> Results:
        with Seen() as ops_seen:
            results = step(model, imgs, noise, **options)
        seen.append(ops_seen.names)
        return results

    assert_steps(run, reference, left_out={"pred"} if options else set())
    for names in seen:
        assert SDPA in names
        assert NATIVE_ATTENTION not in names
        assert {"maefast::layer_norm_fwd", "maefast::add_layer_norm_fwd", "maefast::bias_gelu_fwd"} <= names


def test_a_model_that_asks_for_native(native):
    model = small_mae(attn_backend="native")
    assert NATIVE_ATTENTION in ops_of(model, images_for(model), noise_for(model))
    with pytest.raises(RuntimeError, match=r"attention cannot run on the requested backend 'native'.*qkv is float64"):
        model.double()(images_for(model).double(), noise=noise_for(model))


def test_a_request_for_the_process_comes_first(native):
    """backend(...) goes before attn_backend, unless it has no attention; auto comes last."""
    model = small_mae(attn_backend="native")
    imgs, noise = images_for(model), noise_for(model)
    with maefast.backend("sdpa"):
        assert {SDPA, "maefast::layer_norm_fwd"} <= ops_of(model, imgs, noise), "sdpa binds attention alone"
        with maefast.backend("auto"):
            assert NATIVE_ATTENTION in ops_of(model, imgs, noise)
        assert dispatch.request_for(ATTENTION, CPU, "native") == "sdpa"
        assert dispatch.request_for(dispatch.OPS["linear"], CPU) is None
    assert dispatch.request_for(ATTENTION, CPU, "native") == "native"


def test_the_choice_survives(native, fresh_dynamo):
    model = small_mae(attn_backend="sdpa")
    imgs, noise = images_for(model), noise_for(model)
    expected = model(imgs, noise=noise).loss
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with Seen() as seen:
            assert torch.equal(twin(imgs, noise=noise).loss, expected)
        assert SDPA in seen.names
        assert NATIVE_ATTENTION not in seen.names
    graphs = []
    compiled = torch.compile(model, fullgraph=True, backend=lambda graph, inputs: graphs.append(str(graph.graph)) or graph)
    assert torch.equal(compiled(imgs, noise=noise).loss, expected)
    assert "scaled_dot_product_attention" in graphs[0]
    assert "attention_fwd" not in graphs[0]


def test_what_a_model_may_ask_for():
    names = "auto, native, flash_attn, sdpa, eager"
    for name in ("fast", "triton", ""):
        with pytest.raises(ValueError, match=f"attn_backend must be one of {names}; it is '{name}'"):
            small_mae(attn_backend=name)
        with pytest.raises(ValueError, match=f"backend must be one of {names}; it is '{name}'"):
            ops.attention(torch.rand(1, 2, 6), 1, backend=name)


def test_explain_of_a_model(native, capsys):
    maefast.explain(small_mae(attn_backend="sdpa"))
    *_, encoder, decoder, blocks, block, route = capsys.readouterr().out.splitlines()
    assert re.match(r"encoder attention +sdpa +torch picks its flash kernel; native: sdpa was requested", encoder)
    assert re.match(r"decoder attention +sdpa +", decoder)
    assert re.match(r"encoder blocks 0 to 1 +OPS +a chain of ops: its attention runs on sdpa$", blocks)
    assert re.match(r"decoder block 0 +OPS +a chain of ops: its attention runs on sdpa$", block)
    assert route == "MAE.forward takes the fused path; its attn_backend is sdpa"
    maefast.explain(small_mae(attn_backend="native"), dtype=torch.float64)
    *_, decoder, _, _, _ = capsys.readouterr().out.splitlines()
    assert re.match(r"decoder attention +native +native was requested and cannot run: .*qkv is float64", decoder)


# GPUs, in name only


def test_what_is_asked_of_a_gpu_is_a_constant_in_compiled_code(fresh_dynamo, monkeypatch):
    """So that a graph chooses by the GPU that it is compiled for."""
    monkeypatch.setattr(gpu_facts.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_facts, "_CAPABILITY_OF_A100", (9, 0))

    def f(x: Tensor) -> Tensor:
        return x * gpu_facts.capability(x.device)[0] + (gpu_facts.shared_memory(x.device) >> 10)

    assert torch.compile(f, fullgraph=True, dynamic=True, backend="eager")(torch.ones(2)).tolist() == [172.0, 172.0]


@pytest.fixture
def gpu(monkeypatch):
    """Pretend a build with CUDA kernels and a Hopper GPU; return a maker of asks of attention."""
    pretend_hopper(monkeypatch)

    def ask(T: int, width: int, dtype: torch.dtype = BF16, queries: bool = False) -> AttentionAsk:
        return AttentionAsk(torch.device("cuda"), dtype, T, width, queries)

    return ask


@pytest.mark.parametrize(
    ("T", "width", "expected"),
    [
        *[(33, 64, "sdpa"), (34, 64, "native"), (50, 64, "native"), (56, 64, "native"), (57, 64, "sdpa"), (197, 64, "sdpa")],
        *[(64, 80, "sdpa"), (65, 80, "native"), (72, 80, "native"), (73, 80, "sdpa")],
        *[(131, 32, "sdpa"), (132, 32, "native"), (197, 32, "native"), (257, 32, "native"), (289, 32, "sdpa")],
    ],
)
def test_auto_goes_by_the_table(gpu, monkeypatch, T, width, expected):
    def chosen(dtype: torch.dtype = BF16) -> str:
        return dispatch.choose(ATTENTION, gpu(T, width, dtype))

    for dtype in (BF16, F16):
        assert chosen(dtype) == expected
    assert chosen(F32) == "sdpa"
    set_fact(monkeypatch, gpu_facts, "capability", lambda device: (8, 0))
    assert chosen() == "sdpa"
    set_fact(monkeypatch, _flash_attn, "why_not", None)  # auto does not ask, and so does not import it
    assert chosen() == "sdpa"
    why = dispatch.why_passed_over(ATTENTION, "native", gpu(50, 64))
    assert why == "no measurement shows that it is faster than SDPA for 50 tokens, heads 64 wide, on sm_80"


def test_auto_without_the_kernels_of_the_table(gpu, monkeypatch):
    assert dispatch.choose(ATTENTION, gpu(50, 64, queries=True)) == "sdpa"
    set_fact(monkeypatch, _library, "HAS_CUDA", False)
    assert dispatch.choose(ATTENTION, gpu(50, 64)) == "sdpa"


def test_every_entry_of_the_table_was_measured():
    """Speedup over SDPA's fastest kernel; a range shares a tile and is at least 2/3 as long."""
    timing = json.loads(RESULTS.read_text())["timing"]
    expected = {}
    for row in timing:
        T, d = row["T"], row["d"]
        tiles = tuned.NATIVE_ATTENTION[d]
        i = next(i for i, tile in enumerate(tiles) if tile.last >= T)
        first = max(math.ceil(2 * T / 3), tiles[i - 1].last + 1 if i else 1)
        speedup = min(row["ms"][f"{name} both"] for name in ("flash", "cudnn", "efficient")) / row["ms"]["ours both"]
        expected[d, first, tiles[i].last] = min(speedup, expected.get((d, first, tiles[i].last), math.inf))
    entries = {(e.head_width, e.first, e.last): e for e in tuned.read().attention}
    assert entries.keys() == expected.keys()
    for key, entry in entries.items():
        assert (entry.capability, entry.backend) == ("9.0", "native")
        assert 1 < entry.speedup <= expected[key] < entry.speedup + 0.01


def test_what_native_attention_does_not_take_on_a_gpu(gpu, monkeypatch):
    def why(ask: AttentionAsk) -> str:
        reason = dispatch.why_not(ATTENTION, "native", ask)
        with maefast.backend("native"), pytest.raises(RuntimeError, match=re.escape(str(reason))):
            dispatch.choose(ATTENTION, ask)
        with pytest.raises(RuntimeError, match=re.escape(str(reason))):
            dispatch.choose(ATTENTION, ask, "native")
        assert dispatch.choose(ATTENTION, ask) == "sdpa"
        return reason

    assert dispatch.why_not(ATTENTION, "native", gpu(208, 64)) is None
    assert "takes bfloat16, float16, qkv is float32" in why(gpu(50, 64, F32))
    assert "heads 32, 64, 80 wide, they are 48 wide" in why(gpu(50, 48))
    assert "up to 208 tokens of heads 64 wide, qkv has 209" in why(gpu(209, 64))
    assert "packed queries alone" in why(gpu(50, 64, queries=True))
    set_fact(monkeypatch, gpu_facts, "capability", lambda device: (7, 5))
    assert "needs compute capability 8.0, qkv is on a GPU of 7.5" in why(gpu(50, 64))
    set_fact(monkeypatch, _library, "HAS_CUDA", False)
    assert "built without CUDA kernels" in why(gpu(50, 64))
    set_fact(monkeypatch, _library, "HAS_NATIVE", False)
    assert "without its native library" in dispatch.why_not(ATTENTION, "native", gpu(50, 64))


@pytest.mark.parametrize(
    ("T", "width", "needed", "fits_99"),
    [
        *[(64, 32, 32, True), (80, 32, 45, True), (81, 32, 111, False), (208, 32, 111, False), (209, 32, 157, False)],
        *[(50, 64, 48, True), (80, 64, 65, True), (81, 64, 217, False), (64, 80, 56, True), (80, 80, 75, True)],
    ],
)
def test_native_attention_asks_for_shared_memory(gpu, monkeypatch, T, width, needed, fits_99):
    """Parts such as an RTX 4090 have 99 KB a block, an A100 163, an H100 227."""
    for available, fits in ((99, fits_99), (163, needed <= 163), (227, True)):
        set_fact(monkeypatch, gpu_facts, "shared_memory", lambda device, kib=available: kib << 10)
        reason = dispatch.why_not(ATTENTION, "native", gpu(T, width))
        if fits:
            assert reason is None
            continue
        expected = f"{T} tokens, heads {width} wide, needs {needed} KB of shared memory, the GPU has {available}"
        assert reason == f"native attention of {expected}"
        assert dispatch.choose(ATTENTION, gpu(T, width)) == "sdpa"
        with pytest.raises(RuntimeError, match=expected):
            dispatch.choose(ATTENTION, gpu(T, width), "native")


def test_tensors_on_different_devices(gpu):
    with FakeTensorMode():
        kv, q = torch.empty(1, 5, 32, device="cuda"), torch.empty(1, 3, 16)
        for backend in ("auto", "sdpa", "native"):
            with pytest.raises(ValueError, match="q must be on the device of qkv, cuda:0; it is on cpu"):
                ops.attention(kv, 2, q, backend=backend)
        with pytest.raises(ValueError, match="must be on the device of"):
            ops.layer_norm(torch.empty(2, 8, device="cuda"), torch.empty(8), torch.empty(8))


def test_without_the_native_library_attention_is_sdpa(monkeypatch):
    set_fact(monkeypatch, _library, "HAS_NATIVE", False)
    norm = dispatch.OPS["layer_norm"]
    assert dispatch.choose(ATTENTION, ATTENTION.example(CPU, F32)) == "sdpa"
    assert dispatch.choose(norm, norm.example(CPU, F32)) == "eager"
