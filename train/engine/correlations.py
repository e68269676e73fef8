"""Pictures of what `dbpkern.diagnostics` has observed: correlations, losses, variances, conditioning."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor

from dbpkern import diagnostics


def _save(figure: Figure, path: str | Path | None) -> Figure:
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure


def plot_correlations(
    layers: Mapping[str, diagnostics.Layer],
    path: str | Path | None = None,
    limit: int = 8,
    features: int = 128,
) -> Figure:
    """Correlation matrices before and after R, side by side, one row a layer.

    Args:
        layers: what `observe` gave.
        path: file to save to, if any.
        limit: layers shown, spread evenly over the model.
        features: features shown of each layer, the first ones.

    Raises:
        ValueError: no layers.
    """
    names = list(layers)
    if not names:
        raise ValueError("plot_correlations: expected at least one layer, got none")
    if len(names) > limit:
        names = [names[round(i * (len(names) - 1) / max(limit - 1, 1))] for i in range(limit)]
    figure = Figure(layout="constrained", figsize=(6.4, 2.9 * len(names) + 0.4))
    axes = figure.subplots(len(names), 2, squeeze=False)
    for (left, right), name in zip(axes, names, strict=True):
        layer = layers[name]
        for axis, matrix, title in (
            (left, layer.before, f"{name}\nx: {layer.correlation_before:.3f}"),
            (right, layer.after, f"{name}\nz = R x: {layer.correlation_after:.3f}"),
        ):
            part = diagnostics.correlations(matrix)[:features, :features].cpu().numpy()
            image = axis.imshow(part, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
            axis.set_title(title, fontsize=8)
            axis.set_xticks([])
            axis.set_yticks([])
    figure.colorbar(image, ax=axes.ravel().tolist(), shrink=0.6 / len(names) ** 0.5, label="correlation")
    figure.suptitle("Input correlations; the number is their root mean square", fontsize=9)
    return _save(figure, path)


def plot_layers(layers: Mapping[str, diagnostics.Layer], path: str | Path | None = None) -> Figure:
    """Decorrelation loss, mean variance and condition number of every layer, before and after R.

    Raises:
        ValueError: no layers.
    """
    if not layers:
        raise ValueError("plot_layers: expected at least one layer, got none")
    panels = {
        "decorrelation loss": ("loss_before", "loss_after"),
        "mean variance": ("variance_before", "variance_after"),
        "condition number": ("condition_before", "condition_after"),
    }
    figure = Figure(layout="constrained", figsize=(max(6.4, 0.35 * len(layers)), 8))
    axes = figure.subplots(len(panels), 1, sharex=True)
    for axis, (title, attributes) in zip(axes, panels.items(), strict=True):
        for attribute, label, marker in zip(attributes, ("x", "z = R x"), "o^", strict=True):
            values = [getattr(layer, attribute) for layer in layers.values()]
            axis.plot([v.mean().item() if isinstance(v, Tensor) else v for v in values], marker, label=label)
        axis.set_yscale("log")
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
    axes[0].legend()
    axes[-1].set_xticks(range(len(layers)), list(layers), rotation=90, fontsize=6)
    return _save(figure, path)


def plot_losses(
    history: Mapping[str, Mapping[int, float]], path: str | Path | None = None, title: str = ""
) -> Figure:
    """Decorrelation loss of every layer over the steps of a run.

    Args:
        history: for each layer, its loss by step.
        path: file to save to, if any.
        title: of the figure.

    Raises:
        ValueError: no layers.
    """
    if not history:
        raise ValueError("plot_losses: expected the losses of at least one layer, got none")
    figure = Figure(layout="constrained", figsize=(8, 4.8))
    axis = figure.subplots()
    colors = colormaps["viridis"]
    for i, (name, losses) in enumerate(history.items()):
        color = colors(i / max(len(history) - 1, 1))
        axis.plot(list(losses), list(losses.values()), color=color, label=name, linewidth=1.2)
    axis.set_yscale("log")
    axis.set_xlabel("step")
    axis.set_ylabel("decorrelation loss")
    axis.set_title(title, fontsize=9)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=6, ncols=2, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _save(figure, path)
