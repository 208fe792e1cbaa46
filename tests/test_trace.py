"""The forward on a GPU, traced on fake CUDA tensors: its kernels, and no wait for the host."""

import re

import pytest
import torch
from support import set_fact, small_mae
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

import maefast
from maefast import _library, kernels
from maefast import gpu as gpu_facts

BF16 = torch.bfloat16
# Heads 64 wide in 50 tokens and 32 wide in 197, the sizes that native attention was measured at.
SIZES = {"img_size": 224, "patch_size": 16, "embed_dim": 64, "num_heads": 1, "decoder_embed_dim": 32, "decoder_num_heads": 1}
N, PATCHES = 2, 196


class Indexing(TorchFunctionMode):
    """Index by calls of ops: a torch without CUDA refuses to index even a fake CUDA tensor."""

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
    for owner, name in ((_library, "HAS_NATIVE"), (_library, "HAS_CUDA"), (kernels, "HAS_TRITON")):
        set_fact(monkeypatch, owner, name, True)
    set_fact(monkeypatch, gpu_facts, "capability", lambda device: (9, 0))
    set_fact(monkeypatch, gpu_facts, "shared_memory", lambda device: 227 << 10)


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
    """Count maefast's kernels, attention and norms; no call may wait for the host."""
    assert not [name for name in names if re.match(r"aten\.(_local_scalar_dense|item|nonzero|is_nonzero|equal)", name)]
    found = [name for name in names if re.search("^maefast|_safe_softmax|layer_norm", name)]
    return {name: found.count(name) for name in found}


PIXELS = {"maefast_triton.random_masking_fwd": 1, "maefast_triton.gather_patches_fwd": 1, "maefast_triton.masked_mse_fwd": 1}
AROUND = PIXELS | {"maefast_triton.unshuffle_fwd": 1}
NATIVE = "maefast.attention_fwd"
SDPA = "aten._safe_softmax"  # a torch without CUDA takes it apart
# Stacks of two blocks and one: a norm first; every other norm adds the branch before it.
ROWS = {"maefast_triton.layer_norm_fwd": 2, "maefast_triton.add_layer_norm_fwd": 6, "maefast_triton.bias_gelu_fwd": 3}


@pytest.mark.parametrize("options", [{}, {"backend": "triton"}, {"attn_backend": "sdpa"}], ids=["auto", "triton", "sdpa"])
def test_kernels(hopper, options):
    """Attention chooses by itself unless the model asks."""
    assert count(calls(**options)) == AROUND | ROWS | {SDPA if "attn_backend" in options else NATIVE: 3}


def test_auto_on_a_gpu_without_measurements(hopper, monkeypatch):
    set_fact(monkeypatch, gpu_facts, "capability", lambda device: (8, 0))
    assert count(calls()) == AROUND | ROWS | {SDPA: 3}


def test_the_removed_patches_alone(hopper):
    """The last block's queries, of removed patches, go to SDPA by auto; native takes all tokens."""
    ranked_twice = {"maefast_triton.random_masking_fwd": 2}  # the noise, and the mask
    assert count(calls(return_pred=False)) == AROUND | ROWS | ranked_twice | {NATIVE: 2, SDPA: 1}
    assert count(calls(return_pred=False, attn_backend="native")) == AROUND | ROWS | ranked_twice | {NATIVE: 3}
