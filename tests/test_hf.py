"""maefast.hf against transformers' own ViTMAE: parity at copied weights, checkpoints both ways, training under its Trainer."""

import pytest
import torch
from torch import Tensor, nn

from maefast.hf import ViTMAEForPreTraining
from maefast.testing.errors import assert_close_to_float64

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
    ("N", "options"),
    [
        pytest.param(2, SMALL, id="small"),
        pytest.param(2, SMALL | OPTIONS, id="options"),
        pytest.param(1, BASE, id="ViT-B/16"),
    ],
)
def test_parity(N, options):
    config = transformers.ViTMAEConfig(**options)
    model = theirs(config)
    mine = ViTMAEForPreTraining(config)
    mine.load_state_dict(model.state_dict())
    patches = (config.image_size // config.patch_size) ** 2
    images, noise = torch.randn(N, config.num_channels, config.image_size, config.image_size), torch.rand(N, patches)
    got, eager = results(mine, images, noise), results(model, images, noise)
    got_gradients, eager_gradients = gradients(mine), gradients_of_theirs(model)
    model.double()
    exact = results(model, images.double(), noise)
    exact_gradients = gradients_of_theirs(model)
    for name in ("mask", "ids"):
        assert torch.equal(got[name], eager[name]), name
    for name in ("loss", "logits"):
        assert_close_to_float64(name, got[name], eager[name], exact[name])
    assert got_gradients.keys() == exact_gradients.keys()
    for name, gradient in got_gradients.items():
        assert_close_to_float64(name, gradient, eager_gradients[name], exact_gradients[name])


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


def test_output_as_transformers_has_it():
    model = ViTMAEForPreTraining(configuration())
    output = model(torch.randn(2, 3, 32, 32))
    assert [output[i] is output[name] is getattr(output, name) for i, name in enumerate(output._fields)] == [True] * 4
    assert output.logits.shape == (2, 16, 192)
    assert model(pixel_values=torch.randn(2, 3, 32, 32), return_dict=False)[2].shape == (2, 16)
    assert torch.equal(model.unpatchify(model.patchify(images := torch.randn(2, 3, 32, 32))), images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_dropout_prob": 0.1}, "config.hidden_dropout_prob must be 0.0 for maefast; it is 0.1"),
        ({"hidden_act": "relu"}, "config.hidden_act must be 'gelu' for maefast; it is 'relu'"),
        ({"qkv_bias": False}, "config.qkv_bias must be True"),
        ({"decoder_intermediate_size": 96}, "MLPs of one ratio .* 192 / 48 and 96 / 32"),
    ],
)
def test_what_the_model_has_no_place_for(options, message):
    with pytest.raises(ValueError, match=message):
        ViTMAEForPreTraining(configuration(**options))


def test_another_size_is_refused():
    model = ViTMAEForPreTraining(configuration())
    with pytest.raises(ValueError, match="interpolate_pos_encoding must be False"):
        model(torch.randn(1, 3, 64, 64), interpolate_pos_encoding=True)


class Images(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"pixel_values": self.images[i]}


def test_two_steps_under_trainer(tmp_path):
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
