"""The model's forward on a GPU, traced on fake CUDA tensors: which kernels it calls there, and that none waits for the host."""

import pytest
import torch
from support import small_mae
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

import maefast
from maefast import _library, dispatch, kernels

BF16 = torch.bfloat16
# Heads 64 wide in 50 tokens and 32 wide in 197, the sizes that native attention was measured at.
SIZES = {"img_size": 224, "patch_size": 16, "embed_dim": 64, "num_heads": 1, "decoder_embed_dim": 32, "decoder_num_heads": 1}
N, PATCHES = 2, 196


class Indexing(TorchFunctionMode):
    """t[...] of integers, slices and None as calls of ops: a torch without CUDA refuses to index a CUDA tensor, even a fake one."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not Tensor.__getitem__:
            return func(*args, **(kwargs or {}))
        t, index = args
        dim = 0
        for i in index if isinstance(index, tuple) else (index,):
            if isinstance(i, int):
                t = t.select(dim, i)
                continue
            if i is None:
                t = t.unsqueeze(dim)
            else:
                assert isinstance(i, slice), i
                start, stop, step = i.indices(t.shape[dim])
                t = torch.ops.aten.slice(t, dim, start, stop, step)
            dim += 1
        return t


@pytest.fixture
def hopper(monkeypatch):
    """To all that dispatch can tell: Triton, a build with CUDA kernels, and an H100."""
    monkeypatch.setattr(_library, "HAS_NATIVE", True)
    monkeypatch.setattr(_library, "HAS_CUDA", True)
    monkeypatch.setattr(kernels, "HAS_TRITON", True)
    monkeypatch.setattr(dispatch, "_NOT_INSTALLED", {})
    monkeypatch.setattr(dispatch, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(dispatch, "_shared_memory", lambda device: 227 << 10)


def calls(backend: str = "auto", return_pred: bool = True, **options: object) -> list[str]:
    """The ops in the graph of forward, in order."""
    model = small_mae(**SIZES, **options).to(BF16)
    with FakeTensorMode(), torch.no_grad():
        for module in model.modules():
            for name, parameter in module._parameters.items():
                module._parameters[name] = nn.Parameter(torch.empty(parameter.shape, dtype=BF16, device="cuda"))
            for name, buffer in module._buffers.items():
                module._buffers[name] = torch.empty(buffer.shape, device="cuda")
        imgs, noise = torch.empty(N, 3, 224, 224, dtype=BF16, device="cuda"), torch.empty(N, PATCHES, device="cuda")

        def forward(imgs: Tensor, noise: Tensor) -> Tensor:
            with Indexing():
                return model(imgs, noise=noise, return_pred=return_pred).loss

        with maefast.backend(backend):
            graph = make_fx(forward)(imgs, noise)
    return [str(node.target).removesuffix(".default") for node in graph.graph.nodes if node.op == "call_function"]


def count(names: list[str]) -> dict[str, int]:
    ours = [name for name in names if name.startswith("maefast") or "scaled_dot_product" in name or "layer_norm" in name]
    return {name: ours.count(name) for name in ours}


def assert_no_host_sync(names: list[str]) -> None:
    waits = ("_local_scalar_dense", "item", "nonzero", "_to_copy.cpu", "is_nonzero", "equal")
    assert not [name for name in names if name.split(".")[1] in waits]


BEFORE = {"maefast_triton.random_masking_fwd": 1, "maefast_triton.gather_patches_fwd": 1, "maefast_triton.unshuffle_fwd": 1}
MSE = {"maefast_triton.masked_mse_fwd": 1}


def test_auto(hopper):
    """Depth 2 and 1: three blocks, whose norms are torch's, and the two norms behind them."""
    names = calls()
    print(names)
    assert count(names) == BEFORE | MSE | {"maefast.attention_fwd": 3, "aten.native_layer_norm": 8}
    assert_no_host_sync(names)
