"""Bytes and FLOPs of each op: each pass reads the needed inputs and writes the outputs once.

Letters as in DESIGN.md: N batch, L patches, K kept, D width, P values in a patch. `*_size` is bytes
per element. Indices and ranks are int64, noise and masks fp32.
"""

from typing import NamedTuple

INDEX, FP32, MLP_RATIO = 8, 4, 4


class Passes(NamedTuple):
    """The count of each pass."""

    forward: int
    backward: int = 0


def masking_bytes(N: int, L: int, K: int, P: int, image_size: int, out_size: int) -> Passes:
    """Forward: noise in; ids_keep, ids_restore and mask out; the kept pixels in and out."""
    ranking = N * L * FP32 + N * K * INDEX + N * L * INDEX + N * L * FP32
    return Passes(ranking + N * K * P * (image_size + out_size))


def unshuffle_bytes(N: int, L: int, K: int, D: int, x_size: int, token_size: int, out_size: int) -> Passes:
    """Forward: all inputs in, y out. Backward: dy and ids_restore in, dx and dmask_token out."""
    x, y, ids = N * (1 + K) * D * x_size, N * (1 + L) * D * out_size, N * L * INDEX
    token, positions = D * token_size, (1 + L) * D * token_size
    return Passes(x + ids + token + positions + y, y + ids + x + token)


def unshuffle_flops(N: int, L: int, K: int, D: int) -> Passes:
    """Forward: adding the positions. Backward: summing the mask tokens' gradients."""
    return Passes(N * (1 + L) * D, N * (L - K) * D)


def masked_mse_bytes(N: int, L: int, K: int, P: int, pred_size: int, image_size: int) -> Passes:
    """Forward: mask in, pred and pixels of removed patches in. Backward: the same, dpred out."""
    seen = N * L * FP32 + N * (L - K) * P * (pred_size + image_size)
    return Passes(seen, seen + N * L * P * pred_size)


def masked_mse_flops(N: int, L: int, K: int, P: int) -> Passes:
    """Per removed value: mean 1, variance 3, normalise 2; square and add 3, or backward 2."""
    return Passes(N * (L - K) * P * 9, N * (L - K) * P * 8)


def layer_norm_bytes(rows: int, D: int, x_size: int, parameter_size: int, out_size: int) -> Passes:
    """Forward: x, weight, bias in, y, statistics out. Backward: dy, all but bias in, grads out."""
    x, y, parameter, statistic = rows * D * x_size, rows * D * out_size, D * parameter_size, rows * FP32
    return Passes(x + 2 * parameter + y + 2 * statistic, y + x + parameter + 2 * statistic + x + 2 * parameter)


def add_layer_norm_bytes(rows: int, D: int, x_size: int, residual_size: int, parameter_size: int, out_size: int) -> Passes:
    """Count layer_norm of the sum, which has the size of the residual.

    Forward also reads both terms in place of the sum, and writes it. Backward also reads the sum's
    own gradient, and writes dx if its size is not the residual's.
    """
    x, residual = rows * D * x_size, rows * D * residual_size
    forward, backward = layer_norm_bytes(rows, D, residual_size, parameter_size, out_size)
    return Passes(forward + x + residual, backward + residual + (x if x_size != residual_size else 0))


def bias_gelu_bytes(rows: int, D: int, x_size: int, bias_size: int) -> Passes:
    """Forward: x and bias in, y out. Backward: dy, x and bias in, dx and dbias out."""
    x, bias = rows * D * x_size, D * bias_size
    return Passes(x + bias + x, x + x + bias + x + bias)


def attention_bytes(N: int, T: int, D: int, size: int) -> Passes:
    """Forward: q, k, v in, y out. Backward: these, y and dy in, three gradients out."""
    return Passes(4 * N * T * D * size, 8 * N * T * D * size)


def attention_flops(N: int, T: int, D: int) -> Passes:
    """Forward: two products. Backward: five, as it computes the scores again."""
    return Passes(2 * 2 * N * T * T * D, 5 * 2 * N * T * T * D)


def block_flops(T: int, D: int) -> int:
    """Count the forward GEMMs of a block on T tokens: qkv, proj, fc1, fc2, two of attention."""
    return 2 * T * D * D * (4 + 2 * MLP_RATIO) + 4 * T * T * D


def mae_step_flops(N: int, L: int, K: int, P: int, D: int, depth: int, decoder_D: int, decoder_depth: int) -> int:
    """Count 3 x forward, with all patches embedded as in the reference, whatever is skipped."""
    encoder = 2 * L * P * D + depth * block_flops(1 + K, D)
    bridge = 2 * (1 + K) * D * decoder_D
    decoder = decoder_depth * block_flops(1 + L, decoder_D) + 2 * (1 + L) * decoder_D * P
    return 3 * N * (encoder + bridge + decoder)
