"""Learning-rate schedules, stepped per iteration."""

import math


def warmup_cosine(step: int, steps: int, warmup: int, peak: float, floor: float = 0.0) -> float:
    """The learning rate of one step: a linear warm-up from 0 to `peak`, then half a cosine down to `floor`.

    step    0 .. steps-1; the first `warmup` of them rise, `floor` would be reached at step `steps`
    Raises ValueError when step or warmup lie outside the run.
    """
    if not 0 <= warmup <= steps:
        raise ValueError(f"warmup must lie in 0..steps={steps}, it is {warmup}")
    if not 0 <= step <= steps:
        raise ValueError(f"step must lie in 0..steps={steps}, it is {step}")
    if step < warmup:
        return peak * step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
