"""The trainable parameters of fine-tuning, and their layer-wise learning rates."""

from collections import defaultdict
from typing import Any

from torch import nn

from ...encoder import VisionTransformer


def layer_of(name: str, depth: int) -> int:
    """Return a parameter's layer: 0 for embeddings, 1 to depth for blocks, depth + 1 after them."""
    if name in ("cls_token", "pos_embed") or name.startswith("patch_embed."):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return depth + 1


def layer_decay_groups(encoder: VisionTransformer, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Return groups of trainable parameters. `lr_scale` is layer_decay to the power of the layers
    above (Clark et al. 2020). Vectors, class token and positions get no weight decay."""
    depth, undecayed = len(encoder.blocks), encoder.no_weight_decay()
    groups = defaultdict[tuple[int, float], list[nn.Parameter]](list)
    for name, parameter in encoder.named_parameters():
        if parameter.requires_grad:
            decay = 0.0 if parameter.dim() <= 1 or name in undecayed else weight_decay
            groups[layer_of(name, depth), decay].append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_scale": layer_decay ** (depth + 1 - layer)}
        for (layer, decay), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def train_last_blocks(encoder: VisionTransformer, blocks: float) -> None:
    """Freeze all but the head, the last `blocks` blocks and the final norm (paper, figure 9).

    blocks    0 (only the head), 0.5 (the MLP of the last block and its norm) or 1 to depth
    Stochastic depth is turned off in frozen blocks. Raises ValueError for another number.
    """
    depth, all_blocks = len(encoder.blocks), list[Any](encoder.blocks)
    if not (0 <= blocks <= depth and (blocks == 0.5 or blocks == int(blocks))):
        raise ValueError(f"blocks must be 0.5 or a whole number from 0 to {depth}, the depth of the encoder; it is {blocks:g}")
    encoder.requires_grad_(False)
    learning: list[nn.Module] = [encoder.head]
    if blocks:
        learning.append(encoder.fc_norm if encoder.global_pool else encoder.norm)
    if blocks == 0.5:
        learning += [all_blocks[-1].norm2, all_blocks[-1].mlp]
    for module in (*learning, *all_blocks[depth - int(blocks) :]):
        module.requires_grad_(True)
    for block in all_blocks[: depth - int(blocks)]:
        block.drop_path = 0.0


def reset_head(encoder: VisionTransformer, std: float) -> None:
    """Draw the head's weights from N(0, std), truncated at -2 and 2; set its biases to 0."""
    head: Any = encoder.head
    nn.init.trunc_normal_(head.weight, std=std)
    nn.init.zeros_(head.bias)
