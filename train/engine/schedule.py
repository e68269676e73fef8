"""The learning rate over a run."""

import math


def warmup_cosine(step: int, total: int, warmup: int, peak: float, floor: float = 0.0) -> float:
    """Rate for `step`: linear from 0 to `peak` over `warmup` steps, then half a cosine down to `floor`.

    Per step rather than per epoch, as in MAE (arXiv 2111.06377).
    """
    if step < warmup:
        return peak * step / warmup
    progress = (step - warmup) / max(total - warmup, 1)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def warmup_linear(step: int, total: int, warmup: int, peak: float, floor: float = 0.0) -> float:
    """Rate for `step`: linear from 0 to `peak` over `warmup` steps, then linear down to `floor`.

    That is polynomial decay of power 1, as mmsegmentation's recipes for ViTs have it.
    """
    if step < warmup:
        return peak * step / warmup
    progress = (step - warmup) / max(total - warmup, 1)
    return floor + (peak - floor) * (1 - min(progress, 1.0))
