"""explain(): what runs where, and why."""

from collections.abc import Iterator
from itertools import groupby

import torch
from torch import nn
from torch.nn.attention import SDPBackend

from . import _library, _torch, cpu, dispatch, request
from .blocks import Block
from .dispatch import OPS, Op
from .ops.attention import OP as ATTENTION
from .ops.attention import AttentionAsk


def explain(model: nn.Module | None = None, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
    """Print the native objects and a table: op, chosen backend for tensors of `device` and `dtype`,
    why not the others.

    For a `maefast.MAE` or `VisionTransformer` also attention in encoder (at the default mask ratio)
    and decoder, the route of each block, and that of its forward, which depends on overrides.
    Raises ValueError for a name that is no device, RuntimeError for a device that is not here.
    """
    _check_device(device)
    print(cpu.describe(), *_library.describe(), sep="\n")
    rows = [("op", "backend", "why not the others")]
    where = torch.device(device)
    for op in OPS.values():
        rows.append((op.name, *_choice(op, op.example(where, dtype))))
    for name, tokens, blocks in _stacks(model):
        attn = blocks[0].attn
        ask = AttentionAsk(where, dtype, tokens, attn.qkv.in_features // attn.num_heads, queries=False)
        rows.append((f"{name} attention", *_choice(ATTENTION, ask, attn.backend)))
    for name, tokens, blocks in _stacks(model):
        rows += _routes(name, tokens, blocks, where, dtype)
    first, second = (max(len(row[i]) for row in rows) for i in range(2))
    print(*(f"{row[0]:<{first}}  {row[1]:<{second}}  {row[2]}" for row in rows), sep="\n")
    if model is not None:
        overridden: tuple[str, ...] = getattr(model, "overridden_methods", tuple)()
        asked: str | None = getattr(model, "attn_backend", None)
        route = f"the official route, through the overridden {', '.join(overridden)}" if overridden else "the fused path"
        print(f"{type(model).__name__}.forward takes {route}" + (f"; its attn_backend is {asked}" if asked else ""))


def _check_device(device: str) -> None:
    try:
        torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f'device must be that of a tensor, such as "cpu" or "cuda"; it is {device!r}') from error
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        here = "the CPU alone" if accelerator is None else f"the CPU and {accelerator.type}"
        raise RuntimeError(f"device {device} is not here: torch {torch.__version__} has {here} on this machine") from error


def _choice(op: Op, ask: dispatch.Ask, asked: str = "auto") -> tuple[str, str]:
    """Return the backend, and why it is not one of the others."""
    requested = dispatch.request_for(op, ask.device, asked)
    chosen = requested or dispatch.choose(op, ask)
    reason = dispatch.why_not(op, chosen, ask)
    why = [f"{chosen} was requested and cannot run: {reason}"] if reason else []
    if chosen == "sdpa" and reason is None:
        why.append(f"torch picks its {_kernel_of_sdpa(ask)} kernel")
    for name in request.BACKENDS:
        bound = dispatch.binds(name, op, ask.device)
        if name != chosen and (bound or name == request.requested()):
            unbound = "" if bound else " was requested and does not bind this op"
            why.append(f"{name}{unbound}: {_why_not_chosen(op, name, chosen, ask, requested is not None)}")
    return chosen, "; ".join(why) or f"there is no kernel of it for {ask.device.type}"


def _why_not_chosen(op: Op, name: str, chosen: str, ask: dispatch.Ask, requested: bool) -> str:
    if (reason := dispatch.why_not(op, name, ask)) is not None:
        return reason
    if requested:
        return f"{chosen} was requested"
    if (name, chosen) == ("eager", "sdpa"):
        return "the same call"
    return dispatch.why_passed_over(op, name, ask) or f"{chosen} is faster"


def _kernel_of_sdpa(ask: AttentionAsk) -> str:
    """Return flash, cudnn, efficient or math: what torch runs for such queries, keys and values."""
    q, k, v = (torch.empty(1, 1, ask.tokens, ask.head_width, dtype=ask.qkv, device=ask.device) for _ in range(3))
    return SDPBackend(_torch.sdpa_backend(q, k, v)).name.removesuffix("_ATTENTION").lower()


def _stacks(model: nn.Module | None) -> Iterator[tuple[str, int, list[Block]]]:
    """Yield name, tokens and blocks of each stack."""
    patches: int = getattr(getattr(model, "patch_embed", None), "num_patches", 0)
    tokens = {"encoder": 1 + (patches // 4 if hasattr(model, "decoder_blocks") else patches), "decoder": 1 + patches}
    for name, stack in (("encoder", "blocks"), ("decoder", "decoder_blocks")):
        blocks = [block for block in getattr(model, stack, ()) if isinstance(block, Block)]
        if blocks:
            yield name, tokens[name], blocks


def _routes(
    name: str, tokens: int, blocks: list[Block], device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, str, str]]:
    """Yield the blocks that take one route for one reason, the route and the reason."""
    routes = [(index, block.route(device, dtype, tokens)) for index, block in enumerate(blocks)]
    for (route, reason), group in groupby(routes, key=lambda entry: entry[1]):
        indices = [index for index, _ in group]
        numbers = f"block {indices[0]}" if len(indices) == 1 else f"blocks {indices[0]} to {indices[-1]}"
        yield f"{name} {numbers}", route.name, f"{route.value}: {reason}"
