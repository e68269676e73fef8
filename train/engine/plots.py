"""The pictures of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.utils import make_grid

WINDOW = 50  # steps over which training losses are averaged
NAMED = 30  # classes whose names fit on the axes of a confusion matrix
WRITTEN = 16  # classes for whose figures there is room in it
CELLS = 250  # rows and columns that it has at most


def trailing_mean(values: Sequence[float], window: int = WINDOW) -> list[float]:
    """Mean of each value and up to `window - 1` before it; shorter at the start."""
    sums = torch.tensor([0.0, *values], dtype=torch.float64).cumsum(0)
    ends = torch.arange(1, len(values) + 1)
    starts = (ends - window).clamp(min=0)
    return ((sums[ends] - sums[starts]) / (ends - starts)).tolist()


def plot_curves(records: Sequence[Mapping[str, Any]], path: Path) -> None:
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


def plot_accuracy(records: Sequence[Mapping[str, Any]], figures: Mapping[str, str], path: Path) -> None:
    """Figures of a log over the steps of a run, in per cent, by the names that the plot gives them."""
    evals = [r for r in records if r["kind"] == "eval"]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    for name, label in figures.items():
        axis.plot([r["step"] for r in evals], [r[name] for r in evals], "o-", ms=3, label=label)
    axis.set_xlabel("step")
    axis.set_ylabel("held-out accuracy, %")
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def colour_table() -> Tensor:
    """A colour for each label of a mask, uint8 [256, 3]: those of PASCAL VOC, black for the last, IGNORE."""
    # In PASCAL VOC black is the first. The bits of a number go in turn to red, green and blue, the lowest to
    # the highest bit of the colour.
    numbers = torch.arange(1, 257)[:, None, None] % 256
    bits = torch.arange(8)[:, None] * 3 + torch.arange(3)
    return ((numbers >> bits & 1) << torch.arange(7, -1, -1)[:, None]).sum(1).to(torch.uint8)


def confusion_figure(counts: Tensor, classes: Sequence[str], unit: str = "images") -> Figure:
    """How often what is of each class was taken for which.

    Args:
        counts: Images or pixels by class and by the class they were taken for [C, C].
        classes: Names of the classes, which are on the axes if there are at most `NAMED`; their numbers
            otherwise. Up to `WRITTEN`, the figures are in the cells, too; above `CELLS`, a cell has the
            largest figure of several classes.
        unit: What is counted.
    """
    count = len(classes)
    share = 100 * counts / counts.sum(1, keepdim=True).clamp(min=1)
    side = min(max(5.0, 0.32 * count + 2), 11.0)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axis = figure.subplots()
    cells = F.adaptive_max_pool2d(share.float()[None], min(count, CELLS))[0]
    # Where there are many classes, what a class is taken for is a few per cent here and there.
    norm = PowerNorm(1 if count <= NAMED else 0.4, vmin=0, vmax=100)
    edges = (-0.5, count - 0.5, count - 0.5, -0.5)
    picture = axis.imshow(cells.cpu().numpy(), norm=norm, cmap="Blues", extent=edges)
    figure.colorbar(picture, ax=axis, label=f"% of the {unit} of a class", shrink=0.8)
    axis.set_ylabel("class")
    axis.set_xlabel("taken for")
    if count <= NAMED:
        names = [name if len(name) <= 20 else f"{name[:19]}…" for name in classes]
        axis.set_xticks(range(count), names, rotation=90 if max(map(len, names)) > 2 else 0, fontsize=8)
        axis.set_yticks(range(count), names, fontsize=8)
    if count <= WRITTEN:
        for row, values in enumerate(share.tolist()):
            for column, value in enumerate(values):
                if value:
                    color = "white" if value > 50 else "black"
                    axis.text(column, row, f"{value:.0f}", ha="center", va="center", color=color, fontsize=7)
    return figure


def as_picture(figure: Figure) -> Tensor:
    """A figure as an image `[3, H, W]` with values in [0, 1]."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8)
    width, height = canvas.get_width_height()
    return pixels.view(height, width, 4)[..., :3].permute(2, 0, 1) / 255
