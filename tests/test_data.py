"""Images for training: every mode of file, broken files, splits and batches."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import turned_by
from PIL import Image

from maefast.train.baseline import normalised
from maefast.train.data.crops import centre_square
from maefast.train.data.decode import decode
from maefast.train.data.open import find_images
from maefast.train.data.splits import stratified_split
from maefast.train.demo.images import ImageSet, batches, centre_crops, digits, enough_per_class, image_folder, photographs
from maefast.train.errors import UserError
from maefast.train.optim import adamw
from maefast.train.schedule import warmup_cosine

COLOUR = (200, 100, 50)


def save(path: Path, image: Image.Image, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def read_image(path: Path, side: int, channels: int = 3) -> torch.Tensor:
    return decode(str(path), str(path), channels, (side, side), centre_square)


def solid(mode: str, colour: object, size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.new(mode, size, colour)


def palette() -> Image.Image:
    image = solid("P", 3)
    image.putpalette([0, 0, 0] * 3 + list(COLOUR))
    return image


@pytest.mark.parametrize(
    ("name", "image", "expected"),
    [
        ("rgb.png", solid("RGB", COLOUR), COLOUR),
        ("grey.png", solid("L", 77), (77, 77, 77)),
        ("palette.png", palette(), COLOUR),
        ("alpha.png", solid("RGBA", (*COLOUR, 51)), (244, 224, 214)),  # a fifth of the colour, four fifths of white
        ("grey_alpha.png", solid("LA", (55, 0)), (255, 255, 255)),
        ("ink.tiff", solid("CMYK", (55, 155, 205, 0)), COLOUR),
        ("binary.png", solid("1", 1), (255, 255, 255)),
    ],
)
def test_modes(tmp_path: Path, name: str, image: Image.Image, expected: tuple[int, int, int]) -> None:
    pixels = read_image(save(tmp_path / name, image), 8)
    assert pixels.dtype == torch.uint8
    assert torch.equal(pixels, torch.tensor(expected, dtype=torch.uint8)[:, None, None].expand(3, 8, 8))


@pytest.mark.parametrize(("dtype", "ending"), [("uint16", "png"), ("uint16", "tiff"), ("int32", "tiff"), ("float32", "tiff")])
def test_more_than_8_bits_fill_the_range(tmp_path: Path, dtype: str, ending: str) -> None:
    values = np.linspace(100, 4100, 16).round().astype(dtype).reshape(4, 4)  # 12 bits in a wider file
    pixels = read_image(save(tmp_path / f"a.{ending}", Image.fromarray(values)), 4)
    assert (pixels.float() - torch.linspace(0, 255, 16).reshape(4, 4)).abs().max() <= 1  # both roundings
    assert torch.equal(pixels[0], pixels[1])
    assert torch.equal(pixels[0], pixels[2])


def test_constant_16_bit_image(tmp_path: Path) -> None:
    assert read_image(save(tmp_path / "a.png", Image.fromarray(np.full((4, 4), 1234, np.uint16))), 4).max() == 0


def test_centre_square_of_a_wide_image(tmp_path: Path) -> None:
    image = solid("RGB", (255, 0, 0), (30, 10))
    image.paste((0, 0, 255), (10, 0, 20, 10))
    pixels = read_image(save(tmp_path / "wide.png", image), 10)
    assert torch.equal(pixels, torch.tensor([0, 0, 255], dtype=torch.uint8)[:, None, None].expand(3, 10, 10))


def test_camera_orientation_is_honoured(tmp_path: Path) -> None:
    image = solid("RGB", (0, 0, 0), (8, 8))
    image.paste((255, 255, 255), (0, 0, 8, 4))  # white on top
    pixels = read_image(save(tmp_path / "turned.png", image, exif=turned_by(3)), 8)  # by 180 degrees
    assert pixels[:, :4].max() == 0
    assert pixels[:, 4:].min() == 255


def make_folder(root: Path, per_class: dict[str, int]) -> None:
    for index, (name, count) in enumerate(per_class.items()):
        for i in range(count):
            save(root / name / f"{i}.png", solid("RGB", (10 * index, i, 0)))


def test_folder_skips_counts_and_names(tmp_path: Path) -> None:
    make_folder(tmp_path, {"train/cat": 5, "val/cat": 5, "train/dog": 10})
    whole = save(tmp_path / "train" / "cat" / "cut.jpg", Image.effect_noise((64, 64), 50)).read_bytes()
    (tmp_path / "train" / "cat" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "broken.PNG").write_bytes(b"not an image")
    (tmp_path / ".hidden.png").write_bytes(b"not an image")
    data = image_folder(tmp_path, 12, seed=0)
    assert data.images.shape == (20, 3, 12, 12)
    assert data.classes == ("cat", "dog")
    assert data.labels is not None
    assert data.labels.bincount().tolist() == [10, 10]
    assert torch.equal((data.images[:, 0, 0, 0] == 20).long(), data.labels)  # each picture has its own folder's label
    assert [Path(path).name for path, _ in data.skipped] == ["broken.PNG", "cut.jpg"]
    assert "cannot identify" in data.skipped[0][1]
    assert "truncated" in data.skipped[1][1]


def test_folder_limit_and_seed(tmp_path: Path) -> None:
    make_folder(tmp_path, {"a": 30})
    first, again, other = (image_folder(tmp_path, 4, seed=seed, limit=7).images for seed in (0, 0, 1))
    assert len(first) == len(other) == 7
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_one_image_is_too_few(tmp_path: Path) -> None:
    make_folder(tmp_path, {"a": 1})
    with pytest.raises(UserError, match=r"at least two readable images, .* 1 of 1 files could be read"):
        image_folder(tmp_path, 4, seed=0)


def test_output_inside_the_data_is_not_read(tmp_path: Path) -> None:
    make_folder(tmp_path, {"a": 2, "out": 3})
    assert [path.parent.name for path in find_images(tmp_path, exclude=tmp_path / "a" / ".." / "out")] == ["a", "a"]


def test_links_are_followed_once(tmp_path: Path) -> None:
    make_folder(tmp_path / "real", {"a": 2})
    (tmp_path / "real" / "a" / "up").symlink_to(tmp_path / "real")
    (tmp_path / "data").symlink_to(tmp_path / "real")
    assert len(find_images(tmp_path / "data")) == 2


def test_split_takes_from_every_class() -> None:
    labels = torch.tensor([0] * 10 + [1] * 5 + [-1] * 20)
    train, held_out = stratified_split(labels, 1 / 5, seed=3)
    assert sorted(train.tolist() + held_out.tolist()) == list(range(35))
    assert {label: (labels[held_out] == label).sum().item() for label in (0, 1, -1)} == {0: 2, 1: 1, -1: 4}
    assert not torch.equal(held_out, stratified_split(labels, 1 / 5, seed=4)[1])


def test_split_holds_out_one_of_two() -> None:
    assert [len(part) for part in stratified_split(torch.tensor([0, 0]), 1 / 5, seed=0)] == [1, 1]


def test_enough_per_class_drops_small_ones() -> None:
    labels = torch.tensor([0, 0, 0, 1, 2, 2, 2, -1])
    data = ImageSet(torch.zeros(8, 1, 2, 2), torch.tensor([0, 1, 3, 4, 5, 7]), torch.tensor([2, 6]), labels, ("a", "b", "c"))
    kept = enough_per_class(data, 2)
    assert kept is not None
    assert kept.labels is not None
    assert kept.classes == ("a", "c")
    assert kept.labels.tolist() == [0, 0, 0, -1, 1, 1, 1, -1]
    assert (kept.train.tolist(), kept.held_out.tolist()) == ([0, 1, 4, 5], [2, 6])
    assert enough_per_class(data, 3) is None


def test_digits() -> None:
    data = digits(seed=0)
    assert data.images.shape == (1797, 1, 8, 8)
    assert (data.images.min().item(), data.images.max().item()) == (0, 255)
    assert data.labels is not None
    assert data.labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]  # as scikit-learn's manual lists
    assert len(data.train) + len(data.held_out) == 1797
    assert len(data.held_out) == sum(round(n / 3) for n in data.labels.bincount().tolist())


def test_photographs_hold_out_their_own_pixels() -> None:
    data = photographs(64)
    assert data.images.shape[1:] == (3, 64, 64)
    assert len(data.train) > 1000
    assert len(data.held_out) > 100
    seen = {image.numpy().tobytes() for image in data.images[data.train][:, :, ::8, ::8]}
    assert not any(image.numpy().tobytes() in seen for image in data.images[data.held_out][:, :, ::8, ::8])


def test_batches_visit_every_image_once_a_pass() -> None:
    images = torch.arange(10, dtype=torch.uint8)[:, None, None, None].expand(10, 1, 4, 4)
    stream = batches(ImageSet(images, torch.arange(8), torch.arange(8, 10)), 4, 6, torch.Generator().manual_seed(0), flip=True)
    drawn = torch.cat([next(stream)[:, 0, 0, 0] for _ in range(4)]).tolist()
    assert [sorted(drawn[i : i + 8]) for i in (0, 8, 16)] == [list(range(8))] * 3
    assert drawn[:8] != drawn[8:16]


def test_batches_crop_and_flip() -> None:
    image = torch.arange(36, dtype=torch.uint8).reshape(1, 1, 6, 6)
    stream = batches(ImageSet(image, torch.tensor([0]), torch.tensor([0])), 4, 64, torch.Generator().manual_seed(0), flip=True)
    crops = {crop.numpy().tobytes() for crop in next(stream)}
    windows = [image[0, :, r : r + 4, c : c + 4] for r in range(3) for c in range(3)]
    assert crops <= {w.numpy().tobytes() for window in windows for w in (window.contiguous(), window.flip(-1))}
    assert len(crops) > 12  # of 18
    assert torch.equal(centre_crops(image, 4)[0], windows[4])


def test_normalised() -> None:
    images = torch.tensor([0, 255], dtype=torch.uint8).reshape(1, 2, 1, 1)
    assert normalised(images, {"mean": (0.5, 0.25), "std": (0.5, 0.25)}).flatten().tolist() == [-1.0, 3.0]


def test_schedule_by_hand() -> None:
    rates = [warmup_cosine(step, 8, 4, 2.0) for step in range(9)]
    half = math.sqrt(0.5)
    assert rates == pytest.approx([0.0, 0.5, 1.0, 1.5, 2.0, 1 + half, 1.0, 1 - half, 0.0], abs=1e-12)
    assert warmup_cosine(6, 8, 4, 2.0, floor=1.0) == pytest.approx(1.5)
    assert warmup_cosine(0, 8, 0, 2.0) == 2.0


@pytest.mark.parametrize(("step", "warmup", "name"), [(-1, 2, "step"), (9, 2, "step"), (0, 9, "warmup"), (0, -1, "warmup")])
def test_schedule_refuses(step: int, warmup: int, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must lie in 0"):
        warmup_cosine(step, 8, warmup, 1.0)


def test_weight_decay_groups() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
    model.frozen = torch.nn.Parameter(torch.ones(2, 2), requires_grad=False)
    optimizer = adamw(model, lr=0.5, weight_decay=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()  # no gradient: weight decay alone moves a parameter, by a factor of 1 - lr * decay
    after = dict(model.named_parameters())
    assert torch.allclose(after["0.weight"], before["0.weight"] * 0.95)
    for name in ("0.bias", "1.weight", "1.bias", "frozen"):
        assert torch.equal(after[name], before[name]), name
