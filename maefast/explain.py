"""explain(): what runs where, and why."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from . import dispatch


def explain(model: nn.Module | None = None, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
    """Prints a table: op, the backend chosen for tensors of `device` and `dtype`, why the others were not.

    Beside `sdpa` stands the kernel that torch picks. With a `maefast.MAE`, attention in its encoder (at the default mask ratio)
    and in its decoder, the backend that it asks for, and the methods that are overridden and so the route that its forward takes.
    Raises ValueError for a name that is no device, and RuntimeError for a device that is not here.
    """
    _check_device(device)
    rows = [("op", "backend", "why not the others")]
    for op in dispatch.OPS:
        inputs, width = _example(op, dtype, device)
        rows.append((op, *_choice(op, inputs, width)))
    asked: str | None = getattr(model, "attn_backend", None)
    if model is not None and asked is not None:
        for name, tokens, num_heads, width in _attentions(model):
            qkv = torch.empty(1, tokens, 3 * num_heads * width, dtype=dtype, device=device)
            rows.append((f"{name} attention", *_choice("attention", {"qkv": qkv}, width, asked)))
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    for row in rows:
        print(f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]}")
    if model is not None:
        overridden: tuple[str, ...] = getattr(model, "overridden_methods", tuple)()
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


def _choice(op: str, inputs: dispatch.Inputs, head_width: int, asked: str = "auto") -> tuple[str, str]:
    """The backend, and why it is not one of the others."""
    requested = dispatch.request_for(op, inputs, asked)
    chosen = requested or dispatch.choose(op, inputs, head_width)
    reason = dispatch.can_run(op, chosen, inputs, head_width)
    why = [f"{chosen} was requested and cannot run: {reason}"] if reason else []
    if chosen == "sdpa" and reason is None:
        why.append(f"torch picks its {_kernel_of_sdpa(inputs['qkv'], head_width)} kernel")
    for name in dispatch.BACKENDS:
        bound = dispatch.binds(name, op, inputs)
        if name != chosen and (bound or name == dispatch.requested()):
            unbound = "" if bound else " was requested and does not bind this op"
            why.append(f"{name}{unbound}: {dispatch.why_not_chosen(op, name, chosen, inputs, head_width, asked)}")
    return chosen, "; ".join(why)


def _kernel_of_sdpa(qkv: Tensor, head_width: int) -> str:
    """flash, cudnn, efficient or math: what torch runs for such queries, keys and values."""
    q, k, v = qkv.unflatten(2, (3, -1, head_width)).permute(2, 0, 3, 1, 4)
    return SDPBackend(torch._fused_sdp_choice(q, k, v)).name.removesuffix("_ATTENTION").lower()


def _example(op: str, dtype: torch.dtype, device: str) -> tuple[dispatch.Inputs, int]:
    """Inputs of an op, and the width of a head; attention's are those of ViT-B/16's encoder."""
    if op == "random_masking":
        return {"noise": torch.empty(0, device=device)}, 0
    if op == "attention":
        return {"qkv": torch.empty(1, 50, 3 * 768, dtype=dtype, device=device)}, 64
    return {name: torch.empty(0, dtype=dtype, device=device) for name in dispatch.inputs_of(op)}, 0


def _attentions(model: Any) -> Iterator[tuple[str, int, int, int]]:
    """Name, tokens, heads and their width of each stack of blocks."""
    patches = model.patch_embed.num_patches
    for name, stack, tokens in (("encoder", "blocks", 1 + patches // 4), ("decoder", "decoder_blocks", 1 + patches)):
        for block in list(getattr(model, stack, ()))[:1]:
            yield name, tokens, block.attn.num_heads, block.attn.qkv.in_features // block.attn.num_heads
