"""Bad input: the error names the argument, what it was and what it should be."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from maefast import ops

I64, U8 = torch.int64, torch.uint8
Case = tuple[Callable[[], object], str]  # the call, and a pattern of the message


def grads(t: Tensor) -> Tensor:
    return t.detach().clone().requires_grad_()


IMGS, IDS, NOISE = torch.rand(2, 3, 8, 12), torch.zeros(2, 3, dtype=I64), torch.rand(2, 6)
BYTES, MEAN, STD = IMGS.to(U8), torch.rand(3), torch.rand(3) + 0.1
X, RESTORE, TOKEN, POS = torch.rand(2, 3, 4), torch.arange(6).expand(2, 6), torch.rand(1, 1, 4), torch.rand(1, 7, 4)
PRED, MASK = torch.rand(2, 6, 48), torch.tensor([[1.0, 1, 0, 1, 1, 0]] * 2)
UNEVEN = torch.tensor([[1.0, 1, 1, 1, 0, 0], [1, 0, 1, 0, 0, 0]])
W4, Y24 = torch.rand(4), torch.rand(2, 3, 4)
QKV, KV, Q = torch.rand(2, 5, 24), torch.rand(2, 5, 16), torch.rand(2, 3, 8)  # two heads, 4 wide
WEIGHT, BIAS = torch.rand(5, 4), torch.rand(5)  # for X
META = torch.device("meta")
SEVEN, TWICE = [0, 1, 2, 3, 4, 5, 5], torch.tensor([0, 1, 2, 2, 4, 5]).expand(2, 6)

TYPE_ERRORS: dict[str, Case] = {
    "noise_in_float64": (lambda: ops.random_masking(NOISE.double(), 1), "noise must be float32.*float64"),
    "gather_integers": (lambda: ops.gather_patches(IMGS.int(), IDS, 4), "imgs must be floating-point or uint8.*int32"),
    "gather_bools": (lambda: ops.gather_patches(IMGS > 0, IDS, 4), "imgs must be floating-point or uint8.*bool"),
    "gather_ids_int32": (lambda: ops.gather_patches(IMGS, IDS.int(), 4), "ids must be int64.*int32"),
    "gather_std_in_float64": (lambda: ops.gather_patches(BYTES, IDS, 4, MEAN, STD.double()), "std must be float32.*float64"),
    "gather_to_integers": (lambda: ops.gather_patches(IMGS, IDS, 4, dtype=I64), "dtype must be floating-point.*int64"),
    "unshuffle_integers": (lambda: ops.unshuffle(X.int(), RESTORE, TOKEN, POS), "x must be floating-point.*int32"),
    "unshuffle_float_ids": (lambda: ops.unshuffle(X, RESTORE.float(), TOKEN, POS), "ids_restore must be int64.*float32"),
    "mse_integers": (lambda: ops.masked_mse(PRED.int(), IMGS, MASK, 4, True), "pred must be floating-point.*int32"),
    "mse_bool_mask": (lambda: ops.masked_mse(PRED, IMGS, MASK.bool(), 4, True), "mask must be float32.*bool"),
    "norm_integers": (lambda: ops.layer_norm(X.int(), W4, W4), "x must be floating-point.*int32"),
    "norm_integer_weight": (lambda: ops.layer_norm(X, W4.int(), W4), "weight must be floating-point.*int32"),
    "norm_to_integers": (lambda: ops.layer_norm(X, W4, W4, dtype=I64), "dtype must be floating-point.*int64"),
    "add_norm_integer_residual": (lambda: ops.add_layer_norm(X, X.int(), W4, W4), "residual must be floating-point.*int32"),
    "add_norm_bool_bias": (lambda: ops.add_layer_norm(X, X, W4, W4 > 0), "bias must be floating-point.*bool"),
    "add_norm_to_integers": (lambda: ops.add_layer_norm(X, X, W4, W4, dtype=U8), "dtype must be floating-point.*uint8"),
    "gelu_integers": (lambda: ops.bias_gelu(X.int()), "x must be floating-point.*int32"),
    "gelu_integer_bias": (lambda: ops.bias_gelu(X, W4.int()), "bias must be floating-point.*int32"),
    "mse_integer_images": (lambda: ops.masked_mse(PRED, IMGS.to(I64), MASK, 4, True), "imgs must be.*int64"),
    "attention_integers": (lambda: ops.attention(QKV.int(), 2), "qkv must be floating-point.*int32"),
    "attention_integer_q": (lambda: ops.attention(KV, 2, Q.long()), "q must be floating-point.*int64"),
    "attention_q_of_other_dtype": (lambda: ops.attention(KV, 2, Q.half()), "q must have the dtype of qkv.*float32.*float16"),
    "linear_integers": (lambda: ops.linear(X.int(), WEIGHT), "x must be floating-point.*int32"),
    "linear_integer_weight": (lambda: ops.linear(X, WEIGHT.long()), "weight must be floating-point.*int64"),
    "linear_bool_bias": (lambda: ops.linear(X, WEIGHT, BIAS > 0), "bias must be floating-point.*bool"),
    "linear_weight_of_other_dtype": (lambda: ops.linear(X, WEIGHT.bfloat16()), "weight must be float32.*bfloat16"),
    "linear_bias_of_other_dtype": (lambda: ops.linear(X, WEIGHT, BIAS.double()), "bias must be float32.*float64"),
}

VALUE_ERRORS: dict[str, Case] = {
    "noise_of_one_dimension": (lambda: ops.random_masking(NOISE[0], 1), r"noise must be \(N, L\).*\(6,\)"),
    "noise_with_gradient": (lambda: ops.random_masking(grads(NOISE), 1), "noise has no gradient.*detach"),
    "len_keep_negative": (lambda: ops.random_masking(NOISE, -1), r"len_keep must be in \[0, 6\].*-1"),
    "len_keep_too_large": (lambda: ops.random_masking(NOISE, 7), r"len_keep must be in \[0, 6\].*7"),
    "masking_noise_negative": (lambda: ops.masking_noise(-1, 5, "cpu"), "N and L must not be negative.*-1 and 5"),
    "gather_three_dimensions": (lambda: ops.gather_patches(IMGS[0], IDS, 4), r"imgs must be \(N, C, H, W\).*\(3, 8, 12\)"),
    "gather_no_multiple": (lambda: ops.gather_patches(IMGS, IDS, 5), "imgs must have.*multiples of the patch, 5 x 5.*8 x 12"),
    "gather_patch_of_zero": (lambda: ops.gather_patches(IMGS, IDS, 0), "patch_size must be positive.*0"),
    "gather_ids_of_other_batch": (lambda: ops.gather_patches(IMGS, IDS[:1], 4), r"ids must be \(N, K\) with N = 2.*\(1, 3\)"),
    "gather_ids_on_meta": (lambda: ops.gather_patches(IMGS, IDS.to(META), 4), "ids must be on the device of imgs, cpu.*meta"),
    "gather_mean_alone": (lambda: ops.gather_patches(BYTES, IDS, 4, MEAN), "mean and std must be given together"),
    "gather_float_images": (lambda: ops.gather_patches(IMGS, IDS, 4, MEAN, STD), "mean and std normalise uint8 images.*float32"),
    "gather_mean_too_short": (lambda: ops.gather_patches(BYTES, IDS, 4, MEAN[:2], STD), r"mean must be \(C,\) = \(3,\).*\(2,\)"),
    "gather_std_with_gradient": (lambda: ops.gather_patches(BYTES, IDS, 4, MEAN, grads(STD)), "std has no gradient"),
    "unshuffle_flat_ids": (lambda: ops.unshuffle(X, RESTORE[0], TOKEN, POS), r"ids_restore must be \(N, L\).*\(6,\)"),
    "unshuffle_batch": (lambda: ops.unshuffle(X[:1], RESTORE, TOKEN, POS), r"x must be \(N, 1\+K, D\) with N = 2.*\(1, 3, 4\)"),
    "unshuffle_no_class_token": (lambda: ops.unshuffle(X[:, :0], RESTORE, TOKEN, POS), r"x must be.*\(2, 0, 4\)"),
    "unshuffle_too_many_tokens": (lambda: ops.unshuffle(torch.rand(2, 8, 4), RESTORE, TOKEN, POS), r"K <= L = 6.*\(2, 8, 4\)"),
    "unshuffle_mask_token": (lambda: ops.unshuffle(X, RESTORE, TOKEN[0], POS), r"mask_token must be \(1, 1, 4\).*\(1, 4\)"),
    "unshuffle_pos_embed": (lambda: ops.unshuffle(X, RESTORE, TOKEN, POS[:, 1:]), r"pos_embed must be \(1, 7, 4\).*\(1, 6, 4\)"),
    "token_on_meta": (lambda: ops.unshuffle(X, RESTORE, TOKEN.to(META), POS), "mask_token must be on the device of x, cpu.*meta"),
    "norm_scalar": (lambda: ops.layer_norm(X[0, 0, 0], W4, W4), r"x must be \(\.\.\., D\) with D >= 1.*\(\)"),
    "norm_empty_rows": (lambda: ops.layer_norm(X[..., :0], W4[:0], W4[:0]), r"x must be \(\.\.\., D\).*\(2, 3, 0\)"),
    "norm_weight": (lambda: ops.layer_norm(X, W4[1:], W4), r"weight must be \(D,\) = \(4,\).*\(3,\)"),
    "norm_bias": (lambda: ops.layer_norm(X, W4, W4[None]), r"bias must be \(D,\) = \(4,\).*\(1, 4\)"),
    "norm_on_meta": (lambda: ops.layer_norm(X, W4, W4.to(META)), "bias must be on the device of x, cpu.*meta"),
    "add_norm_scalar": (lambda: ops.add_layer_norm(X[0, 0, 0], X[0, 0, 0], W4, W4), r"x must be \(\.\.\., D\)"),
    "add_shape": (lambda: ops.add_layer_norm(X, X[:1], W4, W4), r"residual must have the shape of x, \(2, 3, 4\).*\(1, 3, 4\)"),
    "add_norm_weight": (lambda: ops.add_layer_norm(X, X, X, W4), r"weight must be \(D,\) = \(4,\).*\(2, 3, 4\)"),
    "add_norm_on_meta": (lambda: ops.add_layer_norm(X, X.to(META), W4, W4), "residual must be on the device of x, cpu.*meta"),
    "gelu_scalar": (lambda: ops.bias_gelu(X[0, 0, 0]), r"x must be \(\.\.\., D\).*\(\)"),
    "gelu_bias": (lambda: ops.bias_gelu(X, W4[:1]), r"bias must be \(D,\) = \(4,\).*\(1,\)"),
    "gelu_on_meta": (lambda: ops.bias_gelu(X, W4.to(META)), "bias must be on the device of x, cpu.*meta"),
    "mse_mask_with_gradient": (lambda: ops.masked_mse(PRED, IMGS, grads(MASK), 4, True), "mask has no gradient"),
    "mse_mask_shape": (lambda: ops.masked_mse(PRED, IMGS, MASK[:, 1:], 4, True), r"mask must be \(N, L\) = \(2, 6\).*\(2, 5\)"),
    "mse_pred_rows": (lambda: ops.masked_mse(PRED[:, SEVEN], IMGS, MASK, 4, True), r"pred must be \(2, M, 48\).*\(2, 7, 48\)"),
    "mse_pred_no_rows": (lambda: ops.masked_mse(PRED[:, :0], IMGS, MASK, 4, True), r"pred must be.*\(2, 0, 48\)"),
    "mse_pred_values": (lambda: ops.masked_mse(PRED[..., 1:], IMGS, MASK, 4, True), r"pred must be \(2, M, 48\).*\(2, 6, 47\)"),
    "mse_pred_batch": (lambda: ops.masked_mse(PRED[:1], IMGS, MASK, 4, True), r"pred must be \(2, M, 48\).*\(1, 6, 48\)"),
    "mse_no_channels": (lambda: ops.masked_mse(PRED[..., :0], IMGS[:, :0], MASK, 4, False), r"imgs must have.*\(2, 0, 8, 12\)"),
    "mse_no_multiple": (lambda: ops.masked_mse(PRED, IMGS[..., 1:], MASK, 4, True), "imgs must have.*8 x 11"),
    "mse_one_value": (lambda: ops.masked_mse(PRED[:1, :, :1], IMGS[:1, :1, :2, :3], MASK[:1], 1, True), "norm_pix.*at least two"),
    "mse_on_meta": (lambda: ops.masked_mse(PRED, IMGS, MASK.to(META), 4, True), "mask must be on the device of pred, cpu.*meta"),
    "attention_width": (lambda: ops.attention(QKV[..., 1:], 2), r"qkv must be \(N, T, 3 h d\) with h = 2.*\(2, 5, 23\)"),
    "attention_heads": (lambda: ops.attention(QKV, 5), r"qkv must be \(N, T, 3 h d\) with h = 5.*\(2, 5, 24\)"),
    "attention_no_width": (lambda: ops.attention(QKV[..., :0], 2), r"qkv must be.*\(2, 5, 0\)"),
    "attention_two_dimensions": (lambda: ops.attention(QKV[0], 2), r"qkv must be \(N, T, 3 h d\).*\(5, 24\)"),
    "attention_no_heads": (lambda: ops.attention(QKV, 0), "num_heads must be positive.*0"),
    "attention_negative_heads": (lambda: ops.attention(QKV, -2), "num_heads must be positive.*-2"),
    "attention_kv": (lambda: ops.attention(QKV[..., 1:], 2, Q), r"qkv must be \(N, T, 2 h d\) beside q with h = 2.*\(2, 5, 23\)"),
    "attention_q_width": (lambda: ops.attention(KV, 2, Q[..., 1:]), r"q must be.*N = 2 and h d = 8.*\(2, 3, 7\)"),
    "attention_q_batch": (lambda: ops.attention(KV, 2, Q[:1]), r"q must be \(N, M, h d\) with N = 2.*\(1, 3, 8\)"),
    "attention_q_flat": (lambda: ops.attention(KV, 2, Q[0]), r"q must be \(N, M, h d\).*\(3, 8\)"),
    "attention_no_keys": (lambda: ops.attention(KV[:, :0], 2, Q), r"qkv must hold at least one token.*\(2, 0, 16\)"),
    "attention_q_on_meta": (lambda: ops.attention(KV, 2, Q.to(META)), "q must be on the device of qkv, cpu.*meta"),
    "linear_width": (lambda: ops.linear(X[..., 1:], WEIGHT), r"x must be \(..., in\).*\(5, 4\).*\(2, 3, 3\)"),
    "linear_scalar": (lambda: ops.linear(X[0, 0, 0], WEIGHT), r"x must be \(..., in\).*\(\)"),
    "linear_flat_weight": (lambda: ops.linear(X, WEIGHT[0]), r"x must be \(..., in\) for a weight \(out, in\) of \(4,\)"),
    "linear_bias": (lambda: ops.linear(X, WEIGHT, BIAS[1:]), r"bias must be \(out,\) = \(5,\).*\(4,\)"),
    "linear_bias_of_two_dimensions": (lambda: ops.linear(X, WEIGHT, BIAS[None]), r"bias must be \(out,\).*\(1, 5\)"),
    "linear_on_meta": (lambda: ops.linear(X, WEIGHT.to(META)), "weight must be on the device of x, cpu.*meta"),
}

# What only the values tell; checked by both backends on the CPU.
VALUE_CASES: dict[str, Case] = {
    "id_too_large": (lambda: ops.gather_patches(IMGS, IDS + torch.tensor([0, 6, 0]), 4), r"ids must be in \[0, 6\).*6"),
    "id_negative": (lambda: ops.gather_patches(IMGS, IDS - torch.tensor([0, 0, 1]), 4), r"ids must be in \[0, 6\).*-1"),
    "id_huge": (lambda: ops.gather_patches(IMGS, IDS + 2**62, 4), r"ids must be in \[0, 6\).*4611686018427387904"),
    "id_int_min": (lambda: ops.gather_patches(IMGS, IDS - 2**63, 4), r"ids must be in \[0, 6\).*-9223372036854775808"),
    "rank_twice": (lambda: ops.unshuffle(X, TWICE, TOKEN, POS), "ids_restore must hold a permutation"),
    "rank_too_large": (lambda: ops.unshuffle(X, RESTORE + RESTORE // 5, TOKEN, POS), "ids_restore must"),
    "rank_negative": (lambda: ops.unshuffle(X, RESTORE - 1, TOKEN, POS), "ids_restore must"),
    "mask_of_zeros": (lambda: ops.masked_mse(PRED, IMGS, MASK * 0, 4, True), "mask is all zeros"),
    "mask_and_rows": (lambda: ops.masked_mse(PRED[:, :3], IMGS, MASK, 4, True), "pred has 3 rows.*mask.*removes.*4"),
    "mask_uneven": (lambda: ops.masked_mse(PRED[:, :4], IMGS, UNEVEN, 4, True), "pred has 4 rows.*mask.*2"),
}


@pytest.mark.parametrize(("call", "message"), TYPE_ERRORS.values(), ids=TYPE_ERRORS)
def test_dtypes(call, message):
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize(("call", "message"), VALUE_ERRORS.values(), ids=VALUE_ERRORS)
def test_shapes_and_devices(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(("call", "message"), VALUE_CASES.values(), ids=VALUE_CASES)
def test_values(each_backend, call, message):
    with pytest.raises(ValueError, match=message):
        call()


def raw(name: str, *args: object) -> Callable[[], object]:
    return lambda: getattr(torch.ops.maefast, name)(*args)


STATISTICS, NONES = (torch.rand(6), torch.rand(6)), (None, None)
GATHER, MSE = (4, 4, None, None, torch.float32), (4, 4, True, None, None)
RAW_CASES: dict[str, Case] = {
    "noise_shape": (raw("random_masking_fwd", NOISE[0], 1), "noise must be"),
    "noise_dtype": (raw("random_masking_fwd", NOISE.double(), 1), "noise must be"),
    "len_keep_negative": (raw("random_masking_fwd", NOISE, -1), "len_keep must be"),
    "len_keep_too_large": (raw("random_masking_fwd", NOISE, 7), "len_keep must be"),
    "gather_imgs_shape": (raw("gather_patches_fwd", IMGS[0], IDS, *GATHER), "imgs must be"),
    "gather_imgs_dtype": (raw("gather_patches_fwd", IMGS.double(), IDS, *GATHER), "float32"),
    "gather_out_dtype": (raw("gather_patches_fwd", IMGS, IDS, *GATHER[:4], torch.float64), "dtype"),
    "gather_out_uint8": (raw("gather_patches_fwd", IMGS, IDS, *GATHER[:4], U8), "dtype"),
    "gather_patch_zero": (raw("gather_patches_fwd", IMGS, IDS, 0, *GATHER[1:]), "patch"),
    "gather_patch_negative": (raw("gather_patches_fwd", IMGS, IDS, -4, *GATHER[1:]), "patch"),
    "gather_patch_no_multiple": (raw("gather_patches_fwd", IMGS, IDS, 4, 5, *GATHER[2:]), "multiple of the patch"),
    "gather_ids_shape": (raw("gather_patches_fwd", IMGS, IDS[0], *GATHER), "ids must be"),
    "gather_ids_batch": (raw("gather_patches_fwd", IMGS, IDS[:1], *GATHER), "ids must be"),
    "gather_ids_dtype": (raw("gather_patches_fwd", IMGS, IDS.int(), *GATHER), "ids must be"),
    "gather_ids_range": (raw("gather_patches_fwd", IMGS, IDS + 6, *GATHER), r"ids must be in \[0, 6\)"),
    "gather_mean_short": (raw("gather_patches_fwd", BYTES, IDS, 4, 4, MEAN[:1], STD, torch.float32), "mean must be"),
    "gather_mean_dtype": (raw("gather_patches_fwd", BYTES, IDS, 4, 4, MEAN.double(), STD, torch.float32), "mean must be"),
    "gather_mean_alone": (raw("gather_patches_fwd", BYTES, IDS, 4, 4, MEAN, None, torch.float32), "mean and std"),
    "unshuffle_x_shape": (raw("unshuffle_fwd", X[0], RESTORE, TOKEN, POS), "x must be"),
    "unshuffle_x_dtype": (raw("unshuffle_fwd", X.double(), RESTORE, TOKEN, POS), "float32"),
    "unshuffle_x_uint8": (raw("unshuffle_fwd", X.to(U8), RESTORE, TOKEN, POS), "x must be"),
    "unshuffle_x_batch": (raw("unshuffle_fwd", X[:1], RESTORE, TOKEN, POS), "x must be"),
    "unshuffle_x_empty": (raw("unshuffle_fwd", X[:, :0], RESTORE, TOKEN, POS), "x must be"),
    "unshuffle_x_long": (raw("unshuffle_fwd", torch.rand(2, 8, 4), RESTORE, TOKEN, POS), "x must be"),
    "unshuffle_token": (raw("unshuffle_fwd", X, RESTORE, TOKEN[..., :3], POS), "mask_token must be"),
    "unshuffle_pos": (raw("unshuffle_fwd", X, RESTORE, TOKEN, POS[:, :3]), "pos_embed"),
    "unshuffle_pos_dtype": (raw("unshuffle_fwd", X, RESTORE, TOKEN, POS.double()), "pos_embed must be.*float16"),
    "unshuffle_token_dtype": (raw("unshuffle_fwd", X, RESTORE, TOKEN.to(U8), POS), "mask_token must be.*float16"),
    "unshuffle_ids_shape": (raw("unshuffle_fwd", X, RESTORE[0], TOKEN, POS), "ids_restore must be"),
    "unshuffle_ids_range": (raw("unshuffle_fwd", X, RESTORE + 1, TOKEN, POS), "ids_restore must be"),
    "unshuffle_ids_twice": (raw("unshuffle_fwd", X, RESTORE // 2, TOKEN, POS), "permutation"),
    "unshuffle_dy_shape": (raw("unshuffle_bwd", POS[0], RESTORE, 2, torch.float32), "dy must be"),
    "unshuffle_dy_tokens": (raw("unshuffle_bwd", torch.rand(2, 6, 4), RESTORE, 2, torch.float32), "dy must be"),
    "unshuffle_dy_uint8": (raw("unshuffle_bwd", torch.zeros(2, 7, 4, dtype=U8), RESTORE, 2, torch.float32), "dy must be"),
    "unshuffle_dy_ids": (raw("unshuffle_bwd", torch.rand(2, 7, 4), RESTORE * 7, 2, torch.float32), "ids_restore must be"),
    "unshuffle_dy_len_keep": (raw("unshuffle_bwd", torch.rand(2, 7, 4), RESTORE, 7, torch.float32), "len_keep must be"),
    "unshuffle_dx_dtype": (raw("unshuffle_bwd", torch.rand(2, 7, 4), RESTORE, 2, torch.float64), "dtype"),
    "unshuffle_dx_uint8": (raw("unshuffle_bwd", torch.rand(2, 7, 4), RESTORE, 2, U8), "dtype"),
    "mse_pred_shape": (raw("masked_mse_fwd", PRED[0], IMGS, MASK, *MSE), "pred must be"),
    "mse_pred_dtype": (raw("masked_mse_fwd", PRED.double(), IMGS, MASK, *MSE), "float32"),
    "mse_pred_uint8": (raw("masked_mse_fwd", PRED.to(U8), IMGS, MASK, *MSE), "pred must be"),
    "mse_pred_values": (raw("masked_mse_fwd", PRED[..., :9], IMGS, MASK, *MSE), "pred must be"),
    "mse_no_channels": (raw("masked_mse_fwd", PRED[..., :0], IMGS[:, :0], MASK, *MSE), "patches must have a value"),
    "mse_pred_rows": (raw("masked_mse_fwd", PRED[:, :3], IMGS, MASK, *MSE), "pred has 3 rows"),
    "mse_mask_shape": (raw("masked_mse_fwd", PRED, IMGS, MASK[:, :5], *MSE), "mask must be"),
    "mse_mask_dtype": (raw("masked_mse_fwd", PRED, IMGS, MASK.double(), *MSE), "mask must be"),
    "mse_mask_empty": (raw("masked_mse_fwd", PRED, IMGS, MASK * 0, *MSE), "mask is all zeros"),
    "mse_patch_zero": (raw("masked_mse_fwd", PRED, IMGS, MASK, 0, 0, True, None, None), "patch"),
    "mse_dloss_shape": (raw("masked_mse_bwd", torch.rand(2), PRED, IMGS, MASK, *MSE), "dloss must be"),
    "mse_dloss_dtype": (raw("masked_mse_bwd", torch.rand(()).double(), PRED, IMGS, MASK, *MSE), "dloss must be"),
    "norm_x_scalar": (raw("layer_norm_fwd", X[0, 0, 0], W4, W4, 1e-6, torch.float32), "x must be"),
    "norm_x_empty_rows": (raw("layer_norm_fwd", X[..., :0], W4[:0], W4[:0], 1e-6, torch.float32), "x must be"),
    "norm_x_dtype": (raw("layer_norm_fwd", X.double(), W4, W4, 1e-6, torch.float32), "x must be float32"),
    "norm_y_dtype": (raw("layer_norm_fwd", X, W4, W4, 1e-6, torch.float64), "dtype must be float32"),
    "norm_weight": (raw("layer_norm_fwd", X, W4[1:], W4, 1e-6, torch.float32), "weight must have 4 values"),
    "norm_bias_dtype": (raw("layer_norm_fwd", X, W4, W4.double(), 1e-6, torch.float32), "bias must be float32"),
    "norm_dy_shape": (raw("layer_norm_bwd", Y24[0], None, X, W4, W4, *STATISTICS, *NONES), "dy must have the shape of x"),
    "norm_dy_dtype": (raw("layer_norm_bwd", Y24.double(), None, X, W4, W4, *STATISTICS, *NONES), "dy must be float32"),
    "norm_dresidual_shape": (raw("layer_norm_bwd", Y24, X[:1], X, W4, W4, *STATISTICS, *NONES), "dresidual must have"),
    "norm_dresidual_dtype": (raw("layer_norm_bwd", Y24, X.to(U8), X, W4, W4, *STATISTICS, *NONES), "dresidual must be float32"),
    "norm_bwd_weight": (raw("layer_norm_bwd", Y24, None, X, W4[1:], W4, *STATISTICS, *NONES), "weight must have 4"),
    "norm_bwd_center": (raw("layer_norm_bwd", Y24, None, X, W4, W4, W4, W4, *NONES), "center must have 6 values"),
    "norm_bwd_y_dtype": (raw("layer_norm_bwd", Y24, None, X, W4, W4, *STATISTICS, U8, None), "y_dtype must be"),
    "norm_bwd_cast_dtype": (raw("layer_norm_bwd", Y24, None, X, W4, W4, *STATISTICS, None, torch.float64), "cast_dtype must be"),
    "add_norm_residual_shape": (raw("add_layer_norm_fwd", X, X[:1], W4, W4, 1e-6, torch.float32), "residual must have"),
    "add_norm_residual_dtype": (raw("add_layer_norm_fwd", X, X.double(), W4, W4, 1e-6, torch.float32), "residual must be"),
    "add_norm_y_dtype": (raw("add_layer_norm_fwd", X, X, W4, W4, 1e-6, U8), "dtype must be float32"),
    "gelu_x_dtype": (raw("bias_gelu_fwd", X.double(), None), "x must be float32"),
    "gelu_bias": (raw("bias_gelu_fwd", X, W4[1:]), "bias must have 4 values"),
    "gelu_dy_shape": (raw("bias_gelu_bwd", Y24[:1], X, None, True), "dy must have the shape of x"),
    "gelu_dy_dtype": (raw("bias_gelu_bwd", Y24.double(), X, None, True), "dy must be float32"),
    "gelu_bwd_bias": (raw("bias_gelu_bwd", Y24, X, X, False), "bias must have 4 values"),
    "mse_bwd_pred": (raw("masked_mse_bwd", torch.rand(()), PRED[:, :3], IMGS, MASK, *MSE), "pred has 3 rows"),
    "attention_heads": (raw("attention_fwd", None, QKV, 0), "num_heads must be positive"),
    "attention_tile": (raw("attention_fwd", None, QKV, 2, 1), "tile must be 0 on the CPU"),
    "attention_bwd_tile": (raw("attention_bwd", Q, Q, KV, None, None, 2, False, 1), "tile must be 0 on the CPU"),
    "attention_width": (raw("attention_fwd", None, QKV, 5), "qkv must be"),
    "attention_no_width": (raw("attention_fwd", None, QKV[..., :0], 2), "1 to 128 wide"),
    "attention_wide": (raw("attention_fwd", None, torch.rand(1, 2, 387), 1), "1 to 128 wide, they are 129"),
    "attention_shape": (raw("attention_fwd", None, QKV[0], 2), "qkv must be"),
    "attention_dtype": (raw("attention_fwd", None, QKV.double(), 2), "no maefast kernel|float32"),
    "attention_bytes": (raw("attention_fwd", None, QKV.to(U8), 2), "qkv must be float32"),
    "attention_kv": (raw("attention_fwd", Q, QKV, 2), "q must be"),
    "attention_q_batch": (raw("attention_fwd", Q[:1], KV, 2), "q must be"),
    "attention_q_dtype": (raw("attention_fwd", Q.half(), KV, 2), "q must have the dtype of kv"),
    "attention_no_keys": (raw("attention_fwd", Q, KV[:, :0], 2), "at least one token"),
    "attention_dout_shape": (raw("attention_bwd", Q[:, 1:], Q, KV, None, None, 2), "dout must be"),
    "attention_dout_width": (raw("attention_bwd", Q[..., 1:], Q, KV, None, None, 2), "dout must be"),
    "attention_dout_flat": (raw("attention_bwd", Q[0], Q, KV, None, None, 2), "dout must be"),
    "attention_dout_dtype": (raw("attention_bwd", Q.half(), Q, KV, None, None, 2), "dout must have the dtype"),
    "attention_bwd_heads": (raw("attention_bwd", Q, Q, KV, None, None, -1), "num_heads must be positive"),
    "linear_x_width": (raw("linear_fwd", X[..., 1:], WEIGHT, BIAS, False), "x must be"),
    "linear_x_scalar": (raw("linear_fwd", X[0, 0, 0], WEIGHT, BIAS, False), "x must be"),
    "linear_weight": (raw("linear_fwd", X, WEIGHT[0], BIAS, False), "x must be"),
    "linear_weight_dtype": (raw("linear_fwd", X, WEIGHT.half(), BIAS, False), "dtype of weight"),
    "linear_bias": (raw("linear_fwd", X, WEIGHT, BIAS[1:], False), "bias must be"),
    "linear_bias_shape": (raw("linear_fwd", X, WEIGHT, BIAS[None], False), "bias must be"),
    "linear_bias_dtype": (raw("linear_fwd", X, WEIGHT, BIAS.half(), False), "bias must be"),
}


@pytest.mark.parametrize(("call", "message"), RAW_CASES.values(), ids=RAW_CASES)
def test_native_ops_called_directly(native, call, message):
    with pytest.raises(ValueError, match=message):
        call()


class WithBadGradient(torch.autograd.Function):
    """The identity; its backward calls a native op with ranks that are no permutation."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        return torch.ops.maefast.unshuffle_bwd(dy, RESTORE * 0, 2, dy.dtype)[0]


@pytest.mark.parametrize(
    "run",
    [
        lambda x: torch.ops.maefast.unshuffle_fwd(x, RESTORE * 0, TOKEN, POS),
        lambda x: torch.ops.maefast.unshuffle_fwd.default(x, RESTORE * 0, TOKEN, POS),
        lambda x: ops.unshuffle(x, RESTORE * 0, TOKEN, POS),
        lambda x: ops.unshuffle(grads(x), RESTORE * 0, TOKEN, POS),
        lambda x: WithBadGradient.apply(grads(torch.rand(2, 7, 4))).sum().backward(),
        lambda x: torch.compile(ops.unshuffle, fullgraph=True, backend="aot_eager")(x, RESTORE * 0, TOKEN, POS),
        lambda x: torch.compile(ops.unshuffle, fullgraph=True)(x, RESTORE * 0, TOKEN, POS),
    ],
    ids=["packet", "overload", "public", "autograd", "backward", "aot_eager", "inductor"],
)
def test_what_a_native_op_refuses_is_a_value_error_on_every_way_to_it(native, run):
    """C++ throws std::invalid_argument, which bindings of torch turn into ValueError."""
    with pytest.raises(ValueError, match="ids_restore must hold a permutation in each row, row 0 holds 0 twice"):
        run(X)
