"""Heads in checkpoints, with their counters: loaded if the model has the same, else left out."""

import pytest
import torch
from checkpoints import assert_loads, assert_same_weights, copy_of, encoder_of, mmpretrain, trained
from torch import nn
from torch.optim.swa_utils import AveragedModel

from maefast import MAE, VisionTransformer, checkpoint

ENCODER = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}


def probe(classes: int = 5) -> VisionTransformer:
    """The official linear probe."""
    torch.manual_seed(3)
    model = VisionTransformer(**ENCODER, num_classes=classes)
    model.head = nn.Sequential(nn.BatchNorm1d(32, affine=False, eps=1e-6), model.head)
    model.head[0].num_batches_tracked.fill_(7)
    return model


def test_counters_of_a_head_are_loaded(tmp_path):
    source, target = probe(), probe()
    torch.save({"model": source.state_dict()}, tmp_path / "probe.pth")
    target.head[0].num_batches_tracked.fill_(0)
    report = checkpoint.load(target, tmp_path / "probe.pth")
    assert target.head[0].num_batches_tracked.item() == 7
    assert (report.missing, report.unexpected, report.ignored) == ((), (), ())


def test_counters_of_a_head_stay_with_it(tmp_path):
    torch.save({"model": probe().state_dict()}, tmp_path / "probe.pth")
    encoder = VisionTransformer(**ENCODER, num_classes=0)
    report = checkpoint.load(encoder, tmp_path / "probe.pth")
    assert set(report.unexpected) == {name for name in probe().state_dict() if name.startswith("head.")}
    assert_same_weights(encoder, {name: t for name, t in probe().state_dict().items() if not name.startswith("head.")})


def test_averaged_model(tmp_path):
    model = trained()
    torch.save(AveragedModel(model).state_dict(), tmp_path / "average.pth")
    assert assert_loads(tmp_path / "average.pth", model).ignored == ("n_averaged",)


@pytest.mark.parametrize("source", [VisionTransformer(**ENCODER, num_classes=5), probe(7)], ids=["classes", "probe"])
def test_a_head_of_other_classes_is_left_out(tmp_path, source):
    """As official fine-tuning does; the model's own stays as it was."""
    torch.save({"model": source.state_dict()}, tmp_path / "classifier.pth")
    target = VisionTransformer(**ENCODER, num_classes=7)
    head = copy_of(target.head)
    report = checkpoint.load(target, tmp_path / "classifier.pth")
    assert_same_weights(target.head, head)
    assert torch.equal(target.norm.weight, source.norm.weight)
    found = "head.weight (5, 32)" if isinstance(source.head, nn.Linear) else "head.1.weight (7, 32)"
    said = f"the head of the checkpoint, {found}, is left out: VisionTransformer has head.weight (7, 32)"
    assert report.warnings == (said,)
    assert set(report.missing) == {"head.weight", "head.bias"}


def test_a_classifier_for_an_mae(tmp_path):
    """Its encoder; the head is left out, and the decoder stays as it was."""
    classifier = VisionTransformer(**ENCODER, num_classes=5)
    torch.save(classifier.state_dict(), tmp_path / "vit.pth")
    before = trained(seed=1).state_dict()
    tensors = {name: tensor for name, tensor in classifier.state_dict().items() if not name.startswith("head.")}
    report = assert_loads(tmp_path / "vit.pth", before | tensors)
    warning = "the head of the checkpoint, head.weight (5, 32), is left out"
    assert report.warnings == (f"{warning}: MAE has none", "the checkpoint holds no decoder; the model keeps its own")
    with pytest.warns(UserWarning, match="is left out: MAE has none"):
        loaded = MAE.from_pretrained(tmp_path / "vit.pth", num_heads=4)
    assert_same_weights(encoder_of(loaded), tensors)
    report = checkpoint.convert(tmp_path / "vit.pth", tmp_path / "out.pth", "timm")
    assert_same_weights(torch.load(tmp_path / "out.pth"), tensors)
    assert report.unexpected == ("head.weight", "head.bias")
    assert report.warnings == (f"{warning}: what is written has none",)


def test_heads_of_other_libraries(tmp_path):
    """transformers' classifier and pooler, mmpretrain's head: beside the encoder."""
    tensors = encoder_of(trained())
    torch.save({"state_dict": mmpretrain(tensors) | {"head.layers.head.weight": torch.ones(5, 32)}}, tmp_path / "mm.pth")
    target = VisionTransformer(**ENCODER, num_classes=0)
    assert checkpoint.load(target, tmp_path / "mm.pth").ignored == ("head.layers.head.weight",)
    assert_same_weights(target, tensors)
