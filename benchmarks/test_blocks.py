"""Attention, Linear and a block against plain torch at ViT-B/16 shapes: forward and backward."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
import traffic
from opbench import Inputs, OpEntry, OpWorkload, Outputs, workloads_of
from rotation import ReplayClock
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from maefast import ops, reference
from maefast.blocks import Block

CLOCK = ReplayClock()
SHAPES = {"encoder": (50, 768, 12), "decoder": (197, 512, 16)}  # tokens, width, heads
LARGER = {"encoder_large": (50, 1024, 16), "encoder_huge": (65, 1280, 16), "decoder_huge": (257, 512, 16)}  # L/16, H/14
LINEARS = {"encoder_qkv": (50, 768, 2304), "decoder_fc1": (197, 512, 2048), "decoder_fc2": (197, 2048, 512)}  # tokens, in, out
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SDPA = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
QUICK_N, FULL_N = 4, 16
QUICK = ("attention_decoder", "linear_decoder_fc1", "block_encoder")


def workloads(full: bool, device: torch.device) -> list[OpWorkload]:
    entries = [entry for entry in ENTRIES if full or entry.name in QUICK]
    entries += [attention_entry(part) for part in LARGER if full and device.type == "cuda"]
    return [
        workload
        for entry in entries
        for variant in (DTYPES if full else ("fp32",))
        for times in (4 if entry.name.startswith("attention") else 1,)
        for workload in workloads_of(entry, variant, device, full, times * QUICK_N, times * FULL_N)
    ]


@pytest.mark.benchmark(timer=CLOCK)
def test_block(benchmark, replay, workload, contender):
    replay(benchmark, CLOCK, workload, contender)


# attention: plain torch materialises the scores; maefast-eager is scaled_dot_product_attention


def make_attention(N: int, variant: str, generator: torch.Generator, T: int, D: int) -> Inputs:
    rand = partial(torch.randn, generator=generator)
    return {"qkv": rand(N, T, 3 * D).to(DTYPES[variant]), "dy": rand(N, T, D).to(DTYPES[variant])}


def plain_attention(qkv: Tensor, heads: int) -> Outputs:
    N, T, _ = qkv.shape
    q, k, v = qkv.view(N, T, 3, heads, -1).permute(2, 0, 3, 1, 4)
    return {"y": (((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v).transpose(1, 2).flatten(2)}


def sdpa(kernel: SDPBackend, qkv: Tensor, heads: int) -> Outputs:
    """Run one of torch's kernels. Raises RuntimeError for what it does not take."""
    with sdpa_kernel(kernel):
        return {"y": ops.attention_ref(qkv, heads)}


def attention_entry(part: str) -> OpEntry:
    T, D, heads = (SHAPES | LARGER)[part]
    return OpEntry(
        name=f"attention_{part}",
        variants=tuple(DTYPES),
        make=partial(make_attention, T=T, D=D),
        plain=partial(plain_attention, heads=heads),
        fused=lambda qkv: {"y": ops.attention(qkv, heads)},
        leaves=("qkv",),
        ops=("attention",),
        bytes=lambda N, x, y: traffic.attention_bytes(N, T, D, y["y"].itemsize) if x["qkv"].is_cuda else traffic.Passes(0),
        flops=lambda N: traffic.attention_flops(N, T, D),
        backends=("native", "flash_attn", "eager"),  # eager is SDPA
        on_gpu=tuple((f"sdpa-{name}", partial(sdpa, kernel, heads=heads)) for name, kernel in SDPA.items()),
    )


# linear: forward and all three gradients


def make_linear(N: int, variant: str, generator: torch.Generator, T: int, width: int, out: int) -> Inputs:
    rand = partial(torch.randn, generator=generator)
    inputs = {"x": rand(N, T, width), "weight": rand(out, width), "bias": rand(out), "dy": rand(N, T, out)}
    return {name: value.to(DTYPES[variant]) for name, value in inputs.items()}


def linear_entry(layer: str) -> OpEntry:
    T, width, out = LINEARS[layer]
    return OpEntry(
        name=f"linear_{layer}",
        variants=tuple(DTYPES),
        make=partial(make_linear, T=T, width=width, out=out),
        plain=lambda x, weight, bias: {"y": F.linear(x, weight, bias)},
        fused=lambda x, weight, bias: {"y": ops.linear(x, weight, bias)},
        leaves=("x", "weight", "bias"),
        ops=("linear",),
        flops=lambda N: traffic.Passes(2 * N * T * width * out, 4 * N * T * width * out),
        backends=("native", "eager", "auto"),
    )


# block: bf16 is under autocast, with weights and residual stream in fp32


def make_block(N: int, variant: str, generator: torch.Generator, T: int, block: nn.Module) -> Inputs:
    D = block.norm1.weight.numel()
    rand = partial(torch.randn, generator=generator)
    weights = {name: rand(p.shape) * (D**-0.5 if p.dim() == 2 else 0.1) for name, p in block.named_parameters()}
    return {"x": rand(N, T, D), **weights, "dy": rand(N, T, D)} | ({"autocast": torch.ones(1)} if variant == "bf16" else {})


def run_block(block: nn.Module, x: Tensor, autocast: Tensor | None = None, **weights: Tensor) -> Outputs:
    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast is not None and x.dtype == torch.float32):
        return {"y": functional_call(block, weights, (x,))}


def block_entry(part: str) -> OpEntry:
    T, D, heads = SHAPES[part]
    norm_layer = partial(nn.LayerNorm, eps=1e-6)
    plain, fused = reference.Block(D, heads, 4.0, norm_layer, "sdpa"), Block(D, heads, 4.0, norm_layer)
    return OpEntry(
        name=f"block_{part}",
        variants=tuple(DTYPES),
        make=partial(make_block, T=T, block=plain),
        plain=partial(run_block, plain),
        fused=partial(run_block, fused),
        leaves=("x", *(name for name, _ in plain.named_parameters())),
        ops=("transformer_block",),
        flops=lambda N: traffic.Passes(*(passes * N * traffic.block_flops(T, D) for passes in (1, 2))),
        backends=("auto", "eager"),
    )


ENTRIES = (*map(attention_entry, SHAPES), *map(linear_entry, LINEARS), *map(block_entry, SHAPES))
