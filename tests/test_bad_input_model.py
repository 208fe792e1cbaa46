"""Bad input to MAE: the error names the argument and what it should be, and nothing has changed."""

import math
from collections.abc import Callable

import pytest
import torch
from checkpoints import assert_same_weights, copy_of
from support import images_for, noise_for, small_mae, small_reference
from torch import Tensor

import maefast
from maefast import MAE

U8 = torch.uint8
ModelCase = tuple[Callable[[MAE, Tensor], object], str]  # the model and images that fit it
R24 = torch.rand(2, 24)


def mask_of(*removed: int) -> Tensor:
    """(N, 24), row n removes the first `removed[n]` patches."""
    return torch.stack([(torch.arange(24) < count).float() for count in removed])


MODEL_TYPE_ERRORS: dict[str, ModelCase] = {
    "integers": (lambda m, x: m(x.long()), "imgs must be floating-point or uint8.*int64"),
    "int8": (lambda m, x: m(x.to(torch.int8)), "imgs must be floating-point or uint8.*int8"),
    "noise_dtype": (lambda m, x: m(x, noise=R24.double()), "noise must be float32.*float64"),
    "mask_dtype": (lambda m, x: m(x, mask=mask_of(9, 9).int()), "mask must be bool or floating-point.*int32"),
    "encode_integers": (lambda m, x: m.encode(x.long()), "imgs must be floating-point or uint8.*int64"),
}

MODEL_VALUE_ERRORS: dict[str, ModelCase] = {
    "other_size": (lambda m, x: m(x[..., :32]), r"imgs must be \(N, 3, 64, 48\).*\(2, 3, 64, 32\)"),
    "no_multiple": (lambda m, x: m(x[..., 1:]), r"imgs must be \(N, 3, 64, 48\).*\(2, 3, 64, 47\)"),
    "other_channels": (lambda m, x: m(x[:, :1]), r"imgs must be \(N, 3, 64, 48\).*\(2, 1, 64, 48\)"),
    "no_batch_dimension": (lambda m, x: m(x[0]), r"imgs must be \(N, 3, 64, 48\).*\(3, 64, 48\)"),
    "empty_batch": (lambda m, x: m(x[:0]), "imgs must hold at least one image.*empty"),
    "ratio_negative": (lambda m, x: m(x, -0.1), r"mask_ratio must be in \[0, 1\).*-0\.1"),
    "ratio_one": (lambda m, x: m(x, 1.0), r"mask_ratio must be in \[0, 1\).*1\.0"),
    "ratio_nan": (lambda m, x: m(x, math.nan), r"mask_ratio must be in \[0, 1\).*nan"),
    "ratio_zero": (lambda m, x: m(x, 0.0), "mask_ratio must keep.*remove at least one.*keeps 24"),
    "ratio_keeps_none": (lambda m, x: m(x, 0.97), "mask_ratio must keep at least one of the 24 patches.*0.97 keeps 0"),
    "noise_shape": (lambda m, x: m(x, noise=R24[:, 1:]), r"noise must be \(N, L\) = \(2, 24\).*\(2, 23\)"),
    "noise_batch": (lambda m, x: m(x, noise=R24[:1]), r"noise must be \(N, L\) = \(2, 24\).*\(1, 24\)"),
    "noise_device": (lambda m, x: m(x, noise=R24.to("meta")), "noise must be on the device of imgs, cpu.*meta"),
    "noise_gradient": (lambda m, x: m(x, noise=R24.clone().requires_grad_()), "noise has no gradient"),
    "noise_and_mask": (lambda m, x: m(x, noise=R24, mask=mask_of(9, 9)), "noise and mask"),
    "mask_shape": (lambda m, x: m(x, mask=mask_of(9, 9)[:, :23]), r"mask must be \(N, L\) = \(2, 24\).*\(2, 23\)"),
    "mask_device": (lambda m, x: m(x, mask=mask_of(9, 9).to("meta")), "mask must be on the device of imgs, cpu.*meta"),
    "mask_uneven": (lambda m, x: m(x, mask=mask_of(9, 10)), "mask must remove as many.*9 to 10"),
    "mask_uneven_bool": (lambda m, x: m(x, mask=mask_of(12, 10).bool()), "mask must remove as many.*10 to 12"),
    "mask_weights": (lambda m, x: m(x, mask=mask_of(9, 9) * 0.5), "mask must hold only 0.*and 1"),
    "mask_nan": (lambda m, x: m(x, mask=mask_of(9, 9) * math.nan), "mask must hold only 0.*and 1"),
    "mask_of_zeros": (lambda m, x: m(x, mask=mask_of(0, 0)), "mask must keep.*remove at least one.*removes 0"),
    "mask_of_ones": (lambda m, x: m(x, mask=mask_of(24, 24)), "mask must keep at least one.*removes 24"),
    "reconstruct": (lambda m, x: m.reconstruct(x[:, :2]), r"imgs must be \(N, 3, 64, 48\)"),
    "encode": (lambda m, x: m.encode(x[..., :32]), r"imgs must be \(N, 3, 64, 48\)"),
    "patchify": (lambda m, x: m.patchify(x[..., :32]), r"imgs must be \(N, 3, 64, 48\)"),
    "unpatchify": (lambda m, x: m.unpatchify(torch.ones(2, 24, 5)), r"x must be \(N, 24, 384\).*\(2, 24, 5\)"),
    "forward_encoder": (lambda m, x: m.forward_encoder(x[..., :32], 0.75), r"imgs must be \(N, 3, 64, 48\)"),
    "forward_encoder_ratio": (lambda m, x: m.forward_encoder(x, -0.1), r"mask_ratio must be in \[0, 1\).*-0\.1"),
    "forward_decoder": (lambda m, x: m.forward_decoder(torch.ones(2, 26, 32), torch.arange(24).expand(2, -1)), "x must be"),
    "loss": (lambda m, x: m.forward_loss(x, torch.ones(2, 24, 5), mask_of(9, 9)), r"pred must be \(2, M, 384\).*\(2, 24, 5\)"),
}


@pytest.mark.parametrize("case", MODEL_TYPE_ERRORS | MODEL_VALUE_ERRORS)
def test_model(case):
    """The call raises, and weights, gradients and the random generator are as they were."""
    call, message = (MODEL_TYPE_ERRORS | MODEL_VALUE_ERRORS)[case]
    model = small_mae()
    imgs, before, generator = images_for(model), copy_of(model), torch.get_rng_state()
    with pytest.raises(TypeError if case in MODEL_TYPE_ERRORS else ValueError, match=message):
        call(model, imgs)
    assert_same_weights(model, before)
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), generator)


CONSTRUCTOR_CASES: dict[str, tuple[dict[str, object], str]] = {
    "no_multiple": ({"img_size": 50}, "img_size must be a multiple of patch_size.*50 x 50.*8 x 16"),
    "img_size_zero": ({"img_size": 0}, "img_size must be positive.*0"),
    "patch_size_negative": ({"patch_size": (8, -16)}, r"patch_size must be positive.*\(8, -16\)"),
    "heads": ({"num_heads": 5}, "width must be a multiple of num_heads.*32.*5"),
    "decoder_heads": ({"decoder_num_heads": 5}, "width must be a multiple of num_heads.*24.*5"),
    "positions": ({"embed_dim": 30, "num_heads": 3}, "divisible by 4.*30"),
    "mean_alone": ({"mean": [0.5] * 3}, "mean and std must be given together"),
    "mean_length": ({"mean": [0.5] * 2, "std": [0.5] * 3}, "mean must have one value for each of the 3 channels.*2"),
    "std_length": ({"mean": [0.5] * 3, "std": [0.5]}, "std must have one value for each of the 3 channels.*1"),
    "std_zero": ({"mean": [0.5] * 3, "std": [0.5, 0.0, 0.5]}, "std must be positive.*0.0"),
}


@pytest.mark.parametrize(("options", "message"), CONSTRUCTOR_CASES.values(), ids=CONSTRUCTOR_CASES)
def test_constructor(options, message):
    with pytest.raises(ValueError, match=message):
        small_mae(**options)


@pytest.mark.parametrize("call", [MAE.__call__, MAE.encode, MAE.reconstruct], ids=["forward", "encode", "reconstruct"])
def test_uint8_images_need_statistics(call):
    model = small_mae(in_chans=4)
    with pytest.raises(ValueError, match="mean and std must be given to MAE for uint8 images of 4 channels"):
        call(model, images_for(model, dtype=U8))


def test_a_failed_forward_leaves_the_next_one_as_it_was():
    model, reference = small_mae(), small_reference()
    imgs, noise = images_for(model), noise_for(model)
    with pytest.raises(ValueError, match="mask_ratio"):
        model(imgs, 2.0)
    with maefast.backend("eager"):
        assert torch.equal(model(imgs, noise=noise).mask, reference(imgs, noise=noise).mask)
