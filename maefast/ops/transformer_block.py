"""Transformer block: a pre-norm block as one op, each addition in the pass of the next norm."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import dispatch, kernels, request
from ..autocast import compute_dtype, is_autocast
from ..dispatch import FLOATS, Kernel, Op
from ._checks import check_dtype, check_floating, check_same_device, shape_of
from ._tokens import RepeatedTokens
from .add_layer_norm import OP as ADD_LAYER_NORM
from .add_layer_norm import AddNormAsk, add_layer_norm_ref
from .attention import OP as ATTENTION
from .attention import AttentionAsk, attention_ref, tile_number
from .bias_gelu import OP as BIAS_GELU
from .bias_gelu import GeluAsk
from .layer_norm import OP as LAYER_NORM
from .layer_norm import NormAsk, layer_norm_ref
from .linear import LinearAsk, Products, bias_gradient, input_gradient, is_fused, native_products, product, weight_gradient


class BlockWeights(NamedTuple):
    """The parameters of a block in the order of their use; hidden is the width of its MLP."""

    norm1_weight: Tensor  # (D,)
    norm1_bias: Tensor
    qkv_weight: Tensor  # (3 D, D)
    qkv_bias: Tensor
    proj_weight: Tensor  # (D, D)
    proj_bias: Tensor
    norm2_weight: Tensor  # (D,)
    norm2_bias: Tensor
    fc1_weight: Tensor  # (hidden, D)
    fc1_bias: Tensor
    fc2_weight: Tensor  # (D, hidden)
    fc2_bias: Tensor


def weight_shapes(D: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of BlockWeights by name."""
    shapes = ((D,), (D,), (3 * D, D), (3 * D,), (D, D), (D,), (D,), (D,), (hidden, D), (hidden,), (D, hidden), (D,))
    return dict(zip(BlockWeights._fields, shapes, strict=True))


class BlockAsk(NamedTuple):
    """What the choice of a kernel depends on."""

    device: torch.device
    x: torch.dtype
    norm: torch.dtype  # of the norms' weights
    weight: torch.dtype  # of the products' weights
    out: torch.dtype  # that the products run in
    tokens: int
    width: int
    head_width: int
    attention: str  # the backend that the caller asks of attention


def backends(ask: BlockAsk) -> dict[str, str]:
    """Return the backends of a block's ops, without its matrix products."""
    device, x, norm, _, out, _, width, *_ = ask
    return {
        "layer_norm": dispatch.choose(LAYER_NORM, NormAsk(device, x, norm, norm, out, width)),
        "add_layer_norm": dispatch.choose(ADD_LAYER_NORM, AddNormAsk(device, out, x, norm, norm, out, width)),
        "bias_gelu": dispatch.choose(BIAS_GELU, GeluAsk(device, out, ask.weight)),
        "attention": dispatch.choose(ATTENTION, AttentionAsk(device, out, ask.tokens, ask.head_width, False), ask.attention),
    }


def _why_not(rows: str, ask: BlockAsk) -> str | None:
    try:
        chosen = backends(ask)
    except request.CannotRunError as refusal:
        return str(refusal)
    wanted = dict.fromkeys(chosen, rows) | {"attention": "native"}
    return next((f"its {op} runs on {chosen[op]}" for op in chosen if chosen[op] != wanted[op]), None)


KEEPING = ("cuda",)  # devices with the memory to keep what the backward pass would recompute
KERNELS = (
    Kernel("native", ("cpu",), FLOATS, why_not=lambda ask: _why_not("native", ask)),
    Kernel("triton", kernels.DEVICES, FLOATS, why_not=lambda ask: _why_not("triton", ask)),
)
AUTO = {"cpu": ("native",), "cuda": ("triton",)}
OP = Op(
    "transformer_block",
    KERNELS,
    AUTO,
    lambda device, dtype: BlockAsk(device, dtype, dtype, dtype, dtype, tokens=50, width=768, head_width=64, attention="auto"),
)


@request.remembered
def fused_backend(ask: BlockAsk) -> tuple[str | None, str]:
    """Return the backend of norms and GELU of a block as one op, or None and the reason."""
    requested = dispatch.request_for(OP, ask.device)
    reason = "no kernel is asked for"
    for name in AUTO.get(ask.device.type, ()) if requested is None else (requested,):
        if name != "eager" and (reason := dispatch.why_not(OP, name, ask) or "") == "":
            return name, ""
    return None, reason


def transformer_block(
    x: Tensor,
    pending: Tensor | None,
    weights: BlockWeights,
    num_heads: int,
    eps: float = 1e-6,
    *,
    repeated: RepeatedTokens | None = None,
    attention: str = "auto",
) -> tuple[Tensor, Tensor]:
    """A pre-norm block (Dosovitskiy et al. 2021, equations 2 and 3) as two summands.

    x          (N, T, D)  floating-point, the residual stream
    pending    (N, T, D)  floating-point, of any dtype: a branch still to be added to x; or None
    weights               BlockWeights, D = h d with h = num_heads
    repeated              x again, each distinct token once, for norm1 and qkv; without pending
    attention             the `backend` of ops.attention
    returns    (N, T, D), (N, T, D)  r and b, whose sum is the block's output
    With s = x + pending, r = s + proj(attention(qkv(norm1(s)))) and b = fc2(GELU(fc1(norm2(r)))).
    r has the promoted dtype of x and pending, b that of matrix products of x. Gradients for x,
    pending, repeated.rows and all weights, deterministic; kernels are differentiable once.
    Raises TypeError or ValueError when shapes, dtypes or devices do not fit.
    """
    _check(x, pending, weights, num_heads, repeated)
    D, norm, weight = x.shape[2], weights.norm1_weight.dtype, weights.qkv_weight.dtype
    ask = BlockAsk(x.device, x.dtype, norm, weight, compute_dtype(x), x.shape[1], D, D // num_heads, attention)
    backend = dispatch.choose(OP, ask)
    if backend == "eager":
        return transformer_block_ref(x, pending, weights, num_heads, eps)
    return run_block(backend, ask, x, pending, weights, eps, repeated)


def run_block(
    backend: str,
    ask: BlockAsk,
    x: Tensor,
    pending: Tensor | None,
    weights: BlockWeights,
    eps: float,
    repeated: RepeatedTokens | None = None,
) -> tuple[Tensor, Tensor]:
    """Run transformer_block on the backend chosen for `ask`, with checked arguments."""
    native = native_products(LinearAsk(ask.device, ask.x, ask.weight, ask.weight, ask.out))
    plan = _Plan(backend, ask.width // ask.head_width, eps, ask.out, native, keep=ask.device.type in KEEPING)
    rows, ids_restore = repeated or (None, None)
    if torch.is_grad_enabled():
        return _TransformerBlock.apply(plan, x, pending, rows, ids_restore, *weights)
    return _infer(plan, x, pending, repeated, weights)


def _check(x: Tensor, pending: Tensor | None, weights: BlockWeights, num_heads: int, repeated: RepeatedTokens | None) -> None:
    given = weights._asdict() | ({} if pending is None else {"pending": pending})
    check_floating(x=x, **given)
    check_same_device(x=x, **given)
    if x.dim() != 3 or num_heads < 1 or x.shape[2] == 0 or x.shape[2] % num_heads:
        raise ValueError(f"x must be (N, T, D) with D a multiple of num_heads = {num_heads}; its shape is {shape_of(x)}")
    if pending is not None and pending.shape != x.shape:
        raise ValueError(f"pending must have the shape of x, {shape_of(x)}; its shape is {shape_of(pending)}")
    if pending is not None and repeated is not None:
        raise ValueError("repeated is x again, to which nothing is pending; pending must be None beside it")
    for name, shape in weight_shapes(x.shape[2], weights.fc1_bias.numel()).items():
        if (weight := getattr(weights, name)).shape != shape:
            raise ValueError(f"{name} must be {shape}; its shape is {shape_of(weight)}")
    if not is_autocast(x.device, x.dtype):
        for name, weight in weights._asdict().items():
            if not name.startswith("norm"):
                check_dtype(name, weight, (x.dtype,))


def transformer_block_ref(
    x: Tensor, pending: Tensor | None, weights: BlockWeights, num_heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    w1, b1, qkv_w, qkv_b, proj_w, proj_b, w2, b2, fc1_w, fc1_b, fc2_w, fc2_b = weights
    x = x if pending is None else x + pending
    y = layer_norm_ref(x, w1, b1, eps, compute_dtype(x))
    y = F.linear(attention_ref(F.linear(y, qkv_w, qkv_b), num_heads), proj_w, proj_b)
    y, x = add_layer_norm_ref(y, x, w2, b2, eps, compute_dtype(x))
    return x, F.linear(F.gelu(F.linear(y, fc1_w, fc1_b)), fc2_w, fc2_b)


class _Plan(NamedTuple):
    backend: str  # of the norms and GELU
    num_heads: int
    eps: float
    dtype: torch.dtype  # of the matrix products
    native: Products
    keep: bool  # whether outputs of norms and GELU are saved; else backward recomputes them


def _normed(
    plan: _Plan, x: Tensor, pending: Tensor | None, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the norm of x + pending, the sum, center and rstd."""
    rows = dispatch.ops_of(plan.backend)
    if pending is not None:
        return rows.add_layer_norm_fwd(pending, x, weight, bias, plan.eps, plan.dtype)
    y, center, rstd = rows.layer_norm_fwd(x, weight, bias, plan.eps, plan.dtype)
    return y, x, center, rstd


def _infer(
    plan: _Plan, x: Tensor, pending: Tensor | None, repeated: RepeatedTokens | None, weights: BlockWeights
) -> tuple[Tensor, Tensor]:
    w1, b1, qkv_w, qkv_b, proj_w, proj_b, w2, b2, fc1_w, fc1_b, fc2_w, fc2_b = weights
    dtype, native = plan.dtype, plan.native
    if repeated is None:
        y, x, _, _ = _normed(plan, x, pending, w1, b1)
        qkv = product(y, qkv_w.to(dtype), qkv_b.to(dtype), native)
    else:
        y, _, _, _ = _normed(plan, repeated.rows, None, w1, b1)
        qkv = repeated.expanded(product(y, qkv_w.to(dtype), qkv_b.to(dtype), native))
    attended, _ = torch.ops.maefast.attention_fwd(None, qkv, plan.num_heads, tile_number("fwd", qkv, plan.num_heads))
    y, x, _, _ = _normed(plan, x, product(attended, proj_w.to(dtype), proj_b.to(dtype), native), w2, b2)
    if native.forward:
        hidden = product(y, fc1_w.to(dtype), fc1_b.to(dtype), native, gelu=True)
    else:
        hidden = dispatch.ops_of(plan.backend).bias_gelu_fwd(product(y, fc1_w.to(dtype), None, native), fc1_b)
    return x, product(hidden, fc2_w.to(dtype), fc2_b.to(dtype), native)


class _TransformerBlock(torch.autograd.Function):
    """The block as one Function, which saves only tensors that are written to memory anyway. The
    backward pass recomputes the softmax and, on the CPU, the outputs of both norms and of GELU."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: _Plan,
        x: Tensor,
        pending: Tensor | None,
        rows: Tensor | None,
        ids_restore: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        w1, b1, qkv_w, qkv_b, proj_w, proj_b, w2, b2, fc1_w, fc1_b, fc2_w, fc2_b = weights
        dtype, native = plan.dtype, plan.native
        ctx.x_dtype, ctx.pending_dtype = x.dtype, None if pending is None else pending.dtype
        qkv_w, proj_w, fc1_w, fc2_w = [weight.to(dtype) for weight in (qkv_w, proj_w, fc1_w, fc2_w)]
        repeated = None if rows is None or ids_restore is None else RepeatedTokens(rows, ids_restore)
        y1, x1, center1, rstd1 = _normed(plan, x if rows is None else rows, pending, w1, b1)
        qkv = product(y1, qkv_w, qkv_b.to(dtype), native)
        x, qkv = (x1, qkv) if repeated is None else (x, repeated.expanded(qkv))
        attended, lse = torch.ops.maefast.attention_fwd(None, qkv, plan.num_heads, tile_number("fwd", qkv, plan.num_heads))
        y2, x2, center2, rstd2 = _normed(plan, x, product(attended, proj_w, proj_b.to(dtype), native), w2, b2)
        if plan.keep and is_fused("linear_gelu_fwd", y2, fc1_w, native):
            activated, hidden = torch.ops.maefast.linear_gelu_fwd(y2, fc1_w, fc1_b.to(dtype))
            gelu_b = None  # hidden holds it
        else:
            hidden, gelu_b = product(y2, fc1_w, None, native), fc1_b
            activated = dispatch.ops_of(plan.backend).bias_gelu_fwd(hidden, gelu_b)
        ctx.plan, ctx.weight_dtypes = plan, [weight.dtype for weight in weights]
        saved = (x1, ids_restore, qkv, attended, lse, x2, hidden, center1, rstd1, center2, rstd2)
        kept = (y1, y2, activated) if plan.keep else (None, None, None)
        ctx.save_for_backward(*saved, w1, b1, w2, b2, gelu_b, qkv_w, proj_w, fc1_w, fc2_w, *kept)
        return x2, product(activated, fc2_w, fc2_b.to(dtype), native)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx2: Tensor, dy: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: under checkpointing they may be unpacked once only
        x1, ids_restore, qkv, attended, lse, x2, hidden, center1, rstd1, center2, rstd2 = saved[:11]
        w1, b1, w2, b2, gelu_b, qkv_w, proj_w, fc1_w, fc2_w, y1, y2, activated = saved[11:]
        plan: _Plan = ctx.plan
        dtype, native, rows = plan.dtype, plan.native, dispatch.ops_of(plan.backend)
        again = None if plan.keep else dtype  # of the norms' outputs, where they are recomputed
        needs = BlockWeights(*ctx.needs_input_grad[5:])
        dtypes = BlockWeights(*ctx.weight_dtypes)
        grads: dict[str, Tensor] = {}

        def differentiate_linear(name: str, dy: Tensor, inputs: Tensor) -> None:
            if getattr(needs, f"{name}_weight"):
                grads[f"{name}_weight"] = weight_gradient(dy, inputs, getattr(dtypes, f"{name}_weight"), native)
            if getattr(needs, f"{name}_bias") and f"{name}_bias" not in grads:
                grads[f"{name}_bias"] = bias_gradient(dy)

        kind = "linear_gelu_bwd_sum" if needs.fc1_bias else "linear_gelu_bwd"
        if gelu_b is None and is_fused(kind, dy, fc2_w, native):
            dhidden, grads["fc1_bias"] = torch.ops.maefast.linear_gelu_bwd(dy, fc2_w, hidden, needs.fc1_bias)
        else:
            dhidden, grads["fc1_bias"], recomputed = rows.bias_gelu_bwd(
                input_gradient(dy, fc2_w, native), hidden, gelu_b, not plan.keep, needs.fc1_bias
            )
            activated = activated if plan.keep else recomputed
        differentiate_linear("fc2", dy, activated)
        del activated
        narrow = dtype if x2.dtype != dtype else None  # the residual stream may be wider
        dx, grads["norm2_weight"], grads["norm2_bias"], recomputed, dy, grads["proj_bias"] = rows.layer_norm_bwd(
            input_gradient(dhidden, fc1_w, native), dx2, x2, w2, b2, center2, rstd2, again, narrow, needs.proj_bias
        )
        differentiate_linear("fc1", dhidden, y2 if plan.keep else recomputed)
        del dhidden, y2, recomputed
        dy = dx if narrow is None else dy
        differentiate_linear("proj", dy, attended)
        dattended = input_gradient(dy, proj_w, native)
        out = (None, None) if lse.numel() == 0 else (attended, lse)
        tile = tile_number("bwd", qkv, plan.num_heads)
        _, dqkv, grads["qkv_bias"] = torch.ops.maefast.attention_bwd(
            dattended, None, qkv, *out, plan.num_heads, needs.qkv_bias, tile
        )
        if ids_restore is not None:
            dqkv = RepeatedTokens(x1, ids_restore).summed(dqkv)
        cast = next((d for d in (ctx.pending_dtype, ctx.x_dtype) if d not in (None, x1.dtype)), None)
        dx1, grads["norm1_weight"], grads["norm1_bias"], recomputed, dx1_cast, _ = rows.layer_norm_bwd(
            input_gradient(dqkv, qkv_w, native), dx if ids_restore is None else None, x1, w1, b1, center1, rstd1, again, cast
        )
        differentiate_linear("qkv", dqkv, y1 if plan.keep else recomputed)
        dx, drows = (dx1, None) if ids_restore is None else (dx, dx1)

        def in_dtype(wanted: torch.dtype) -> Tensor:
            return dx1_cast if wanted == cast and ids_restore is None else dx.to(wanted)

        return (
            None,
            in_dtype(ctx.x_dtype) if ctx.needs_input_grad[1] else None,
            in_dtype(ctx.pending_dtype) if ctx.needs_input_grad[2] else None,
            drows if ctx.needs_input_grad[3] else None,
            None,
            *[grads[name].to(getattr(dtypes, name)) if getattr(needs, name) else None for name in BlockWeights._fields],
        )
