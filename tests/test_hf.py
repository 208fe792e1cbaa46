"""maefast.hf against transformers' own ViTMAE: parity at copied weights, checkpoints both ways, training under its Trainer."""

import copy
import json
from pathlib import Path

import pytest
import torch
from support import BATCHES, IMAGES, Batch, assert_results
from torch import Tensor, nn

from maefast.blocks import Attention, Mlp
from maefast.hf import ViTMAEForPreTraining, ViTMAEModel
from maefast.hf.capture import DroppingAttention, DroppingMlp

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

# Of ViT-B/16 the widths, the image and the tokens; one block stands for twelve.
BASE = {"norm_pix_loss": True, "num_hidden_layers": 1, "decoder_num_hidden_layers": 1}
OPTIONS = {"norm_pix_loss": True, "mask_ratio": 0.5, "layer_norm_eps": 1e-6, "num_channels": 1}
SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 192,
    "image_size": 32,
    "patch_size": 8,
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 128,
}


def configuration(**options: object):
    return transformers.ViTMAEConfig(**{**SMALL, **options})


def theirs(config, seed: int = 0) -> nn.Module:
    """With every parameter random: a fresh one has positions of zero."""
    torch.manual_seed(seed)
    model = transformers.ViTMAEForPreTraining(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.05 + (parameter if parameter.dim() == 1 else 0))
    return model


def results(model: nn.Module, images: Tensor, noise: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    output = model(images, noise=noise)
    output.loss.backward()
    return {"loss": output.loss.detach(), "logits": output.logits.detach(), "mask": output.mask, "ids": output.ids_restore}


def gradients(model: ViTMAEForPreTraining) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.mae.named_parameters() if p.grad is not None}


def gradients_of_theirs(model: nn.Module) -> dict[str, Tensor]:
    """By our names: the gradients take the place of the weights of a copy, which goes through our loading."""
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
    model = theirs(config)
    mine = ViTMAEForPreTraining(config)
    mine.load_state_dict(model.state_dict())
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


def test_checkpoints_both_ways(tmp_path):
    model = theirs(configuration())
    model.save_pretrained(tmp_path / "theirs")
    mine = ViTMAEForPreTraining.from_pretrained(tmp_path / "theirs")
    assert mine.config.to_dict() == transformers.ViTMAEConfig.from_pretrained(tmp_path / "theirs").to_dict()
    mine.save_pretrained(tmp_path / "mine")
    again, info = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "mine", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, parameter in model.state_dict().items():
        assert torch.equal(parameter, again.state_dict()[name]), name


def test_state_dict_has_the_published_names():
    """Alone, and as part of another module; loading wants each of them."""
    source, mine = (ViTMAEForPreTraining(configuration()) for _ in range(2))
    names = source.state_dict()
    assert "vit.encoder.layer.1.attention.attention.query.weight" in names
    assert not any("mae." in name for name in names)
    nest = nn.ModuleDict({"inner": mine})
    nest.load_state_dict({f"inner.{name}": tensor for name, tensor in names.items()})
    assert nest.state_dict().keys() == {f"inner.{name}" for name in names}
    for name, tensor in mine.state_dict().items():
        assert torch.equal(tensor, names[name]), name
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
    assert torch.equal(mine.mask, expected.mask)
    assert torch.equal(mine.ids_restore, expected.ids_restore)


@pytest.mark.parametrize(
    "names", [("output_hidden_states",), ("output_attentions",), ("output_hidden_states", "output_attentions")]
)
@pytest.mark.parametrize("place", ["argument", "config"])
def test_hidden_states_and_attentions(names, place):
    wanted = dict.fromkeys(names, True)
    config = configuration(attn_implementation="eager", **(wanted if place == "config" else {}))
    model, images, noise = theirs(config).eval(), torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    mine = ViTMAEForPreTraining(config).eval()
    mine.load_state_dict(model.state_dict())
    arguments = wanted if place == "argument" else {}
    got, expected = mine(images, noise=noise, **arguments), model(images, noise=noise, **arguments)
    encoder = mine.vit(images, noise=noise, **arguments)
    for name, count in (("hidden_states", 3), ("attentions", 2)):
        if f"output_{name}" not in names:
            assert name not in got
            continue
        assert len(got[name]) == len(encoder[name]) == len(expected[name]) == count
        for a, b, c in zip(got[name], encoder[name], expected[name], strict=True):
            torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-5)
            assert torch.equal(a, b)
    torch.testing.assert_close(got.loss, expected.loss)


def test_the_encoder():
    """`.vit` shares the parameters; ViTMAEModel stands alone."""
    config, images, noise = configuration(), torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    model = theirs(config).eval()
    mine = ViTMAEForPreTraining(config).eval()
    mine.load_state_dict(model.state_dict())
    expected = model.vit(images, noise=noise)
    alone = ViTMAEModel(config).eval()
    alone.load_state_dict(model.vit.state_dict())
    for encoder in (mine.vit, alone):
        output = encoder(images, noise=noise)
        assert tuple(output.keys()) == tuple(expected.keys())
        torch.testing.assert_close(output.last_hidden_state, expected.last_hidden_state, rtol=1e-4, atol=1e-5)
        assert torch.equal(output.ids_restore, expected.ids_restore)
        assert torch.equal(output.mask, expected.mask)
        assert encoder.num_parameters() == sum(p.numel() for p in model.vit.parameters())
    shared = {id(p) for p in mine.mae.parameters()}
    assert all(id(p) in shared for p in mine.vit.parameters())
    published = {name.removeprefix("vit.") for name in mine.state_dict() if name.startswith("vit.")}
    assert mine.vit.state_dict().keys() == alone.state_dict().keys() == published


def test_an_encoder_moves_as_one():
    """To another dtype, from the meta device, and by load_state_dict(assign=True), the tokens included."""
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
    """The same gradients; blocks run once more in the backward pass; names stay."""
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
    assert got.keys() == expected.keys()
    for name_of, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name_of], rtol=1e-4, atol=1e-6)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


def test_every_other_block_is_checkpointed():
    model = ViTMAEForPreTraining(configuration(num_hidden_layers=3))
    model.activation_checkpointing_enable(every_n_layers=2)
    assert [hasattr(block, "_checkpoint_wrapped_module") for block in model.mae.blocks] == [True, False, True]
    with pytest.raises(ValueError, match="offload must be False"):
        model.activation_checkpointing_enable(offload=True)
    with pytest.raises(ValueError, match="every_n_layers must be at least 1; it is 0"):
        model.activation_checkpointing_enable(every_n_layers=0)


# -- dropout ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rates", [(0.3, 0.0), (0.0, 0.3), (0.3, 0.2)])
def test_dropout_leaves_inference_as_it_is(rates):
    config = configuration(hidden_dropout_prob=rates[0], attention_probs_dropout_prob=rates[1])
    model, images, noise = theirs(config).eval(), torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    mine = ViTMAEForPreTraining(config).eval()
    mine.load_state_dict(model.state_dict())
    torch.testing.assert_close(mine(images, noise=noise).logits, model(images, noise=noise).logits, rtol=1e-4, atol=1e-5)
    mine.train()
    assert not torch.equal(mine(images, noise=noise).logits, mine(images, noise=noise).logits)


def test_dropout_of_a_single_token():
    """Its one attention weight is 1: dropped, the value is 0, and kept, it is doubled. Then what is projected, likewise."""
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
    model = ViTMAEForPreTraining(configuration())
    with pytest.raises(ValueError, match="interpolate_pos_encoding must be False"):
        model(torch.randn(1, 3, 64, 64), interpolate_pos_encoding=True)
    with pytest.raises(ValueError, match="attention_mask must be None"):
        model(torch.randn(1, 3, 32, 32), attention_mask=torch.ones(1, 5))
    with pytest.raises(ValueError, match="pixel_values must be given; it is None"):
        model()


# -- from_pretrained and save_pretrained ------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path) -> Path:
    """A folder of transformers' class."""
    theirs(configuration()).save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def in_cache(folder: Path, cache: Path, revision: str = "main") -> Path:
    """The folder as the hub's client keeps it once it is downloaded."""
    repository = cache / "models--facebook--vit-mae-base"
    for part in ("refs", "snapshots"):
        (repository / part).mkdir(parents=True, exist_ok=True)
    commit = revision.encode().hex().ljust(40, "0")
    (repository / "refs" / revision).write_text(commit)
    folder.rename(repository / "snapshots" / commit)
    return repository / "snapshots" / commit


@pytest.mark.parametrize("cls", [ViTMAEForPreTraining, ViTMAEModel])
def test_a_model_of_the_hub_in_the_local_cache(saved, tmp_path, cls):
    expected = cls.from_pretrained(saved).state_dict()
    in_cache(saved, tmp_path / "cache")
    model = cls.from_pretrained("facebook/vit-mae-base", cache_dir=tmp_path / "cache", local_files_only=True, mask_ratio=0.5)
    assert model.config.mask_ratio == 0.5
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_sharded_and_pickled_models_of_the_hub(tmp_path):
    for revision, options in (("sharded", {"max_shard_size": "50KB"}), ("pickled", {"safe_serialization": False})):
        source = ViTMAEForPreTraining(configuration())
        source.save_pretrained(tmp_path / revision, **options)
        in_cache(tmp_path / revision, tmp_path / "cache", revision)
        place = {"cache_dir": tmp_path / "cache", "local_files_only": True}
        model = ViTMAEForPreTraining.from_pretrained("facebook/vit-mae-base", revision=revision, **place)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, source.state_dict()[name]), name


def test_a_model_that_is_not_in_the_cache(tmp_path):
    message = "^facebook/vit-mae-large is neither here nor given by the hub or its local cache: .*$"
    with pytest.raises(OSError, match=message):
        ViTMAEForPreTraining.from_pretrained("facebook/vit-mae-large", cache_dir=tmp_path, local_files_only=True)


def test_dtype_and_mode(saved):
    assert ViTMAEForPreTraining.from_pretrained(saved).dtype == torch.float32
    for options in (
        {"dtype": torch.bfloat16},
        {"torch_dtype": torch.bfloat16},
        {"dtype": "bfloat16"},
        {"device_map": "cpu", "dtype": "bfloat16"},
    ):
        model = ViTMAEForPreTraining.from_pretrained(saved, **options)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert not model.training
    model.save_pretrained(saved)
    assert json.loads((saved / "config.json").read_text())["dtype"] == "bfloat16"
    assert ViTMAEForPreTraining.from_pretrained(saved).dtype == torch.bfloat16
    assert ViTMAEForPreTraining.from_pretrained(saved, dtype=None).dtype == torch.float32


def test_device_map(saved):
    for device_map in (None, "cpu", torch.device("cpu"), {"": "cpu"}):
        assert ViTMAEForPreTraining.from_pretrained(saved, device_map=device_map).device.type == "cpu"
    with pytest.raises(ValueError, match="device_map must be None or one device for maefast; it is 'auto'"):
        ViTMAEForPreTraining.from_pretrained(saved, device_map="auto")


def test_attention_that_is_asked_for(saved):
    model = ViTMAEForPreTraining.from_pretrained(saved, attn_implementation="sdpa")
    assert {block.attn.backend for block in (*model.mae.blocks, *model.mae.decoder_blocks)} == {"sdpa"}


def test_what_loading_tells(saved, tmp_path):
    model, info = ViTMAEForPreTraining.from_pretrained(saved, output_loading_info=True)
    assert not any(info.values())
    model.vit.save_pretrained(tmp_path / "encoder")
    with pytest.warns(UserWarning, match="holds no decoder; the model keeps its own"):
        again, info = ViTMAEForPreTraining.from_pretrained(tmp_path / "encoder", output_loading_info=True)
    assert info["missing_keys"] == {name for name in model.state_dict() if name.startswith("decoder.")}
    assert torch.equal(again.mae.norm.weight, model.mae.norm.weight)
    _, info = ViTMAEModel.from_pretrained(saved, output_loading_info=True)
    assert info["unexpected_keys"] == {name for name in model.state_dict() if name.startswith("decoder.")}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mask_rate": 0.5}, TypeError, "from_pretrained has no argument mask_rate, and ViTMAEConfig no such entry"),
        ({"quantization_config": {"bits": 4}}, ValueError, "quantization_config must be None for maefast"),
        ({"ignore_mismatched_sizes": True}, ValueError, "ignore_mismatched_sizes must be None or False for maefast; it is True"),
        ({"weights_only": False}, ValueError, "weights_only must be None or True for maefast"),
        ({"attn_implementation": "foo"}, ValueError, r"`attn_implementation=\"foo\"` is not supported; it must be one of eager"),
        ({"dtype": "float99"}, ValueError, "dtype must be a floating-point dtype of torch or \"auto\"; it is 'float99'"),
        ({"dtype": torch.int8}, ValueError, "dtype must be a floating-point dtype"),
        ({"config": SMALL, "mask_ratio": 0.5}, TypeError, "mask_ratio must be in config, where that is given"),
        ({"use_safetensors": False}, OSError, "has no file named pytorch_model.bin"),
    ],
)
def test_arguments_that_would_be_ignored(saved, options, error, message):
    with pytest.raises(error, match=message):
        ViTMAEForPreTraining.from_pretrained(saved, **options)


def test_neutral_arguments(saved):
    options = {"low_cpu_mem_usage": True, "trust_remote_code": False, "weights_only": True, "use_safetensors": True}
    assert not any(ViTMAEForPreTraining.from_pretrained(saved, output_loading_info=True, **options)[1].values())


def test_a_state_dict_in_place_of_a_checkpoint():
    source = ViTMAEForPreTraining(configuration())
    model = ViTMAEForPreTraining.from_pretrained(None, config=configuration(), state_dict=source.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name]), name
    with pytest.raises(ValueError, match="pretrained_model_name_or_path or state_dict must be given, and not both"):
        ViTMAEForPreTraining.from_pretrained(None)


@pytest.mark.parametrize("options", [{}, {"safe_serialization": True}, {"max_shard_size": "50KB"}, {"is_main_process": True}])
def test_what_is_saved_loads_into_transformers(tmp_path, options):
    model = ViTMAEForPreTraining(configuration())
    model.save_pretrained(tmp_path / "mine", **options)
    files = {file.name for file in (tmp_path / "mine").iterdir()}
    assert ("model.safetensors" in files) == ("max_shard_size" not in options)
    assert json.loads((tmp_path / "mine" / "config.json").read_text())["architectures"] == ["ViTMAEForPreTraining"]
    again, info = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "mine", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    mine = ViTMAEForPreTraining.from_pretrained(tmp_path / "mine")
    noise, images = torch.rand(2, 16), torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(mine(images, noise=noise).loss, again(images, noise=noise).loss)


def test_saving(tmp_path):
    model = ViTMAEForPreTraining(configuration())
    model.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()
    model.save_pretrained(tmp_path / "zeros", state_dict={name: torch.zeros_like(t) for name, t in model.state_dict().items()})
    assert not ViTMAEForPreTraining.from_pretrained(tmp_path / "zeros").mae.norm.weight.any()
    for call in (model.push_to_hub, lambda: model.save_pretrained(tmp_path / "hub", push_to_hub=True)):
        with pytest.raises(ValueError, match=r"push_to_hub is not offered: upload the folder .* huggingface_hub.upload_folder"):
            call()
    assert not (tmp_path / "hub").exists()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match=r"save_directory must be a folder; .*file is a file"):
        model.save_pretrained(tmp_path / "file")


def test_other_layouts(tmp_path):
    """With a config for what they do not tell; key= chooses one of several."""
    model = ViTMAEForPreTraining(configuration())
    average = {name: t + 1 for name, t in model.mae.state_dict().items()}
    torch.save({"model": model.mae.state_dict(), "model_ema": average}, tmp_path / "official.pth")
    with pytest.warns(UserWarning, match="does not tell whether"):
        loaded = ViTMAEForPreTraining.from_pretrained(tmp_path / "official.pth", config=configuration(), key="model_ema")
    assert torch.equal(loaded.mae.norm.weight, average["norm.weight"])
    with pytest.raises(ValueError, match="config must be given for a file of weights"):
        ViTMAEForPreTraining.from_pretrained(tmp_path / "official.pth")


def test_a_folder_of_another_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match=r"config must be that of a ViTMAE; .* has one of model_type 'bert'"):
        ViTMAEForPreTraining.from_pretrained(tmp_path)


class Images(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"pixel_values": self.images[i]}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_steps_under_trainer(tmp_path, checkpointing):
    """Real steps, a checkpoint, and a third step resumed from it."""
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    from safetensors.torch import load_file

    def train(model: nn.Module, steps: int, resume: bool = False) -> list[float]:
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=steps,
            per_device_train_batch_size=4,
            save_steps=2,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            gradient_checkpointing=checkpointing,
        )
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Images())
        trainer.train(resume_from_checkpoint=resume)
        return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]

    model = ViTMAEForPreTraining(configuration())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses = train(model, 2)
    assert len(losses) == 2
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == before.keys() - {"vit.embeddings.position_embeddings", "decoder.decoder_pos_embed"}
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(saved[name], tensor), name
    resumed = ViTMAEForPreTraining(configuration())
    assert train(resumed, 3, resume=True)[:2] == losses
    assert not torch.equal(resumed.state_dict()["vit.layernorm.weight"], saved["vit.layernorm.weight"])
