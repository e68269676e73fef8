"""The report of a study: report.md, report.json and plots beside its results."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure

from bench import record
from bench.experiments.figures import BASE, ENOUGH, RIVALS, StudyFigures
from bench.experiments.study import LOSSES
from bench.experiments.trial import FIGURES, PROBES
from train.engine.plots import WINDOW
from train.engine.run_folder import to_json, write_atomically

CROWD = 8  # arms whose names still fit among their curves
# Shown above a family of ablations: the arm that they change, and another.
BESIDE = {"decor-muon": ("decor-muon", "muon")}


def _decides(figures: StudyFigures) -> str:
    """What chooses the best rate, in words."""
    named = {"loss": "final training loss", "heldout_loss": "held-out loss at the end"}
    decides = figures.preset.decides
    return named[decides] if decides in named else f"{FIGURES[decides]} at the end, %"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _mean_cell(found: Mapping[str, float | None], form: str = ".4f") -> str:
    spread = "" if found["spread"] is None else f" ({found['spread']:{form}})"
    return _number(found["mean"], form) + spread


def _last_cell(by_step: Mapping[int, Mapping], form: str = ".4f") -> str:
    return _mean_cell(by_step[max(by_step)], form) if by_step else "-"


def _quartiles_cell(found: Mapping[str, float] | None, scale: float, form: str) -> str:
    if found is None:
        return "-"
    low, median, high = (f"{found[key] * scale:{form}}" for key in ("low", "median", "high"))
    return f"{median} [{low}, {high}]"


def _cost_cell(figures: StudyFigures, row: Mapping, key: str, form: str) -> str:
    """What an arm needed to reach the target, and the ratio to what AdamW needed."""
    if figures.target is None:
        return "-"
    if row["steps_to_target"] is None:
        return "not reached"
    value, base = row[key], figures.rows[BASE][key]
    ratio = "" if value is None or base is None else f" ({value / base:.0%})"
    return _number(value, form) + ratio


def _lr_cell(row: Mapping) -> str:
    if row["lr"] is None:
        return "all diverged"
    missing = f", {row['missing_lrs']} rates missing" if row["missing_lrs"] else ""
    return f"{row['lr']:g}" + ("" if row["edge"] is None else f", {row['edge']} tried") + missing


def _seeds_cell(row: Mapping) -> str:
    notes = [f"{row['diverged']} diverged"] if row["diverged"] else []
    notes += [f"fewer than {ENOUGH}"] if row["few_seeds"] else []
    return f"{len(row['seeds'])}" + (f" ({', '.join(notes)})" if notes else "")


def _steps_cell(by_seed: Mapping[int, int | None]) -> str:
    return ", ".join("not reached" if steps is None else str(steps) for steps in by_seed.values()) or "-"


def _table(figures: StudyFigures, names: Iterable[str], columns: Mapping[str, Callable]) -> str:
    """Rows of arms as Markdown; a column is made of the row of an arm."""
    rows = [[cell(figures.rows[name]) for cell in columns.values()] for name in names]
    return record.table(list(columns), rows)


def arms_table(figures: StudyFigures, names: Iterable[str]) -> str:
    """What the arms end at as Markdown: losses and steps to the target, or figures of the task."""
    columns = {"arm": lambda row: row["title"], "best rate": _lr_cell, "seeds": _seeds_cell}
    names = list(names)
    if figures.preset.pretrains:
        columns |= {
            "final loss": lambda row: _mean_cell(row["final_loss"]),
            "held out": lambda row: _last_cell(row["heldout_loss"]),
            "probe": lambda row: _last_cell(row["probe"], ".3f"),
            "steps to target": lambda row: _cost_cell(figures, row, "steps_to_target", "d"),
            "by seed": lambda row: _steps_cell(row["steps_by_seed"]),
        }
        return _table(figures, names, columns)
    decides, title = figures.preset.decides, FIGURES[figures.preset.decides]
    early = sorted({step for name in names for step in figures.rows[name][decides]})[1:2]
    columns |= {
        "images of pre-training": lambda row: _number(row.get("pretrained_images"), ","),
        "its loss": lambda row: _number(row.get("pretraining_loss"), ".4f"),
    }
    for step in early:
        heading = f"{title} after {step} steps, %"
        columns[heading] = lambda row, step=step: (
            _mean_cell(row[decides][step], ".1f") if step in row[decides] else "-"
        )
    columns |= {
        f"{title} at the end, %": lambda row: _last_cell(row[decides], ".2f"),
        "held out": lambda row: _last_cell(row["heldout_loss"]),
    }
    return _table(figures, names, columns)


def heldout_table(figures: StudyFigures, names: Iterable[str]) -> str:
    """Held-out losses, and the steps to those that the rivals end at, as Markdown."""

    def part(rival: str, row: Mapping) -> str:
        steps = list(row["steps_to_heldout_of"][rival].values())
        known = steps and None not in steps
        return f"{sum(steps) / len(steps) / figures.preset.steps:.0%}" if known else "-"

    columns = {"arm": lambda row: row["title"], "held out": lambda row: _last_cell(row["heldout_loss"])}
    for rival in (name for name in RIVALS if name in figures.arms):
        title = figures.arms[rival].title
        columns[f"of the steps to {title}'s"] = partial(part, rival)
        columns[f"steps to {title}'s by seed"] = lambda row, rival=rival: _steps_cell(
            row["steps_to_heldout_of"][rival]
        )
    return _table(figures, names, columns)


def costs_table(figures: StudyFigures, names: Iterable[str]) -> str:
    """Time of a step and time and energy to the target of some arms as Markdown."""
    columns = {
        "arm": lambda row: row["title"],
        "steps to target": lambda row: _cost_cell(figures, row, "steps_to_target", "d"),
        "ms/step": lambda row: _quartiles_cell(row["step_seconds"], 1e3, ".4g"),
        "of AdamW's": lambda row: _quartiles_cell(row["step_ratio"], 1, ".3f"),
        "seconds to target": lambda row: _cost_cell(figures, row, "seconds_to_target", ".1f"),
    }
    if figures.energy.kinds:
        heading = f"joules to target ({'+'.join(figures.energy.kinds)})"
        columns[heading] = lambda row: _cost_cell(figures, row, "joules_to_target", ".0f")
    return _table(figures, names, columns)


def rates_table(figures: StudyFigures) -> str:
    """What decides, of the first seed by rate, as Markdown."""
    form = ".4f" if figures.preset.decides in LOSSES else ".2f"
    lrs = sorted({lr for name in figures.main for lr in figures.arms[name].sweep})

    def cell(row: Mapping, lr: float) -> str:
        if f"{lr:g}" not in row["lrs"]:
            return "missing" if lr in figures.preset.lrs_of(row["arm"]) else "-"
        found = row["lrs"][f"{lr:g}"]
        return "diverged" if found is None else f"{found:{form}}"

    columns = {"arm": lambda row: row["title"], "seed": lambda row: str(row["first_seed"])}
    columns |= {f"{lr:g}": partial(cell, lr=lr) for lr in lrs}
    return _table(figures, figures.main, columns)


def steps_table(figures: StudyFigures, key: str) -> str:
    """Accuracies by step as Markdown; empty if no trial has any."""
    names = [name for name in figures.main if figures.rows[name][key]]
    steps = sorted({step for name in names for step in figures.rows[name][key]})
    if not steps:
        return ""

    def cell(row: Mapping, step: int) -> str:
        return _mean_cell(row[key][step], ".3f") if step in row[key] else "-"

    columns = {"arm": lambda row: row["title"], "seeds": _seeds_cell}
    return _table(figures, names, columns | {f"step {step}": partial(cell, step=step) for step in steps})


def _target_text(figures: StudyFigures) -> str:
    if figures.target is None:
        return "There is no target: AdamW has no rate at which all of its seeds finished."
    base = figures.rows[BASE]
    seeds = ", ".join(map(str, base["seeds"]))
    text = (
        f"Target: {figures.target:.4f}, the final training loss of AdamW at its best rate, {base['lr']:g} "
        f"(mean of {WINDOW} steps and of the seeds {seeds}). An arm reaches it at the first step from which "
        f"its curve, averaged over its seeds, mean of {WINDOW} steps, stays at or below it; in brackets, the "
        "ratio to AdamW's own. By seed: each seed against AdamW's final loss with that seed."
    )
    if figures.preset.stride > 1:
        text += f" Losses are kept as means of {figures.preset.stride} steps: steps are rounded up to these."
    return text


def _intro(figures: StudyFigures) -> list[str]:
    settings, preset = figures.preset.settings, figures.preset
    about = (
        f"{preset.steps} steps of {settings['batch_size']} images of {settings['img_size']} pixels, of "
        f"{figures.source}; {max(r.held_out for r in figures.study.results.values())} held-out images. Each "
        f"arm has its own best rate, by the {_decides(figures)}, with one seed."
    )
    if preset.pretrains:
        about += " " + _target_text(figures)
    else:
        about += (
            " The protocol is the same for all: a layer has "
            f"{settings['optim.layer_decay']} times the rate of the next. Rates are chosen on the held-out "
            "images that the table is about, for all alike. Losses of pre-training compare between runs of "
            "one kind only."
        )
    return [
        about,
        "Means over the seeds that finished, with the largest minus the smallest in brackets, of the last "
        f"step where none is named. Fewer than {ENOUGH} seeds are marked, and so is a best rate at the edge "
        "of those tried: a better one may lie beyond.",
    ]


def _probed(figures: StudyFigures) -> str:
    return "digits" if figures.source == "photos" else "held-out images"


def _beside(figures: StudyFigures, names: Sequence[str]) -> tuple[str, str]:
    """What a family is shown below: by default the changed arm and the first rival that is another."""
    changed = figures.preset.tuned(names[0])
    return BESIDE.get(changed, (changed, next(rival for rival in RIVALS if rival != changed)))


def markdown(figures: StudyFigures, pictures: Mapping[str, str]) -> str:
    """The report.

    Args:
        figures: of the study.
        pictures: file names of the plots that were made, by section.
    """
    parts: list[str] = [f"# {figures.study.name}", *_intro(figures)]

    def section(title: str, name: str, *texts: str) -> None:
        parts.extend([f"## {title}", *filter(None, texts)])
        if name in pictures:
            parts.append(f"![{title}]({pictures[name]})")

    pretrains = figures.preset.pretrains
    section("Arms", "loss" if pretrains else "figure", arms_table(figures, figures.main))
    if pretrains:
        section(
            "Held out",
            "heldout_loss",
            "From where a seed's held-out loss stays at or below the one that the rival ends at with the "
            "same seed, between evaluations by a straight line; in parts of a run, the mean of the seeds.",
            heldout_table(figures, figures.main),
        )
        section("Costs", "costs", _cost_text(figures), costs_table(figures, figures.arms))
    section(
        "Rates",
        "",
        f"By peak learning rate: {_decides(figures)}, one seed. The best is run with the other seeds.",
        rates_table(figures),
    )
    for probe, title in PROBES.items():
        table = steps_table(figures, probe)
        if table:
            text = f"Accuracy on {_probed(figures)} that it did not learn from, step by step."
            section(title, probe, text, table)
    for family, names in figures.families.items():
        shown = [name for name in _beside(figures, names) if name in figures.arms]
        section(f"Ablation: {family}", "", arms_table(figures, [*shown, *names]))
    if figures.diverged:
        section("Diverged", "", "\n".join(f"- {r.trial.name}: {r.outcome}" for r in figures.diverged))
    if figures.study.unusable:
        section("Left out", "", "\n".join(f"- {unusable.text}" for unusable in figures.study.unusable))
    section("Machines", "", "\n".join(f"- {line}" for line in figures.machines()))
    return "\n\n".join(parts) + "\n"


def _cost_text(figures: StudyFigures) -> str:
    parts = [figures.no_timing] if figures.no_timing else []
    if figures.timing["arms"]:
        parts.append(
            "Time of a step: median and quartiles, interleaved in one process, without the loading of data; "
            "beside it the ratio to AdamW's within a round. Seconds to the target: steps times that median."
        )
    if figures.energy.reason:
        parts.append(f"No joules: {figures.energy.reason}.")
    else:
        parts.append("Joules to the target: the steps' share of what the trials measured.")
    return " ".join(parts)


def _colours(figures: StudyFigures) -> dict[str, object]:
    """Of the main arms. tab20 has ten hues, dark and light: first the dark ones."""
    names = enumerate(figures.preset.arms)
    return {name: f"C{i}" if i < 10 else colormaps["tab20"](2 * i - 19) for i, name in names}


def _draw_curves(figure: Figure, figures: StudyFigures, names: Sequence[str]) -> None:
    """Curves over steps and, where all of them have a time of a step, over seconds."""
    timing, colours = figures.timing["arms"], _colours(figures)
    timed = all(name in timing for name in names)
    if timed:
        figure.set_figwidth(11)
    axes = figure.subplots(1, 1 + timed, sharey=True, squeeze=False)[0]
    units = [("step", lambda name: 1.0)]
    if timed:
        units.append(
            ("seconds: steps times the time of a step", lambda name: timing[name]["seconds"]["median"])
        )
    stride = figures.preset.stride
    for axis, (label, unit) in zip(axes, units, strict=True):
        for name in names:
            arm = figures.arms[name]
            x = [(i + 1) * stride * unit(name) for i in range(len(arm.curve))]
            seeds = f"{len(arm.seeds)} {'seed' if len(arm.seeds) == 1 else 'seeds'}"
            axis.plot(x, arm.curve, color=colours[name], linewidth=1.2, label=f"{arm.title} ({seeds})")
            steps = arm.steps_to(figures.target)
            if steps is not None:
                axis.plot(steps * unit(name), arm.curve[steps // stride - 1], "o", color=colours[name])
        if figures.target is not None:
            axis.axhline(figures.target, color="gray", linewidth=0.8, linestyle="--")
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    # The start of every curve is high and alike: show the part in which they differ.
    late = [v for name in names for v in figures.arms[name].curve[len(figures.arms[name].curve) // 4 :]]
    margin = 0.03 * (max(late) - min(late)) or 0.01
    axes[0].set_ylim(min(late) - margin, max(late) + margin)
    axes[0].set_ylabel(f"training loss, mean of {WINDOW} steps")
    if len(names) <= CROWD:
        axes[0].legend(fontsize=8)
    else:
        figure.set_figwidth(figure.get_figwidth() + 3)
        figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside right upper")


def _draw_evals(figure: Figure, figures: StudyFigures, key: str, label: str) -> None:
    axis = figure.subplots()
    for name, colour in _colours(figures).items():
        row = figures.rows.get(name)
        found = {} if row is None else {s: i for s, i in row[key].items() if i["mean"] is not None}
        if key in LOSSES:  # the loss before training is so high that it would hide the rest
            found.pop(0, None)
        if found:
            means = [item["mean"] for item in found.values()]
            style = "--" if not figures.preset.pretrains and "pretrained_images" not in row else "-"
            axis.plot(list(found), means, f"o{style}", markersize=3, color=colour, label=row["title"])
    axis.set_xlabel("step")
    axis.set_ylabel(label)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def plots(figures: StudyFigures, folder: Path) -> dict[str, str]:
    """Write the plots that there is something for; returns their file names by section."""
    drawn: dict[str, Callable[[Figure], None]] = {}
    preset = figures.preset
    curves = [name for name in figures.main if figures.arms[name].curve is not None]
    if preset.pretrains and curves:
        drawn["loss"] = partial(_draw_curves, figures=figures, names=curves)
        if any(figures.rows[name]["heldout_loss"] for name in figures.main):
            drawn["heldout_loss"] = partial(
                _draw_evals, figures=figures, key="heldout_loss", label="held-out loss"
            )
    if not preset.pretrains:
        label = f"{FIGURES[preset.decides]}, held out, %"
        drawn["figure"] = partial(_draw_evals, figures=figures, key=preset.decides, label=label)
    for probe, title in PROBES.items():
        if steps_table(figures, probe):
            label = f"{title}, accuracy on {_probed(figures)}"
            drawn[probe] = partial(_draw_evals, figures=figures, key=probe, label=label)
    for name, draw in drawn.items():
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        draw(figure)
        figure.savefig(folder / f"{name}.png", dpi=120)
    return {name: f"{name}.png" for name in drawn}


def write(figures: StudyFigures) -> str:
    """Write the report beside the results; returns its text."""
    folder = figures.study.folder
    text = markdown(figures, plots(figures, folder))
    write_atomically(folder / "report.md", text)
    write_atomically(folder / "report.json", to_json(figures.to_json(), indent=1) + "\n")
    return text
