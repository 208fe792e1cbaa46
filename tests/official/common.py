"""What both training scripts need: a folder of images, processes, learning rates, a log."""

import argparse
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]  # images and labels to the loss
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
    """Parse a script's options and the common ones; join the process group, make the folder."""
    parser.add_argument("--model", required=True)
    parser.add_argument("--sizes", type=json.loads, default={}, help="further arguments of the model, as JSON")
    for name in ("data_path", "output_dir"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    numbers = {"input_size": 224, "batch_size": 8, "accum_iter": 1, "epochs": 2, "warmup_epochs": 0.5, "blr": 1e-3}
    for name, default in (numbers | {"weight_decay": 0.05, "seed": 0, "world_size": 1, "dist_url": ""}).items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    for name in ("no_amp", "find_unused_parameters"):
        parser.add_argument(f"--{name}", action="store_true")
    args = parser.parse_args()
    args.rank = int(os.environ.get("RANK", 0))
    if args.dist_url:
        dist.init_process_group("gloo", init_method=args.dist_url, world_size=args.world_size, rank=args.rank)
    torch.manual_seed(args.seed + args.rank)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    return args


def wrapped(model: torch.nn.Module, args: argparse.Namespace) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return the model to train with, and the one below it that has the methods and names."""
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
    """Linear warm-up, then half a cosine, times a group's `lr_scale`; `epoch` has fractions."""
    peak = args.blr * args.batch_size * args.accum_iter * args.world_size / 256
    if epoch < args.warmup_epochs:
        lr = peak * epoch / args.warmup_epochs
    else:
        lr = peak * 0.5 * (1 + math.cos(math.pi * (epoch - args.warmup_epochs) / (args.epochs - args.warmup_epochs)))
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def train(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Images,
    args: argparse.Namespace,
    loss_of: Loss,
    with_norm: bool,
) -> torch.amp.GradScaler:
    """Train in fp16, or fp32 by --no_amp; log losses, scales and, `with_norm`, gradient norms."""
    scaler = torch.amp.GradScaler("cpu", enabled=not args.no_amp)
    for epoch in range(args.epochs):
        model.train()
        optimizer.zero_grad()
        steps = len(data) // args.world_size // args.batch_size
        for i, (samples, targets) in enumerate(batches(data, args, epoch)):
            if i % args.accum_iter == 0:
                adjust_learning_rate(optimizer, epoch + i / steps, args)
            with torch.autocast("cpu", torch.float16, enabled=not args.no_amp):
                loss = loss_of(samples, targets)
            value = loss.item()
            if not math.isfinite(value):
                raise SystemExit(f"the loss is {value}")
            loss /= args.accum_iter
            scaler.scale(loss).backward()
            log(args, loss=value)
            if (i + 1) % args.accum_iter == 0:
                norm = {}
                if with_norm:
                    scaler.unscale_(optimizer)
                    norm["grad_norm"] = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf).item()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                log(args, **norm, scale=scaler.get_scale())
    return scaler


def log(args: argparse.Namespace, **record: object) -> None:
    with (args.output_dir / f"log-{args.rank}.txt").open("a") as file:
        file.write(json.dumps(record) + "\n")
