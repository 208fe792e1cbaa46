"""Blocks with hooks or with other parts than maefast's: each is called, and its result counts."""

import pytest
import torch
import torch.nn.functional as F
from block_cases import HEADS, D, T, is_fused, make_block, plain
from support import NATIVE, small_mae
from torch import Tensor, nn

from maefast.blocks import Block
from maefast.ops import _tokens

SUBMODULES = ("norm1", "attn", "attn.qkv", "attn.proj", "norm2", "mlp", "mlp.fc1", "mlp.fc2")


@pytest.mark.parametrize("name", SUBMODULES)
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_are_called(name, kind):
    block, seen = make_block(), []
    module = block.get_submodule(name)
    handle = getattr(module, f"register_{kind}_hook")(lambda *args: seen.append(args[0]))
    block(torch.randn(2, T, D, requires_grad=True)).sum().backward()
    assert seen == [module]
    handle.remove()
    assert is_fused(block) == NATIVE
    assert seen == [module]


@pytest.mark.parametrize("kind", ["hook", "forward"])
def test_what_changes_the_output_of_a_part_is_honoured(kind):
    """A forward hook, and a forward of the instance."""
    block, x = make_block(), torch.randn(2, T, D)
    for part in (block.attn, block.mlp):
        if kind == "hook":
            part.register_forward_hook(lambda module, args, out: out * 0)
        else:
            part.forward = torch.zeros_like
    assert torch.equal(block(x), x)


def test_hooks_on_all_modules_are_called():
    block, seen = make_block(), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(module))
    try:
        block(torch.randn(2, T, D))
    finally:
        handle.remove()
    assert {id(module) for module in seen} == {id(module) for module in block.modules()}


class LoRA(nn.Linear):
    """A Linear with a low-rank addition of its own."""

    def __init__(self, base: nn.Linear):
        super().__init__(base.in_features, base.out_features)
        self.load_state_dict(base.state_dict())
        self.a, self.b = nn.Parameter(torch.randn(2, base.in_features)), nn.Parameter(torch.randn(base.out_features, 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.a.T @ self.b.T


@pytest.mark.parametrize("name", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
def test_a_linear_that_was_swapped_is_honoured(name):
    """As if its addition were part of the weight."""
    block = make_block()
    lora = LoRA(block.get_submodule(name))
    merged = plain(block).double()
    with torch.no_grad():
        merged.get_submodule(name).weight += lora.b.double() @ lora.a.double()
    block.set_submodule(name, lora)
    x = torch.randn(2, T, D)
    y = block(x)
    torch.testing.assert_close(y, merged(x.double()).float(), rtol=1e-4, atol=1e-4)
    y.sum().backward()
    assert lora.a.grad.abs().sum() > 0
    assert not is_fused(block)


class RMSNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * x.square().mean(dim=-1, keepdim=True).add(1e-6).rsqrt() * self.scale


class CenteredNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) - 1


NORMS = {
    "rms": RMSNorm,
    "subclass": CenteredNorm,
    "no_affine": lambda dim: nn.LayerNorm(dim, elementwise_affine=False),
    "no_bias": lambda dim: nn.LayerNorm(dim, bias=False),
    "identity": lambda dim: nn.Identity(),
}


@pytest.mark.parametrize("ids", [None, torch.tensor([[3, 0], [7, 8]])], ids=["whole", "ids"])
@pytest.mark.parametrize("norm_layer", NORMS.values(), ids=NORMS)
def test_other_norms(norm_layer, ids):
    block = make_block(norm_layer=norm_layer)
    x = torch.randn(2, T, D)
    h = x + attention_by_hand(block, block.norm1(x))
    expected = h + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(h))))
    if ids is not None:
        expected = torch.stack([expected[n, ids[n]] for n in range(2)])
    torch.testing.assert_close(block(x, ids), expected, rtol=1e-5, atol=1e-5)


def attention_by_hand(block: Block, x: Tensor) -> Tensor:
    q, k, v = block.attn.qkv(x).view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
    return block.attn.proj(((q @ k.transpose(-1, -2) / (D // HEADS) ** 0.5).softmax(dim=-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("name", ["attn.qkv", "mlp.fc2"])
def test_linears_without_bias(name):
    block, other, x = make_block(), make_block(), torch.randn(2, T, D)
    block.get_submodule(name).bias = None
    other.get_submodule(name).bias.data.zero_()
    torch.testing.assert_close(block(x), other(x), rtol=1e-5, atol=1e-5)


class SkippedBlock(Block):
    """A subclass with the signature that blocks have elsewhere."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0.5


@pytest.mark.parametrize("position", [0, -1], ids=["first", "last"])
@pytest.mark.parametrize("change", ["subclass", "wrapper", "instance", "hook"])
def test_decoder_blocks_may_be_others(change, position, monkeypatch):
    """Without pred maefast's first and last block skip tokens. Others are called as block(x)."""
    monkeypatch.setattr(_tokens, "REPEATED_VALUES", 0)
    model = small_mae(decoder_depth=2)
    block, seen = model.decoder_blocks[position], []
    if change == "subclass":
        model.decoder_blocks[position] = SkippedBlock(24, 3, 4.0, nn.LayerNorm)
    elif change == "wrapper":
        model.decoder_blocks[position] = nn.Sequential(block)
    elif change == "instance":
        forward = block.forward
        block.forward = lambda x: forward(x)
    else:
        block.register_forward_hook(lambda module, args, out: seen.append((len(args), out.shape)))
    imgs, noise = torch.randn(2, 3, 64, 48), torch.rand(2, 24)
    torch.testing.assert_close(model(imgs, noise=noise, return_pred=False).loss, model(imgs, noise=noise).loss, rtol=1e-5, atol=0)
    assert seen == ([(1, (2, 25, 24))] * 2 if change == "hook" else [])
