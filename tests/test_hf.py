"""maefast.hf against transformers' ViTMAE: parity, outputs, activation checkpointing, dropout."""

import copy

import pytest
import torch
from checkpoints import assert_same_weights
from hf_models import SMALL, configuration, theirs, transformers
from support import BATCHES, IMAGES, Batch, assert_equal, assert_results
from torch import Tensor, nn

from maefast.blocks import Attention, Mlp
from maefast.hf import ViTMAEForPreTraining, ViTMAEModel
from maefast.hf.capture import DroppingAttention, DroppingMlp

# The widths, image and tokens of ViT-B/16; one block stands for twelve.
BASE = {"norm_pix_loss": True, "num_hidden_layers": 1, "decoder_num_hidden_layers": 1}
OPTIONS = {"norm_pix_loss": True, "mask_ratio": 0.5, "layer_norm_eps": 1e-6, "num_channels": 1}


def both(config) -> tuple[nn.Module, ViTMAEForPreTraining]:
    """Theirs and ours of the same weights, in evaluation mode."""
    model, mine = theirs(config).eval(), ViTMAEForPreTraining(config).eval()
    mine.load_state_dict(model.state_dict())
    return model, mine


def results(model: nn.Module, images: Tensor, noise: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    output = model(images, noise=noise)
    output.loss.backward()
    return {"loss": output.loss.detach(), "logits": output.logits.detach(), "mask": output.mask, "ids": output.ids_restore}


def gradients(model: ViTMAEForPreTraining) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.mae.named_parameters() if p.grad is not None}


def gradients_of_theirs(model: nn.Module) -> dict[str, Tensor]:
    """Return them by our names: they are loaded as the weights of a copy."""
    copy = ViTMAEForPreTraining(model.config).to(next(model.parameters()).dtype)
    frozen = {name for name, p in copy.mae.named_parameters() if not p.requires_grad}
    state = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    copy.load_state_dict(state)
    return {name: p.detach() for name, p in copy.mae.named_parameters() if name not in frozen}


@pytest.mark.parametrize(
    ("batches", "N", "options"),
    [
        pytest.param(BATCHES, IMAGES, SMALL, id="small"),
        pytest.param(BATCHES, IMAGES, SMALL | OPTIONS, id="options"),
        pytest.param(1, 1, BASE, id="ViT-B/16"),
    ],
)
def test_parity(batches, N, options):
    """Loss, prediction and gradients; the yardstick is their model with either attention."""
    config = transformers.ViTMAEConfig(**options)
    model, mine = (m.train() for m in both(config))
    other, exact_model = copy.deepcopy(model), copy.deepcopy(model).double()
    model.set_attn_implementation("sdpa")
    other.set_attn_implementation("eager")
    patches = (config.image_size // config.patch_size) ** 2

    def batch(_: int) -> Batch:
        images, noise = torch.randn(N, config.num_channels, config.image_size, config.image_size), torch.rand(N, patches)
        eager = [results(m, images, noise) | gradients_of_theirs(m) for m in (model, other)]
        exact = results(exact_model, images.double(), noise) | gradients_of_theirs(exact_model)
        return results(mine, images, noise) | gradients(mine), eager, exact

    assert_results(map(batch, range(batches)))


def test_state_dict_has_the_published_names():
    """Alone, and as part of another module; loading wants each of them."""
    source, mine = (ViTMAEForPreTraining(configuration()) for _ in range(2))
    names = source.state_dict()
    assert "vit.encoder.layer.1.attention.attention.query.weight" in names
    assert not any("mae." in name for name in names)
    nest = nn.ModuleDict({"inner": mine})
    nest.load_state_dict({f"inner.{name}": tensor for name, tensor in names.items()})
    assert nest.state_dict().keys() == {f"inner.{name}" for name in names}
    assert_same_weights(mine, names)
    with pytest.raises(RuntimeError, match=r"decoder_norm\.weight"):
        mine.load_state_dict({name: tensor for name, tensor in names.items() if name != "decoder.decoder_norm.weight"})


NAMES = ("loss", "logits", "mask", "ids_restore")


def test_output_as_transformers_has_it():
    config, images, noise = configuration(), torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    model = ViTMAEForPreTraining(config)
    output, expected = model(images, noise=noise), theirs(config)(images, noise=noise)
    assert type(output) is type(expected)
    assert tuple(output.keys()) == tuple(expected.keys()) == NAMES
    assert [output[i] is output[name] is getattr(output, name) for i, name in enumerate(NAMES)] == [True] * 4
    assert "loss" in output
    assert output[:2] == (output.loss, output.logits)
    assert output.to_tuple() == tuple(output[name] for name in NAMES)
    assert output.hidden_states is output.attentions is None
    assert output.logits.shape == (2, 16, 192)
    assert model(pixel_values=images, return_dict=False)[2].shape == (2, 16)
    assert torch.equal(model.unpatchify(model.patchify(images)), images)


def test_noise_of_numpy_ranks_as_in_transformers():
    """float64, whose values float32 would make equal."""
    config = configuration()
    noise = 0.5 + torch.rand(2, 16, dtype=torch.float64) * 1e-9
    assert noise.float().unique().numel() < 3
    images = torch.randn(2, 3, 32, 32)
    mine, expected = ViTMAEForPreTraining(config)(images, noise=noise), theirs(config)(images, noise=noise)
    assert_equal((mine.mask, mine.ids_restore), (expected.mask, expected.ids_restore))


@pytest.mark.parametrize("names", [("hidden_states",), ("attentions",), ("hidden_states", "attentions")])
@pytest.mark.parametrize("place", ["argument", "config"])
def test_hidden_states_and_attentions(names, place):
    wanted = {f"output_{name}": True for name in names}
    config = configuration(attn_implementation="eager", **(wanted if place == "config" else {}))
    (model, mine), images, noise = both(config), torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    arguments = wanted if place == "argument" else {}
    got, expected = mine(images, noise=noise, **arguments), model(images, noise=noise, **arguments)
    encoder = mine.vit(images, noise=noise, **arguments)
    for name, count in (("hidden_states", 3), ("attentions", 2)):
        assert (name in got) == (name in names)
        if name in names:
            assert len(got[name]) == count
            torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-5)
            assert_equal(got[name], encoder[name])
    torch.testing.assert_close(got.loss, expected.loss)


def test_the_encoder():
    """`.vit` shares the parameters; ViTMAEModel stands alone."""
    config, images, noise = configuration(), torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    model, mine = both(config)
    expected = model.vit(images, noise=noise)
    alone = ViTMAEModel(config).eval()
    alone.load_state_dict(model.vit.state_dict())
    for encoder in (mine.vit, alone):
        output = encoder(images, noise=noise)
        assert tuple(output.keys()) == tuple(expected.keys())
        torch.testing.assert_close(output.last_hidden_state, expected.last_hidden_state, rtol=1e-4, atol=1e-5)
        assert_equal((output.ids_restore, output.mask), (expected.ids_restore, expected.mask))
        assert encoder.num_parameters() == sum(p.numel() for p in model.vit.parameters())
    shared = {id(p) for p in mine.mae.parameters()}
    assert all(id(p) in shared for p in mine.vit.parameters())
    published = {name.removeprefix("vit.") for name in mine.state_dict() if name.startswith("vit.")}
    assert mine.vit.state_dict().keys() == alone.state_dict().keys() == published


def test_an_encoder_moves_as_one():
    """To another dtype, from the meta device, by load_state_dict(assign=True); tokens included."""
    config, images = configuration(), torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    source = ViTMAEModel(config).eval()
    expected = source(images, noise=torch.full((2, 16), 0.5)).last_hidden_state
    with torch.device("meta"):
        emptied, assigned = ViTMAEModel(config).eval(), ViTMAEModel(config).eval()
    emptied.to_empty(device="cpu").load_state_dict(source.state_dict())
    assigned.load_state_dict(source.state_dict(), assign=True)
    for model in (emptied, assigned, copy.deepcopy(source)):
        assert torch.equal(model(images, noise=torch.full((2, 16), 0.5)).last_hidden_state, expected)
    assert source.double()(images.double()).last_hidden_state.dtype == source.dtype == torch.float64


def test_what_models_tell():
    config = configuration()
    model, expected = ViTMAEForPreTraining(config), theirs(config)
    assert (model.device, model.dtype) == (expected.device, expected.dtype) == (torch.device("cpu"), torch.float32)
    assert model.num_parameters() == expected.num_parameters()
    assert model.num_parameters(only_trainable=True) == expected.num_parameters(only_trainable=True)
    assert model.bfloat16().dtype == torch.bfloat16
    assert model.to("meta").device.type == "meta"
    assert model.main_input_name == "pixel_values"
    assert model.base_model.num_parameters() == expected.base_model.num_parameters()
    assert model.get_input_embeddings() is model.mae.patch_embed


@pytest.mark.parametrize("options", [{}, {"use_reentrant": True}, {"use_reentrant": False}])
@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_gradient_checkpointing(options, name):
    """Gradients and names stay; blocks run once more in the backward pass."""
    config, images, noise = configuration(), torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    torch.manual_seed(0)
    model = ViTMAEForPreTraining(config)
    names = model.state_dict().keys()
    model(images, noise=noise).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    runs = []
    getattr(model, f"{name}_enable")(options)
    assert model.is_gradient_checkpointing
    assert model.is_activation_checkpointing
    assert model.state_dict().keys() == names
    for block in (*model.mae.blocks, *model.mae.decoder_blocks):
        block._checkpoint_wrapped_module.register_forward_pre_hook(lambda *_: runs.append(1))
    loss = model(images, noise=noise).loss
    assert len(runs) == 3
    loss.backward()
    assert len(runs) == 6
    wrapper = "_checkpoint_wrapped_module."
    got = {name.replace(wrapper, ""): p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


def test_every_other_block_is_checkpointed():
    model = ViTMAEForPreTraining(configuration(num_hidden_layers=3))
    model.activation_checkpointing_enable(every_n_layers=2)
    assert [hasattr(block, "_checkpoint_wrapped_module") for block in model.mae.blocks] == [True, False, True]
    wrong = {"offload must be False": {"offload": True}, "every_n_layers must be at least 1; it is 0": {"every_n_layers": 0}}
    for message, options in wrong.items():
        with pytest.raises(ValueError, match=message):
            model.activation_checkpointing_enable(**options)


@pytest.mark.parametrize("rates", [(0.3, 0.0), (0.0, 0.3), (0.3, 0.2)])
def test_dropout_leaves_inference_as_it_is(rates):
    config = configuration(hidden_dropout_prob=rates[0], attention_probs_dropout_prob=rates[1])
    (model, mine), images, noise = both(config), torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    torch.testing.assert_close(mine(images, noise=noise).logits, model(images, noise=noise).logits, rtol=1e-4, atol=1e-5)
    mine.train()
    assert not torch.equal(mine(images, noise=noise).logits, mine(images, noise=noise).logits)


def test_dropout_of_a_single_token():
    """Its weight is 1: dropped, the value is 0; kept, it doubles. So is the projection."""
    torch.manual_seed(0)
    attention, x = Attention(4, 2), torch.randn(64, 1, 4)
    value = attention.qkv(x)[..., 8:].unflatten(2, (2, 2))
    attention.proj.weight.data, attention.proj.bias.data = torch.eye(4), torch.zeros(4)
    for dropping in (DroppingAttention(attention, weights=0.5, projected=0.0), DroppingAttention(attention, 0.0, 0.5)):
        got = dropping(x).unflatten(2, (2, 2))
        kept = got != 0
        torch.testing.assert_close(got[kept], 2 * value[kept])
        assert 0.3 < kept.float().mean() < 0.7
        by_head = kept.all(dim=3) | ~kept.any(dim=3)
        assert by_head.all() == (dropping.weights > 0)
        torch.testing.assert_close(dropping.eval()(x).unflatten(2, (2, 2)), value)


def test_dropout_of_an_mlp():
    torch.manual_seed(0)
    mlp, x = Mlp(4, 8), torch.randn(64, 3, 4)
    got, expected = DroppingMlp(mlp, 0.5)(x), mlp(x)
    kept = got != 0
    torch.testing.assert_close(got[kept], 2 * expected[kept])
    assert 0.3 < kept.float().mean() < 0.7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_dropout_prob": 1.0}, r"config.hidden_dropout_prob must be in \[0, 1\); it is 1.0"),
        ({"hidden_act": "relu"}, "config.hidden_act must be 'gelu' for maefast; it is 'relu'"),
        ({"qkv_bias": False}, "config.qkv_bias must be True"),
        ({"decoder_intermediate_size": 96}, "MLPs of one ratio .* 192 / 48 and 96 / 32"),
    ],
)
def test_what_the_model_has_no_place_for(options, message):
    with pytest.raises(ValueError, match=message):
        ViTMAEForPreTraining(configuration(**options))


def test_what_forward_refuses():
    model, images = ViTMAEForPreTraining(configuration()), torch.randn(1, 3, 32, 32)
    for message, arguments in {
        "interpolate_pos_encoding must be False": {"pixel_values": images, "interpolate_pos_encoding": True},
        "attention_mask must be None": {"pixel_values": images, "attention_mask": torch.ones(1, 5)},
        "pixel_values must be given; it is None": {},
    }.items():
        with pytest.raises(ValueError, match=message):
            model(**arguments)
