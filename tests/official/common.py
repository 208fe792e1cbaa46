"""What both training scripts need: a folder of images, processes, learning rates, a log."""

import argparse
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Images(torch.utils.data.Dataset):
    """data_path/<class>/*.png, resized and normalised."""

    def __init__(self, data_path: Path, input_size: int):
        self.input_size = input_size
        self.classes = sorted(folder.name for folder in data_path.iterdir())
        self.files = [(file, i) for i, name in enumerate(self.classes) for file in sorted((data_path / name).glob("*.png"))]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        file, label = self.files[index]
        picture = Image.open(file).convert("RGB").resize((self.input_size, self.input_size), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
        return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1), label


def arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parses the options of one script together with those that both have."""
    parser.add_argument("--model", required=True)
    parser.add_argument("--sizes", type=json.loads, default={}, help="further arguments of the model, as JSON")
    parser.add_argument("--input_size", type=int, default=224)
    parser.add_argument("--data_path", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--accum_iter", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--warmup_epochs", type=float, default=0.5)
    parser.add_argument("--blr", type=float, default=1e-3)
    parser.add_argument("--weight_decay", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no_amp", action="store_true")
    parser.add_argument("--world_size", type=int, default=1)
    parser.add_argument("--dist_url", default="")
    parser.add_argument("--find_unused_parameters", action="store_true")
    return parser.parse_args()


def init_processes(args: argparse.Namespace) -> None:
    """One process group where --dist_url is given; seeds differ from rank to rank."""
    args.rank = int(os.environ.get("RANK", 0))
    if args.dist_url:
        dist.init_process_group("gloo", init_method=args.dist_url, world_size=args.world_size, rank=args.rank)
    torch.manual_seed(args.seed + args.rank)


def wrapped(model: torch.nn.Module, args: argparse.Namespace) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The model to train with, and the one below it that has the methods and names."""
    if not args.dist_url:
        return model, model
    model = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=args.find_unused_parameters)
    return model, model.module


def batches(data: Images, args: argparse.Namespace, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of the images, in the order of the epoch."""
    sampler = torch.utils.data.DistributedSampler(data, args.world_size, args.rank, seed=args.seed)
    sampler.set_epoch(epoch)
    return iter(torch.utils.data.DataLoader(data, args.batch_size, sampler=sampler, drop_last=True))


def adjust_learning_rate(optimizer: torch.optim.Optimizer, epoch: float, args: argparse.Namespace) -> None:
    """Linear warm-up, then half a cosine, in fractions of an epoch; a group's `lr_scale` multiplies it."""
    peak = args.blr * args.batch_size * args.accum_iter * args.world_size / 256
    if epoch < args.warmup_epochs:
        lr = peak * epoch / args.warmup_epochs
    else:
        lr = peak * 0.5 * (1 + math.cos(math.pi * (epoch - args.warmup_epochs) / (args.epochs - args.warmup_epochs)))
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def log(args: argparse.Namespace, **record: object) -> None:
    with (args.output_dir / f"log-{args.rank}.txt").open("a") as file:
        file.write(json.dumps(record) + "\n")
