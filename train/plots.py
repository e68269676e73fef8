"""The pictures of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.utils import make_grid

WINDOW = 50  # steps over which training losses are averaged


def trailing_mean(values: Sequence[float], window: int = WINDOW) -> list[float]:
    """Mean of each value and up to `window - 1` before it; shorter at the start."""
    sums = torch.tensor([0.0, *values], dtype=torch.float64).cumsum(0)
    ends = torch.arange(1, len(values) + 1)
    starts = (ends - window).clamp(min=0)
    return ((sums[ends] - sums[starts]) / (ends - starts)).tolist()


def plot_curves(records: Sequence[Mapping], path: Path) -> None:
    """Training and held-out loss and the learning rate over the steps of a run."""
    steps = [r for r in records if r["kind"] == "step"]
    evals = [r for r in records if r["kind"] == "eval" and r["heldout_loss"] is not None]
    figure = Figure(figsize=(8, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    x = [r["step"] for r in steps]
    losses = [r["loss"] for r in steps]
    top.plot(x, losses, color="tab:blue", alpha=0.25, linewidth=0.8, label="training")
    top.plot(x, trailing_mean(losses), color="tab:blue", label=f"training, mean of {WINDOW} steps")
    top.plot(
        [r["step"] for r in evals],
        [r["heldout_loss"] for r in evals],
        "o-",
        ms=3,
        color="tab:orange",
        label="held out",
    )
    if losses:
        # The first steps' losses would squeeze the rest into a line.
        top.set_ylim(min(losses) * 0.97, sorted(losses)[int(0.97 * (len(losses) - 1))] * 1.05)
    top.set_ylabel("loss")
    top.legend()
    top.grid(alpha=0.3)
    bottom.plot(x, [r["lr"] for r in steps], color="tab:gray")
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("step")
    bottom.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def image_grid(rows: Mapping[str, Tensor]) -> Tensor:
    """One picture `[3, H, W]` with a column an image, of rows `[B, 3, h, w]` with values in [0, 1]."""
    images = [row.clamp(0, 1) for row in rows.values()]
    return make_grid(torch.cat(images), nrow=len(images[0]), padding=2, pad_value=1.0)


def save_image_grid(rows: Mapping[str, Tensor], path: Path) -> None:
    """Write what `image_grid` makes, with its rows labelled by their names."""
    grid = image_grid(rows)
    height, width = grid.shape[-2:]
    figure = Figure(figsize=(9, 9 * height / width + 0.3), layout="constrained")
    axis = figure.subplots()
    axis.imshow(grid.permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
    ticks = [(i + 0.5) * height / len(rows) for i in range(len(rows))]
    few = len(rows) < 4  # where there is room beside a row to write upwards
    axis.set_yticks(ticks, rows, rotation=90 if few else 0, va="center")
    axis.set_xticks([])
    axis.tick_params(length=0)
    figure.savefig(path, dpi=120)
