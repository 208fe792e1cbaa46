"""Pre-training as scripts around the official repository do it, written against its API."""

import argparse

import models_mae
import torch
from common import Images, arguments, train, wrapped


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Biases and one-dimensional parameters are not decayed."""
    decay, no_decay = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (no_decay if parameter.ndim <= 1 or name.endswith(".bias") else decay).append(parameter)
    return [{"params": no_decay, "weight_decay": 0.0}, {"params": decay, "weight_decay": weight_decay}]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mask_ratio", type=float, default=0.75)
    parser.add_argument("--norm_pix_loss", action="store_true")
    args = arguments(parser)
    model = models_mae.__dict__[args.model](img_size=args.input_size, norm_pix_loss=args.norm_pix_loss, **args.sizes)
    model, model_without_ddp = wrapped(model, args)
    optimizer = torch.optim.AdamW(parameter_groups(model_without_ddp, args.weight_decay), lr=0.0, betas=(0.9, 0.95))

    def loss_of(samples: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return model(samples, mask_ratio=args.mask_ratio)[0]

    scaler = train(model, optimizer, Images(args.data_path, args.input_size), args, loss_of, with_norm=True)
    if args.rank == 0:
        content = {"model": model_without_ddp.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        torch.save({**content, "epoch": args.epochs - 1, "args": args}, args.output_dir / "checkpoint.pth")


if __name__ == "__main__":
    main()
