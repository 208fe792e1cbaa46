"""The modules of a Vision Transformer's stack, and the route that a block takes."""

from collections.abc import Callable, Iterable
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _torch, dispatch, ops, request
from .autocast import compute_dtype, is_autocast, product_dtype
from .ops._tokens import RepeatedTokens, repeats_enough, take_tokens
from .ops.attention import OP as ATTENTION
from .ops.attention import AttentionAsk
from .ops.transformer_block import BlockAsk, BlockWeights, backends, fused_backend, run_block
from .plain import is_plain, project


class Route(Enum):
    """How a block runs."""

    FUSED = "one op"
    OPS = "a chain of ops"
    MODULES = "its modules"


class Attention(nn.Module):
    """Multi-head self-attention; `drop` is the dropout after the projection."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, drop: float = 0.0, *, backend: str = "auto"):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"the width must be a multiple of num_heads; {dim} is no multiple of {num_heads}")
        dispatch.check_backend(ATTENTION, backend, "attn_backend")
        self.num_heads, self.drop, self.backend = num_heads, drop, backend
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        attended = ops.attention(project(self.qkv, x), self.num_heads, backend=self.backend)
        return F.dropout(project(self.proj, attended), self.drop, self.training)


class Mlp(nn.Module):
    """fc2(GELU(fc1(x))), exact GELU; `drop` is the dropout after GELU and after fc2."""

    def __init__(self, dim: int, hidden: int, drop: float = 0.0):
        super().__init__()
        self.drop = drop
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.dropout(ops.bias_gelu(project(self.fc1, x)), self.drop, self.training)
        return F.dropout(project(self.fc2, hidden), self.drop, self.training)


def drop_path(y: Tensor, rate: float) -> Tensor:
    """Drop each sample of a branch y (N, ...) with probability `rate`, else return y / (1 - rate):
    stochastic depth (Huang et al. 2016)."""
    wide = torch.promote_types(y.dtype, torch.float32)
    kept = torch.empty(y.shape[0], *[1] * (y.dim() - 1), dtype=wide, device=y.device).bernoulli_(1 - rate)
    return (y * (kept / (1 - rate))).to(y.dtype)


class Block(nn.Module):
    """A pre-norm transformer block; x (N, T, D) -> (N, T, D).

    drop, drop_path   rates of dropout and of stochastic depth on both branches, in training
    attn_backend      the backend of its attention
    """

    norm1: Any  # an nn.LayerNorm where its parameters are read
    norm2: Any

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        norm_layer: Callable[[int], nn.Module],
        *,
        attn_backend: str = "auto",
        qkv_bias: bool = True,
        drop: float = 0.0,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads, qkv_bias, drop, backend=attn_backend)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)

    def forward(self, x: Tensor, ids: Tensor | None = None, repeated: RepeatedTokens | None = None) -> Tensor:
        """Return the output (N, T, D), or only that of the tokens ids (N, M), (N, M, D).

        repeated   x again, for ops.transformer_block; other routes ignore it
        """
        x, branch = self.advance(x, None, ids, repeated)
        return x + branch

    def advance(
        self, x: Tensor, pending: Tensor | None, ids: Tensor | None = None, repeated: RepeatedTokens | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return forward of x + pending as two summands: the residual stream and a branch."""
        if ids is not None and not self._takes_queries(x):
            return _taken(self.advance(x, pending), ids)
        weights, _ = self._plain_weights()
        if weights is None:
            return self._advance_by_modules(x, pending, ids)
        ask = self._ask(weights, x.device, x.dtype, x.shape[1])
        route, _ = self._route_of(ask, ids is not None)
        match route:
            case Route.FUSED:
                backend, _ = fused_backend(ask)
                return run_block(str(backend), ask, x, pending, weights, self.norm1.eps, repeated)
            case Route.OPS:
                return self._advance_by_ops(weights, x, pending, ids)
            case Route.MODULES:
                return self._advance_by_modules(x, pending, ids)

    def _advance_by_modules(self, x: Tensor, pending: Tensor | None, ids: Tensor | None) -> tuple[Tensor, Tensor]:
        x = x if pending is None else x + pending
        x = x + self._branch(self.attn(self.norm1(x)))
        branch = self._branch(self.mlp(self.norm2(x)))
        return (x, branch) if ids is None else _taken((x, branch), ids)

    def _advance_by_ops(self, w: BlockWeights, x: Tensor, pending: Tensor | None, ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run the chain of ops; queries, projection and MLP only for ids, if given."""
        D, dtype = x.shape[2], compute_dtype(x)
        if pending is None:
            y = ops.layer_norm(x, w.norm1_weight, w.norm1_bias, self.norm1.eps, dtype)
        else:
            y, x = ops.add_layer_norm(pending, x, w.norm1_weight, w.norm1_bias, self.norm1.eps, dtype)
        if ids is None:
            qkv, q = ops.linear(y, w.qkv_weight, w.qkv_bias), None
        else:
            q = ops.linear(take_tokens(y, ids), w.qkv_weight[:D], w.qkv_bias[:D])
            qkv = ops.linear(y, w.qkv_weight[D:], w.qkv_bias[D:])
            x = take_tokens(x, ids)
        attended = ops.attention(qkv, self.attn.num_heads, q, backend=self.attn.backend)
        y = self._branch(ops.linear(attended, w.proj_weight, w.proj_bias))
        y, x = ops.add_layer_norm(y, x, w.norm2_weight, w.norm2_bias, self.norm2.eps, dtype)
        hidden = ops.bias_gelu(ops.linear(y, w.fc1_weight), w.fc1_bias)
        return x, self._branch(ops.linear(hidden, w.fc2_weight, w.fc2_bias))

    def route(self, device: torch.device, dtype: torch.dtype, tokens: int, some: bool = False) -> tuple[Route, str]:
        """Return the route of a call on x (N, tokens, D), and why it is no faster one.

        some   whether the output of only some tokens is wanted
        """
        weights, reason = self._plain_weights()
        if weights is None:
            return Route.MODULES, reason
        return self._route_of(self._ask(weights, device, dtype, tokens), some)

    def _route_of(self, ask: BlockAsk, some: bool) -> tuple[Route, str]:
        if not some and ask.weight != ask.x and not is_autocast(ask.device, ask.x):
            return Route.MODULES, f"its weights are {ask.weight}, x is {ask.x}"
        if self.norm1.eps != self.norm2.eps:
            return Route.OPS, "its norms have different eps"
        return _choose_route(ask, some, self._drops_paths())

    def _plain_weights(self) -> tuple[BlockWeights | None, str]:
        """Return the parameters, or None and why the modules of the block must be called."""
        # nn.Module looks up each module and parameter in Python, so each is read once
        norm1, attn, norm2, mlp = self.norm1, self.attn, self.norm2, self.mlp
        for module, kind in ((norm1, nn.LayerNorm), (attn, Attention), (norm2, nn.LayerNorm), (mlp, Mlp)):
            if not is_plain(module, kind):
                return None, "a module of it is hooked or replaced"
        qkv, proj, fc1, fc2 = attn.qkv, attn.proj, mlp.fc1, mlp.fc2
        for linear in (qkv, proj, fc1, fc2):
            if not is_plain(linear, nn.Linear):
                return None, "a Linear of it is hooked or replaced"
        weights: list[Tensor] = []
        for module in (norm1, qkv, proj, norm2, fc1, fc2):
            weight, bias = module.weight, module.bias
            if weight is None or bias is None:
                return None, "a module of it has no weight or no bias"
            weights += (weight, bias)
        w = BlockWeights(*weights)
        for weight in (w.qkv_weight, w.proj_weight, w.fc1_weight, w.fc2_weight):
            if _torch.has_own_rule(weight):
                return None, "a weight of it multiplies by a rule of its own"
            if weight.dtype != w.qkv_weight.dtype:
                return None, "its weights are of different dtypes"
        if (attn.training and attn.drop) or (mlp.training and mlp.drop):
            return None, "it drops activations"
        return w, ""

    def _ask(self, w: BlockWeights, device: torch.device, dtype: torch.dtype, tokens: int) -> BlockAsk:
        attn, out, D = self.attn, product_dtype(device, dtype), w.norm1_weight.shape[0]
        return BlockAsk(
            device, dtype, w.norm1_weight.dtype, w.qkv_weight.dtype, out, tokens, D, D // attn.num_heads, attn.backend
        )

    def _drops_paths(self) -> bool:
        return self.training and self.drop_path > 0

    def _branch(self, y: Tensor) -> Tensor:
        return drop_path(y, self.drop_path) if self._drops_paths() else y

    def _takes_queries(self, x: Tensor) -> bool:
        """Return whether a requested backend of attention takes queries of only some tokens."""
        dtype, head_width = compute_dtype(x), x.shape[2] // self.attn.num_heads
        ask = AttentionAsk(x.device, dtype, x.shape[1], head_width, queries=True)
        requested = dispatch.request_for(ATTENTION, x.device, self.attn.backend)
        return requested is None or dispatch.why_not(ATTENTION, requested, ask) is None


@request.remembered
def _choose_route(ask: BlockAsk, some: bool, drops: bool) -> tuple[Route, str]:
    chosen = backends(ask)
    if some:
        return Route.OPS, "queries, projection and MLP of some tokens only"
    if drops:
        return Route.OPS, "stochastic depth scales its branches"
    backend, reason = fused_backend(ask)
    if backend is not None:
        return Route.FUSED, f"norms and GELU on {backend}"
    eager = all(chosen[op] == "eager" for op in ("layer_norm", "add_layer_norm", "bias_gelu"))
    return Route.MODULES if eager else Route.OPS, reason


def _taken(summands: tuple[Tensor, Tensor], ids: Tensor) -> tuple[Tensor, Tensor]:
    return take_tokens(summands[0], ids), take_tokens(summands[1], ids)


def run_blocks(
    blocks: Iterable[nn.Module],
    norm: nn.Module | None,
    x: Tensor,
    *,
    ids: Tensor | None = None,
    unshuffled: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """Run x (N, T, D) through a stack of blocks, then through `norm`.

    ids          (N, M): the wanted tokens; the last block computes the output of only these
    unshuffled   the arguments of ops.unshuffle that made x; the first block then computes what mask
                 tokens share once
    returns      (N, T, D), with ids (N, M, D)
    A block that is hooked, wrapped or of another class is called as block(x).
    """
    pending: Tensor | None = None
    stack = list(blocks)
    if ids is not None and not stack:
        x = take_tokens(x, ids)
    for i, block in enumerate(stack):
        wanted = ids if i == len(stack) - 1 else None
        if is_plain(block, Block):
            repeated = _repeated_tokens(block, x, unshuffled) if i == 0 and wanted is None else None
            if _torch.is_compiled(block):
                x, pending = block(x if pending is None else x + pending, wanted, repeated), None
            else:
                x, pending = block.advance(x, pending, wanted, repeated)
        else:
            x, pending = block(x if pending is None else x + pending), None
            x = x if wanted is None else take_tokens(x, wanted)
    if norm is not None and is_plain(norm, nn.LayerNorm) and norm.weight is not None and norm.bias is not None:
        if pending is None:
            return ops.layer_norm(x, norm.weight, norm.bias, norm.eps)
        return ops.add_layer_norm(pending, x, norm.weight, norm.bias, norm.eps)[0]
    x = x if pending is None else x + pending
    return x if norm is None else norm(x)


def _repeated_tokens(block: Block, x: Tensor, unshuffled: tuple[Tensor, Tensor, Tensor, Tensor] | None) -> RepeatedTokens | None:
    if unshuffled is None or not repeats_enough(x, unshuffled[0].shape[1] - 1):
        return None
    route, _ = block.route(x.device, x.dtype, x.shape[1])
    return RepeatedTokens.of(*unshuffled) if route is Route.FUSED else None
