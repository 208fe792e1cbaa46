"""What tests of blocks share: a small block, the reference's with its weights, the error rule."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from support import Results, assert_results, attends_otherwise
from torch import Tensor, nn

from maefast import reference
from maefast.blocks import Block

F32, BF16 = torch.float32, torch.bfloat16
# dtypes of the parameters and x, and of autocast
MODES = {"fp32": (F32, None), "bf16 autocast": (F32, BF16), "fp16 autocast": (F32, torch.float16), "bf16": (BF16, None)}
D, HEADS, T = 24, 3, 19


def make_block(dtype: torch.dtype = F32, seed: int = 0, norm_layer: Callable[[int], nn.Module] = nn.LayerNorm) -> Block:
    """Every parameter random: none is left at the zeros and ones of a fresh block."""
    torch.manual_seed(seed)
    block = Block(D, HEADS, 4.0, norm_layer)
    with torch.no_grad():
        for name, p in block.named_parameters():
            p.copy_(torch.randn(p.shape) * 0.3 + (1.0 if "norm" in name and "weight" in name else 0.0))
    return block.to(dtype)


def plain(block: Block) -> reference.Block:
    """Return the reference's block with the weights of `block`."""
    out = reference.Block(D, HEADS, 4.0, nn.LayerNorm, "sdpa").to(block.attn.qkv.weight.dtype)
    out.load_state_dict(block.state_dict())
    return out


def through_modules(block: Block) -> Block:
    """Return a copy with a hook that does nothing, so that each of its modules is called."""
    block = copy.deepcopy(block)
    block.mlp.fc1.register_forward_hook(lambda module, args, out: None)
    return block


def autocast(dtype: torch.dtype | None) -> AbstractContextManager[object]:
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype)


def run(block: nn.Module, x: Tensor, dy: Tensor, ids: Tensor | None = None, dtype: torch.dtype | None = None) -> Results:
    """The output and the gradients of x and of every parameter that has one."""
    x = x.detach().requires_grad_()
    block.zero_grad()
    with autocast(dtype):
        y = block(x) if ids is None else block(x, ids)
    y.backward(dy.to(y.dtype))
    return {"y": y.detach(), "x": x.grad} | {name: p.grad for name, p in block.named_parameters() if p.grad is not None}


def samples(count: int, dtype: torch.dtype = F32, rows: int = T) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(3, T, D).to(dtype), torch.randn(3, rows, D)) for _ in range(count)]


def random_ids(rows: int) -> Tensor:
    return torch.rand(3, T).argsort(dim=1)[:, :rows]


def assert_like_plain(
    mine: nn.Module,
    eager: nn.Module,
    cases: list[tuple[Tensor, ...]],
    cast: torch.dtype | None = None,
    exact: nn.Module | None = None,
) -> None:
    """Hold `mine` to the error rule beside the reference's block. A case is x, dy and maybe ids."""
    both, exact = (eager, attends_otherwise(eager)), exact or copy.deepcopy(eager).double()
    assert_results(
        (
            run(mine, *case, dtype=cast),
            [run(m, *case, dtype=cast) for m in both],
            run(exact, *(t.double() if t.is_floating_point() else t for t in case)),
        )
        for case in cases
    )


def fused_into(y: Tensor) -> bool:
    """Whether y is the sum of the residual stream and the branch that the fused block gives."""
    return {type(function).__name__ for function, _ in y.grad_fn.next_functions} == {"_TransformerBlockBackward"}


def is_fused(block: Block) -> bool:
    return fused_into(block(torch.randn(2, T, D)))
