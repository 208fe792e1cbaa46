"""One training step, batch and all: forward, backward, fused AdamW, gradients set to None."""

import pytest
import torch
from rotation import ReplayClock
from stepbench import Size, StepWorkload

CLOCK = ReplayClock()
DECODER = {"decoder_embed_dim": 512, "decoder_depth": 8, "decoder_num_heads": 16}
TINY = Size(16, 96, 16, 192, 2, 3, decoder_embed_dim=128, decoder_depth=1, decoder_num_heads=4)
CPU = {"vit_b16": Size(16, 224, 16, 768, 12, 12, **DECODER)}
GPU = {
    "vit_b16": Size(1024, 224, 16, 768, 12, 12, **DECODER),
    "vit_b16_batch8": Size(8, 224, 16, 768, 12, 12, **DECODER),
    "vit_l16": Size(512, 224, 16, 1024, 24, 16, **DECODER),
    "vit_h14": Size(256, 224, 14, 1280, 32, 16, **DECODER),
}


def workloads(full: bool, device: torch.device) -> list[StepWorkload]:
    if not full:
        return [StepWorkload("tiny", TINY, "fp32", device)]
    sizes = GPU if device.type == "cuda" else CPU
    return [StepWorkload(label, size, variant, device) for label, size in sizes.items() for variant in ("fp32", "bf16")]


@pytest.mark.benchmark(timer=CLOCK)
def test_step(benchmark, replay, workload, contender):
    replay(benchmark, CLOCK, workload, contender)
