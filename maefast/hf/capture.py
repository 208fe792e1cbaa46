"""Features of transformers that blocks lack: dropout, hidden states, attention weights."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..blocks import Attention, Mlp


class DroppingAttention(nn.Module):
    """Attention with dropout of its weights and of its output."""

    def __init__(self, attention: Attention, weights: float, projected: float):
        super().__init__()
        self.qkv, self.proj, self.num_heads = attention.qkv, attention.proj, attention.num_heads
        self.backend, self.weights, self.projected = attention.backend, weights, projected

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        if self.training and self.weights:
            q, k, v = _heads(qkv, self.num_heads)
            attended = F.scaled_dot_product_attention(q, k, v, dropout_p=self.weights).transpose(1, 2).flatten(2)
        else:
            attended = ops.attention(qkv, self.num_heads, backend=self.backend)
        return F.dropout(self.proj(attended), self.projected, self.training)


class DroppingMlp(nn.Module):
    """An MLP with dropout of its output."""

    def __init__(self, mlp: Mlp, rate: float):
        super().__init__()
        self.fc1, self.fc2, self.rate = mlp.fc1, mlp.fc2, rate

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.fc2(ops.bias_gelu(self.fc1(x))), self.rate, self.training)


def add_dropout(blocks: nn.ModuleList, hidden: float, weights: float) -> None:
    """Add the dropout of transformers' layers to every block, unless both rates are 0."""
    for name, rate in (("hidden_dropout_prob", hidden), ("attention_probs_dropout_prob", weights)):
        if not 0 <= rate < 1:
            raise ValueError(f"config.{name} must be in [0, 1); it is {rate}")
    block: Any
    for block in blocks if hidden or weights else ():
        block.attn = DroppingAttention(block.attn, weights, hidden)
        block.mlp = DroppingMlp(block.mlp, hidden)


@contextmanager
def captured(blocks: nn.ModuleList, hidden: bool, attentions: bool) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Yield lists that collect the tokens before each block and after the last, and the attention
    weights (N, h, T, T) of each, if wanted."""
    states, weights = list[Tensor](), list[Tensor]()
    with ExitStack() as stack:
        block: Any
        for block in blocks:
            if hidden:
                stack.callback(block.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0])).remove)
            if attentions:
                stack.callback(block.attn.qkv.register_forward_hook(_keep_weights(weights, block.attn.num_heads)).remove)
        if hidden and len(blocks):
            stack.callback(block.register_forward_hook(lambda _, __, output: states.append(output)).remove)
        yield states, weights


def _keep_weights(weights: list[Tensor], num_heads: int) -> Callable[[nn.Module, Any, Tensor], None]:
    def keep(linear: nn.Module, inputs: Any, qkv: Tensor) -> None:
        q, k, _ = _heads(qkv, num_heads)
        scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
        weights.append(scores.softmax(dim=-1, dtype=torch.float32).to(qkv.dtype))

    return keep


def _heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split (N, T, 3 h d) into queries, keys and values, each (N, h, T, d)."""
    q, k, v = qkv.unflatten(2, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    return q, k, v
