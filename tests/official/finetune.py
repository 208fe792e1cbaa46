"""Fine-tuning and linear probing as scripts around the official repository do them."""

import argparse
from pathlib import Path

import models_vit
import torch
import torch.nn.functional as F
from common import Images, arguments, log, train, wrapped


def interpolate_positions(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Fit a checkpoint's positions, on a square grid, to the model; extra tokens keep theirs."""
    positions = weights["pos_embed"]
    extra = model.pos_embed.shape[-2] - model.patch_embed.num_patches
    old, new = (int(count**0.5) for count in (positions.shape[-2] - extra, model.patch_embed.num_patches))
    if old == new:
        return
    grid = positions[:, extra:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    weights["pos_embed"] = torch.cat([positions[:, :extra], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def layer_of(name: str, layers: int) -> int:
    """Return 0 before the blocks, 1 and up for these, the last number behind them."""
    if name in ("cls_token", "pos_embed") or name.startswith("patch_embed"):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks") else layers


def layer_decay_groups(model: torch.nn.Module, weight_decay: float, layer_decay: float) -> list[dict[str, object]]:
    """Group by layer and decay; a layer learns at `layer_decay` times the rate of the next."""
    layers = len(model.blocks) + 1
    groups: dict[tuple[int, bool], dict[str, object]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decayed, layer = parameter.ndim > 1 and name not in model.no_weight_decay(), layer_of(name, layers)
            empty = {"lr_scale": layer_decay ** (layers - layer), "weight_decay": weight_decay * decayed, "params": []}
            groups.setdefault((layer, decayed), empty)["params"].append(parameter)
    return list(groups.values())


@torch.no_grad()
def evaluate(model: torch.nn.Module, data: Images, args: argparse.Namespace) -> tuple[list[list[float]], float]:
    """Return the logits of all images, and the accuracy."""
    model.eval()
    logits, correct = [], 0
    for images, targets in torch.utils.data.DataLoader(data, args.batch_size):
        with torch.autocast("cpu", torch.float16, enabled=not args.no_amp):
            output = model(images)
        logits += output.tolist()
        correct += int((output.argmax(dim=1) == targets).sum())
    return logits, correct / len(data)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--finetune", type=Path, required=True)
    parser.add_argument("--nb_classes", type=int, required=True)
    parser.add_argument("--global_pool", action="store_true")
    parser.add_argument("--drop_path", type=float, default=0.1)
    parser.add_argument("--layer_decay", type=float, default=0.75)
    parser.add_argument("--linear_probe", action="store_true")
    args = arguments(parser)
    options = {"num_classes": args.nb_classes, "global_pool": args.global_pool, "img_size": args.input_size}
    drop_path = 0.0 if args.linear_probe else args.drop_path
    model = models_vit.__dict__[args.model](**options, drop_path_rate=drop_path, **args.sizes)
    # The file is one's own: it holds the Namespace of its arguments too.
    weights = torch.load(args.finetune, map_location="cpu", weights_only=False)["model"]
    own = model.state_dict()
    for name in ("head.weight", "head.bias"):
        if name in weights and weights[name].shape != own[name].shape:
            del weights[name]
    interpolate_positions(model, weights)
    report = model.load_state_dict(weights, strict=False)
    expected = {"head.weight", "head.bias"} | ({"fc_norm.weight", "fc_norm.bias"} if args.global_pool else set())
    assert set(report.missing_keys) == expected, report.missing_keys
    torch.nn.init.trunc_normal_(model.head.weight, std=0.01 if args.linear_probe else 2e-5)
    if args.linear_probe:
        model.head = torch.nn.Sequential(torch.nn.BatchNorm1d(model.head.in_features, affine=False, eps=1e-6), model.head)
        for name, parameter in model.named_parameters():
            parameter.requires_grad = name.startswith("head.")

    model, model_without_ddp = wrapped(model, args)
    if args.linear_probe:
        optimizer = torch.optim.SGD(model_without_ddp.head.parameters(), lr=0.0, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(layer_decay_groups(model_without_ddp, args.weight_decay, args.layer_decay), lr=0.0)
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=0.0 if args.linear_probe else 0.1)
    data = Images(args.data_path, args.input_size)
    train(model, optimizer, data, args, lambda samples, targets: criterion(model(samples), targets), with_norm=False)
    logits, accuracy = evaluate(model, data, args)
    log(args, logits=logits, accuracy=accuracy)


if __name__ == "__main__":
    main()
