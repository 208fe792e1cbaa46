"""from_pretrained and save_pretrained of maefast.hf: transformers' folders, hub and Trainer."""

import json
from pathlib import Path

import pytest
import torch
from checkpoints import assert_same_weights, copy_of
from hf_models import SMALL, configuration, theirs, transformers
from torch import nn

from maefast.hf import ViTMAEForPreTraining, ViTMAEModel


def test_checkpoints_both_ways(tmp_path):
    model = theirs(configuration())
    model.save_pretrained(tmp_path / "theirs")
    mine = ViTMAEForPreTraining.from_pretrained(tmp_path / "theirs")
    assert mine.config.to_dict() == transformers.ViTMAEConfig.from_pretrained(tmp_path / "theirs").to_dict()
    mine.save_pretrained(tmp_path / "mine")
    again, info = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "mine", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_weights(model, again)


@pytest.fixture
def saved(tmp_path) -> Path:
    theirs(configuration()).save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def in_cache(folder: Path, cache: Path, revision: str = "main") -> None:
    """Move the folder to where the hub's client keeps it once it is downloaded."""
    repository, commit = cache / "models--facebook--vit-mae-base", revision.encode().hex().ljust(40, "0")
    for part in ("refs", "snapshots"):
        (repository / part).mkdir(parents=True, exist_ok=True)
    (repository / "refs" / revision).write_text(commit)
    folder.rename(repository / "snapshots" / commit)


@pytest.mark.parametrize("cls", [ViTMAEForPreTraining, ViTMAEModel])
def test_a_model_of_the_hub_in_the_local_cache(saved, tmp_path, cls):
    expected = cls.from_pretrained(saved).state_dict()
    in_cache(saved, tmp_path / "cache")
    model = cls.from_pretrained("facebook/vit-mae-base", cache_dir=tmp_path / "cache", local_files_only=True, mask_ratio=0.5)
    assert model.config.mask_ratio == 0.5
    assert_same_weights(model, expected)


def test_sharded_and_pickled_models_of_the_hub(tmp_path):
    for revision, options in (("sharded", {"max_shard_size": "50KB"}), ("pickled", {"safe_serialization": False})):
        source = ViTMAEForPreTraining(configuration())
        source.save_pretrained(tmp_path / revision, **options)
        in_cache(tmp_path / revision, tmp_path / "cache", revision)
        place = {"cache_dir": tmp_path / "cache", "local_files_only": True}
        model = ViTMAEForPreTraining.from_pretrained("facebook/vit-mae-base", revision=revision, **place)
        assert_same_weights(model, source)


def test_a_model_that_is_not_in_the_cache(tmp_path):
    message = "^facebook/vit-mae-large is neither here nor given by the hub or its local cache: .*$"
    with pytest.raises(OSError, match=message):
        ViTMAEForPreTraining.from_pretrained("facebook/vit-mae-large", cache_dir=tmp_path, local_files_only=True)


def test_dtype_and_mode(saved):
    assert ViTMAEForPreTraining.from_pretrained(saved).dtype == torch.float32
    in_words = {"dtype": "bfloat16"}
    for options in ({"dtype": torch.bfloat16}, {"torch_dtype": torch.bfloat16}, in_words, in_words | {"device_map": "cpu"}):
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
    assert_same_weights(model, source)
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
    with pytest.warns(UserWarning, match="does not store whether"):
        loaded = ViTMAEForPreTraining.from_pretrained(tmp_path / "official.pth", config=configuration(), key="model_ema")
    assert torch.equal(loaded.mae.norm.weight, average["norm.weight"])
    with pytest.raises(ValueError, match="config must be given for a file of weights"):
        ViTMAEForPreTraining.from_pretrained(tmp_path / "official.pth")


def test_a_folder_of_another_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match=r"config must be that of a ViTMAE; .* has one of model_type 'bert'"):
        ViTMAEForPreTraining.from_pretrained(tmp_path)


TRAINING = {"per_device_train_batch_size": 4, "save_steps": 2, "logging_steps": 1, "lr_scheduler_type": "constant"}
TRAINING |= {"report_to": [], "use_cpu": True, "disable_tqdm": True}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_steps_under_trainer(tmp_path, checkpointing):
    """Real steps, a checkpoint, and a third step resumed from it."""
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    from safetensors.torch import load_file

    def train(model: nn.Module, steps: int, resume: bool = False) -> list[float]:
        options = {"max_steps": steps, "learning_rate": 1e-2, "gradient_checkpointing": checkpointing}
        args = transformers.TrainingArguments(output_dir=str(tmp_path), **TRAINING, **options)
        images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        trainer = transformers.Trainer(model=model, args=args, train_dataset=[{"pixel_values": image} for image in images])
        trainer.train(resume_from_checkpoint=resume)
        return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]

    model = ViTMAEForPreTraining(configuration())
    before = copy_of(model)
    losses = train(model, 2)
    assert len(losses) == 2
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == before.keys() - {"vit.embeddings.position_embeddings", "decoder.decoder_pos_embed"}
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert_same_weights(model, saved)
    resumed = ViTMAEForPreTraining(configuration())
    assert train(resumed, 3, resume=True)[:2] == losses
    assert not torch.equal(resumed.state_dict()["vit.layernorm.weight"], saved["vit.layernorm.weight"])
