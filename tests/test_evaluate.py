"""What evaluation computes, by paper and pencil and on a data set in memory."""

import errno
import math
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from images import Stripes, batches_of
from support import images_for, small_mae

from maefast import VisionTransformer
from maefast.train.data import crops, labelled
from maefast.train.errors import UserError
from maefast.train.evaluate import features, knn, layers, linprobe, supervised
from maefast.train.evaluate.lars import LARS


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "mae"
    small_mae().save_pretrained(folder)
    return folder


def test_encoder_of_a_checkpoint(checkpoint):
    """Every token as MAE.encode gives it; untrained, other weights and the official positions."""
    mae, encoder = small_mae(), features.load_encoder(checkpoint)
    imgs = images_for(mae, 3)
    torch.testing.assert_close(encoder.encode(imgs), mae.encode(imgs), rtol=0, atol=0)
    untrained = features.load_encoder(checkpoint, random_init=True)
    assert torch.equal(untrained.pos_embed, mae.pos_embed)
    assert not torch.equal(untrained.blocks[1].mlp.fc1.weight, mae.blocks[1].mlp.fc1.weight)
    with pytest.raises(ValueError, match="global_pool must be False"):
        VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=1, global_pool=True).encode(imgs)


def test_views_of_a_batch():
    """One for all images, and one for each; a task of threads has fewer images than a batch."""
    data, size = Stripes(70), (64, 64)
    whole = crops.still(size)
    (imgs, labels), (last, _) = labelled.read_batches(
        data, [torch.arange(69), torch.tensor([0])], size, lambda index: whole._replace(flip=index == 1)
    )
    expected = data.pictures[:69].clone()
    expected[1] = expected[1].flip(-1)
    assert torch.equal(imgs, expected)
    assert labels.tolist() == data.labels[:69].tolist()
    assert torch.equal(last[0], data.pictures[0])
    assert crops.still((224, 224)).box(256, 300) == (38, 16, 262, 240)  # 224 of 256 pixels
    ((alike, _),) = labelled.read_batches(data, [torch.arange(70)], size, whole._replace(flip=True))
    assert torch.equal(alike, data.pictures.flip(-1))


@pytest.mark.parametrize(("kind", "shape"), [("cls", (32,)), ("mean", (32,)), ("all", (25, 32))])
def test_features_in_files(checkpoint, tmp_path, kind, shape):
    mae, data = small_mae(), Stripes(5)
    expected = mae.encode(data.pictures[:, :, :, 8:56]).detach()
    expected = {"cls": expected[:, 0], "mean": expected[:, 1:].mean(dim=1), "all": expected}[kind]
    encoder = features.load_encoder(checkpoint)

    def write(name):
        features.write_features(features.features_of(encoder, data, kind, batch_size=2), len(data), shape, tmp_path / name)

    write("out.npy")
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "out.npy")), expected)
    pytest.importorskip("pyarrow")
    from pyarrow import parquet

    data.labels[3] = -1
    write("out.parquet")
    table = parquet.read_table(tmp_path / "out.parquet")
    assert table["label"].to_pylist() == [0, 1, 0, None, 0]
    assert table.schema.metadata[b"shape"].decode() == ",".join(map(str, (5, *shape)))
    torch.testing.assert_close(torch.tensor(table["features"].to_pylist()), expected.flatten(1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mae", "out.npy", "out.parquet"]


def test_features_are_never_half_written(tmp_path):
    def broken():
        yield torch.zeros(2, 4), torch.zeros(2)
        raise UserError("third image is broken")

    with pytest.raises(UserError, match="third image"):
        features.write_features(broken(), 5, (4,), tmp_path / "out.npy")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(features.os, "posix_fallocate", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    message = r"OUT must be a path that can be written; .*/out\.npy cannot be: No space left on device"
    with pytest.raises(UserError, match=message):
        features.write_features(iter([(torch.zeros(2, 4), torch.zeros(2))]), 2, (4,), tmp_path / "out.npy")
    assert list(tmp_path.iterdir()) == []


def test_a_broken_image_stops_the_reading():
    data = Stripes(9)
    data._read = lambda index, size, box: (_ for _ in ()).throw(UserError("7.png is broken")) if index == 7 else torch.zeros(1)
    seen = []
    with pytest.raises(UserError, match=r"7\.png"):
        seen.extend(labelled.read_batches(data, torch.arange(9).split(2), (64, 64), crops.still((1, 1))))
    assert [len(labels) for _, labels in seen] == [2, 2, 2]


def test_votes_by_hand():
    """Neighbours at 0, 60 and 90 degrees have similarities 1, 1/2 and 0; a fourth is too far."""
    bank = torch.tensor([[2.0, 0.0], [0.5, 3**0.5 / 2], [0.0, 7.0], [-1.0, 0.0]], dtype=torch.float64)
    query = torch.tensor([[5.0, 0.0]], dtype=torch.float64)
    votes = knn.knn_votes(bank, torch.tensor([2, 0, 2, 1]), query, 3, k=3, temperature=0.5)
    e = torch.tensor(1.0, dtype=torch.float64).exp()
    torch.testing.assert_close(votes, torch.stack([1 / e, 0 * e, 1 + e**-2])[None])
    many = torch.randn(70, 2, dtype=torch.float64)
    in_parts, at_once = (knn.knn_votes(bank, torch.tensor([2, 0, 2, 1]), many, 3, k=2, batch_size=size) for size in (16, 99))
    torch.testing.assert_close(in_parts, at_once)


def test_votes_outweigh_the_majority():
    """Two far neighbours against a near one, which wins only at a low temperature."""
    bank, labels = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0]]), torch.tensor([0, 1, 1])
    query = torch.tensor([[1.0, 0.1]])
    assert [knn.knn_votes(bank, labels, query, 2, k=3, temperature=t).argmax().item() for t in (0.07, 10.0)] == [0, 1]


@pytest.mark.parametrize(("options", "message"), [({"k": 5}, "k must lie in 1..4"), ({"temperature": 0}, "temperature must be")])
def test_votes_refuse(options, message):
    with pytest.raises(ValueError, match=message):
        knn.knn_votes(torch.ones(4, 2), torch.zeros(4, dtype=torch.long), torch.ones(1, 2), 2, **{"k": 1} | options)


def test_lars_by_formula():
    """Two steps in float64; a zero weight and a bias take plain momentum steps."""
    w, zero, bias = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in ([[3.0, 4.0]], [[0.0, 0.0]], [2.0]))
    optimizer = LARS([w, zero, bias], lr=0.5, weight_decay=0.1, trust_coefficient=0.01)
    expected_w, m_w = w.detach().clone(), torch.zeros(1, 2, dtype=torch.float64)
    for g in (torch.tensor([[0.7, 1.6]]).double(), torch.tensor([[-1.0, 0.2]]).double()):
        w.grad, zero.grad, bias.grad = g.clone(), torch.zeros_like(zero), torch.tensor([1.0], dtype=torch.float64)
        optimizer.step()
        d = g + 0.1 * expected_w
        m_w = 0.9 * m_w + 0.01 * expected_w.pow(2).sum().sqrt() / d.pow(2).sum().sqrt() * d
        expected_w = expected_w - 0.5 * m_w
    torch.testing.assert_close(w.detach(), expected_w, rtol=1e-14, atol=0)
    assert zero.detach().tolist() == [[0.0, 0.0]]
    assert bias.item() == pytest.approx(2.0 - 0.5 * 1.0 - 0.5 * 1.9, rel=1e-14)


def test_lars_first_step_of_a_zero_weight():
    w = torch.zeros(1, 2, requires_grad=True)
    w.grad = torch.tensor([[1.0, -2.0]])
    LARS([w], lr=0.25).step()
    assert w.tolist() == [[-0.25, 0.5]]


def test_lars_refuses():
    with pytest.raises(ValueError, match="momentum must be 0 or more; it is -1"):
        LARS([torch.zeros(1)], momentum=-1)


def tiny_encoder(**options):
    return VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=3, num_heads=2, num_classes=2, **options)


def test_layer_decay_by_name():
    """Head and norm learn at the full rate, the last block at 1/2, the embeddings at 1/16."""
    encoder = tiny_encoder()
    names = {parameter: name for name, parameter in encoder.named_parameters()}
    groups = layers.layer_decay_groups(encoder, 0.3, 0.5)
    found = {names[p]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert found.keys() == set(names.values())
    expected = dict.fromkeys(("cls_token", "pos_embed", "patch_embed.proj.bias"), (1 / 16, 0.0))
    expected |= {"patch_embed.proj.weight": (1 / 16, 0.3), "blocks.0.attn.qkv.weight": (1 / 8, 0.3)}
    expected |= {"blocks.1.mlp.fc2.weight": (1 / 4, 0.3), "blocks.2.attn.proj.weight": (1 / 2, 0.3)}
    expected |= {"blocks.2.norm1.weight": (1 / 2, 0.0), "norm.weight": (1.0, 0.0)}
    expected |= {"head.weight": (1.0, 0.3), "head.bias": (1.0, 0.0)}
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("blocks", "learning"),
    [
        (0, ("head.",)),
        (0.5, ("head.", "fc_norm.", "blocks.2.norm2.", "blocks.2.mlp.")),
        (1, ("head.", "fc_norm.", "blocks.2.")),
        (2, ("head.", "fc_norm.", "blocks.1.", "blocks.2.")),
        (3, ("head.", "fc_norm.", "blocks.")),
    ],
)
def test_last_blocks(blocks, learning):
    encoder = tiny_encoder(global_pool=True, drop_path_rate=0.3)
    layers.train_last_blocks(encoder, blocks)
    for name, parameter in encoder.named_parameters():
        assert parameter.requires_grad == name.startswith(learning), name
    kept = [0.0, 0.15, 0.3][3 - int(blocks) :]
    assert [block.drop_path for block in encoder.blocks] == pytest.approx([0.0] * (3 - int(blocks)) + kept)


@pytest.mark.parametrize("blocks", [-1, 0.7, 1.5, 4])
def test_last_blocks_refuse(blocks):
    with pytest.raises(ValueError, match=r"blocks must be 0\.5 or a whole number from 0 to 3"):
        layers.train_last_blocks(tiny_encoder(), blocks)


def test_probe_standardises():
    """Identity weights give the features, centred and scaled over the batch, in float64."""
    probe = linprobe.LinearProbe(3, 3).double()
    assert not list(probe[0].parameters())
    probe[1].weight.data.copy_(torch.eye(3))
    x = torch.randn(7, 3, dtype=torch.float64) * 5 + 2
    torch.testing.assert_close(probe(x), (x - x.mean(dim=0)) / (x.var(dim=0, correction=0) + 1e-6).sqrt())


def test_probe_on_an_encoder(checkpoint):
    """The encoder stays in eval mode and has no gradients, whatever is asked of the model."""
    encoder = features.load_encoder(checkpoint, drop_rate=0.5)
    model = linprobe.ProbedEncoder(encoder, linprobe.LinearProbe(32, 2), "mean").train()
    imgs = images_for(small_mae(), 4)
    model(imgs).sum().backward()
    assert all(parameter.grad is None for parameter in encoder.parameters())
    torch.testing.assert_close(model(imgs), model.probe(small_mae().encode(imgs)[:, 1:].mean(dim=1)))


class Recorded(torch.optim.SGD):
    """What a step is taken with: learning rates, and the weight after it."""

    def __init__(self, groups):
        super().__init__(groups, lr=1.0)
        self.rates, self.weights = [], []

    def step(self):
        super().step()
        self.rates.append([group["lr"] for group in self.param_groups])
        self.weights.append(self.param_groups[0]["params"][0].detach().clone())


def test_fit_follows_the_recipe():
    """Five images in batches of two: two steps an epoch, one epoch of warm-up, two of cosine."""
    x, y = torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])
    model, seen = torch.nn.Linear(3, 2), []

    def batches(epoch, ids):
        seen.append(torch.cat(list(ids)).tolist())
        return batches_of(x, y)(epoch, ids)

    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.75))
    optimizer = Recorded([{"params": [model.weight], "lr_scale": 0.5}, {"params": [model.bias]}])
    recipe = supervised.Recipe(epochs=3, warmup_epochs=1, batch_size=2, blr=128.0, weight_decay=0.0, min_lr=0.25)
    epochs = list(supervised.fit(model, optimizer, batches, 5, recipe, average=average))
    cosine = [0.25 + 0.75 * 0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(4)]
    assert [rate for _, rate in optimizer.rates] == pytest.approx([0.0, 0.5, *cosine])
    assert [rate for rate, _ in optimizer.rates] == pytest.approx([0.0, 0.25, *(rate / 2 for rate in cosine)])
    assert [epoch.epoch for epoch in epochs] == [1, 2, 3]
    assert [epoch.lr for epoch in epochs] == pytest.approx([0.5, cosine[1], cosine[3]])
    assert [len(set(ids)) for ids in seen] == [4, 4, 4]
    assert len({tuple(ids) for ids in seen}) == 3
    first, *rest = optimizer.weights
    for weight in rest:
        first = 0.75 * first + 0.25 * weight
    torch.testing.assert_close(average.module.weight.detach(), first)
    predicted = (x @ model.weight.T + model.bias).argmax(dim=1)
    assert supervised.count_correct(model, batches_of(x, y), 5, batch_size=2) == int((predicted == y).sum())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 6}, "--batch_size must be at most 5"),
        ({"warmup_epochs": 3}, "--warmup_epochs must be at most --epochs, 2"),
        ({"lr": 1e30}, "the loss is "),
    ],
)
def test_fit_refuses(options, message):
    x, y = torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])
    recipe = supervised.Recipe(**{"epochs": 2, "warmup_epochs": 0, "batch_size": 1, "blr": 1.0, "weight_decay": 0.0} | options)
    model = torch.nn.Sequential(torch.nn.Linear(3, 9), torch.nn.Linear(9, 2))
    with pytest.raises(UserError, match=message):
        list(supervised.fit(model, torch.optim.SGD(model.parameters(), lr=1.0), batches_of(x, y), 5, recipe))
