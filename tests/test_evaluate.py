"""Evaluation: features, k-NN, LARS and the linear probe, by paper and pencil and on a data set in memory."""

import numpy as np
import pytest
import torch
from support import images_for, small_mae

from maefast import VisionTransformer
from maefast.train import UserError, features, knn, views
from maefast.train.lars import LARS


class Stripes:
    """Pictures in memory: of class 0 horizontal stripes, of class 1 vertical ones, with noise."""

    classes, channels = ("lying", "standing"), 3

    def __init__(self, count: int = 24, channels: int = 3, seed: int = 0):
        self.channels = channels
        self.labels = torch.arange(count) % 2
        generator = torch.Generator().manual_seed(seed)
        wave = ((torch.arange(64) // 4) % 2 * 160).expand(channels, 64, 64)
        pictures = torch.stack([wave if label else wave.mT for label in self.labels.tolist()])
        self.pictures = (pictures + torch.randint(90, pictures.shape, generator=generator)).to(torch.uint8)

    def __len__(self):
        return len(self.pictures)

    def read(self, index, size=None, box=None):
        left, top, right, bottom = (0, 0, 64, 64) if box is None else map(round, box(64, 64))
        picture = self.pictures[index, :, top:bottom, left:right]
        assert size is None or picture.shape[1:] == size
        return picture


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


def test_views():
    assert views.centred((2, 1)).box(100, 80) == (15, 0, 65, 100)
    assert views.centred((1, 1), 0.5).box(100, 80) == (20, 30, 60, 70)
    quarter = views.random_resized((50, 50), torch.tensor([0.17 / 0.92, 0.5, 0.5, 1.0, 0.7]))  # area 0.08 + 0.17
    assert quarter.box(100, 100) == pytest.approx((25, 50, 75, 100), abs=1e-4)
    assert not quarter.flip
    wide = views.random_resized((50, 100), torch.tensor([1.0, 0.5, 0.3, 0.5, 0.2]))  # all of the area, twice as wide as high
    assert wide.box(100, 100) == pytest.approx((0, 50 - 50 / 2**0.5, 100, 50 + 50 / 2**0.5), abs=1e-4)
    assert wide.flip


def test_views_of_a_batch():
    data, size = Stripes(3), (64, 64)
    mirrored = iter([False, True, False])
    (imgs, labels), (last, _) = views.read_batches(
        data, [torch.tensor([2, 1]), torch.tensor([0])], size, lambda: views.centred(size)._replace(flip=next(mirrored))
    )
    assert torch.equal(imgs, torch.stack([data.pictures[2], data.pictures[1].flip(-1)]))
    assert labels.tolist() == [0, 1]
    assert torch.equal(last[0], data.pictures[0])


@pytest.mark.parametrize(("kind", "shape"), [("cls", (32,)), ("mean", (32,)), ("all", (25, 32))])
def test_features_in_files(checkpoint, tmp_path, kind, shape):
    mae, data = small_mae(), Stripes(5)
    expected = mae.encode(data.pictures[:, :, :, 8:56]).detach()
    expected = {"cls": expected[:, 0], "mean": expected[:, 1:].mean(dim=1), "all": expected}[kind]
    encoder = features.load_encoder(checkpoint)

    def write(name):
        batches = features.features_of(encoder, data, kind, batch_size=2)
        features.write_features(batches, len(data), shape, tmp_path / name)

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


def test_a_broken_image_stops_the_reading():
    data = Stripes(9)
    data.read = lambda index, size, box: (_ for _ in ()).throw(UserError("7.png is broken")) if index == 7 else torch.zeros(1)
    seen = []
    with pytest.raises(UserError, match=r"7\.png"):
        seen.extend(views.read_batches(data, torch.arange(9).split(2), (64, 64), lambda: views.centred((1, 1))))
    assert [len(labels) for _, labels in seen] == [2, 2, 2]


def test_votes_by_hand():
    """Three neighbours at 0, 60 and 90 degrees: similarities 1, 1/2 and 0, whatever the lengths; the fourth is out of reach."""
    bank = torch.tensor([[2.0, 0.0], [0.5, 3**0.5 / 2], [0.0, 7.0], [-1.0, 0.0]], dtype=torch.float64)
    query = torch.tensor([[5.0, 0.0]], dtype=torch.float64)
    votes = knn.knn_votes(bank, torch.tensor([2, 0, 2, 1]), query, 3, k=3, temperature=0.5)
    e = torch.tensor(1.0, dtype=torch.float64).exp()
    torch.testing.assert_close(votes, torch.stack([1 / e, 0 * e, 1 + e**-2])[None])
    many = torch.randn(70, 2, dtype=torch.float64)
    in_parts, at_once = (knn.knn_votes(bank, torch.tensor([2, 0, 2, 1]), many, 3, k=2, batch_size=size) for size in (16, 99))
    torch.testing.assert_close(in_parts, at_once)


def test_votes_outweigh_the_majority():
    """Two far neighbours of one class against a near one: nearness wins at a low temperature, the majority at a high one."""
    bank, labels = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0]]), torch.tensor([0, 1, 1])
    query = torch.tensor([[1.0, 0.1]])
    winners = [knn.knn_votes(bank, labels, query, 2, k=3, temperature=t).argmax().item() for t in (0.07, 10.0)]
    assert winners == [0, 1]


@pytest.mark.parametrize(("options", "message"), [({"k": 5}, "k must lie in 1..4"), ({"temperature": 0}, "temperature must be")])
def test_votes_refuse(options, message):
    with pytest.raises(ValueError, match=message):
        knn.knn_votes(torch.ones(4, 2), torch.zeros(4, dtype=torch.long), torch.ones(1, 2), 2, **{"k": 1} | options)


def test_lars_by_formula():
    """Two steps in float64; a zero weight and a bias take plain momentum steps, without decay for the bias."""
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
