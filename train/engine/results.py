"""What a finished run leaves in its folder."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from dbpkern.env import collect
from train.engine import plots
from train.engine.correlations import plot_losses
from train.engine.loop import Loop
from train.engine.run_folder import to_json, write_atomically


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict on the CPU of the main process, {} on the others; a collective."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast(dict[str, Tensor], get_model_state_dict(model, options=options))


def summary_of(loop: Loop, records: Sequence[Mapping[str, Any]]) -> dict[str, object]:
    """What summary.json says of any run.

    Args:
        loop: The finished run.
        records: Of its log, with at least one evaluation.
    """
    final = [r["loss"] for r in records if r["kind"] == "step"][-plots.WINDOW :]
    images = loop.step * loop.config.batch_size
    return {
        "steps": loop.step,
        "seconds": loop.seconds,
        "images_per_second": images / loop.seconds if loop.seconds else None,
        "final_loss": sum(final) / len(final) if final else None,
        "heldout_loss": [r for r in records if r["kind"] == "eval"][-1]["heldout_loss"],
        "energy": loop.energy.summary(loop.config.energy.country),
        "skipped_steps": loop.skipped,
        "unreadable": len(loop.unreadable),
        "unreadable_files": loop.unreadable,
        "processes": loop.processes.world_size,
        "device": str(loop.processes.device),
        "parameters": sum(p.numel() for p in loop.model.parameters()),
        "machine": collect(),
    }


def write_results(loop: Loop, weights: Mapping[str, Tensor]) -> None:
    """The model, the summary and the pictures of a finished run, on the main process.

    Args:
        loop: Of the run.
        weights: Of the whole model.
    """
    run = loop.run
    records = list(run.records())
    loop.task.export(weights, run.path)  # first what nothing else can replace
    summary = summary_of(loop, records) | loop.task.summary(records)
    write_atomically(run.summary, to_json(summary, indent=1))
    plots.plot_curves(records, run.path / "curves.png")
    history: dict[str, dict[int, float]] = {}
    for record in records:
        if record["kind"] == "eval":
            for name, value in record["decorrelation_loss"].items():
                history.setdefault(name, {})[record["step"]] = value
    if history:
        plot_losses(history, run.path / "correlation.png", "Decorrelation loss of z = R x, held out")
    loop.task.draw(records, run.path)
