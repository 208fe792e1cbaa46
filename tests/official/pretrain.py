"""Pre-training as scripts around the official repository do it, written against nothing but its API."""

import argparse
import math

import models_mae
import torch
from common import Images, adjust_learning_rate, arguments, batches, init_processes, log, wrapped


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Biases and one-dimensional parameters are not decayed."""
    decay, no_decay = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        (no_decay if parameter.ndim <= 1 or name.endswith(".bias") else decay).append(parameter)
    return [{"params": no_decay, "weight_decay": 0.0}, {"params": decay, "weight_decay": weight_decay}]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mask_ratio", type=float, default=0.75)
    parser.add_argument("--norm_pix_loss", action="store_true")
    args = arguments(parser)
    init_processes(args)
    args.output_dir.mkdir(parents=True, exist_ok=True)

    model = models_mae.__dict__[args.model](img_size=args.input_size, norm_pix_loss=args.norm_pix_loss, **args.sizes)
    model, model_without_ddp = wrapped(model, args)
    optimizer = torch.optim.AdamW(parameter_groups(model_without_ddp, args.weight_decay), lr=0.0, betas=(0.9, 0.95))
    scaler = torch.amp.GradScaler("cpu", enabled=not args.no_amp)
    data = Images(args.data_path, args.input_size)

    for epoch in range(args.epochs):
        model.train()
        optimizer.zero_grad()
        steps = len(data) // args.world_size // args.batch_size
        for i, (samples, _) in enumerate(batches(data, args, epoch)):
            if i % args.accum_iter == 0:
                adjust_learning_rate(optimizer, epoch + i / steps, args)
            with torch.autocast("cpu", torch.float16, enabled=not args.no_amp):
                loss, _, _ = model(samples, mask_ratio=args.mask_ratio)
            value = loss.item()
            if not math.isfinite(value):
                raise SystemExit(f"the loss is {value}")
            loss /= args.accum_iter
            scaler.scale(loss).backward()
            log(args, loss=value)
            if (i + 1) % args.accum_iter == 0:
                scaler.unscale_(optimizer)
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                log(args, grad_norm=norm.item(), scale=scaler.get_scale())
    if args.rank == 0:
        content = {"model": model_without_ddp.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        torch.save({**content, "epoch": epoch, "args": args}, args.output_dir / "checkpoint.pth")


if __name__ == "__main__":
    main()
