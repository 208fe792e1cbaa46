"""Learning-rate schedules, stepped per iteration."""

import math


def warmup_cosine(step: int, steps: int, warmup: int, peak: float, floor: float = 0.0) -> float:
    """Return a learning rate: linear warm-up from 0 to `peak`, then half a cosine to `floor`.

    step    0 .. steps; the rate rises in the first `warmup` steps and is `floor` at step `steps`
    Raises ValueError if step or warmup lies outside 0 .. steps.
    """
    for name, value in (("warmup", warmup), ("step", step)):
        if not 0 <= value <= steps:
            raise ValueError(f"{name} must lie in 0..steps={steps}, it is {value}")
    if step < warmup:
        return peak * step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
