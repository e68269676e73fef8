"""The time of a step of every arm of a study, interleaved in one process."""

import json
import math
import tempfile
from collections.abc import Callable, Sequence

import torch
from timm.optim.kron import Kron, precond_update_prob_schedule

from bench import measure, record
from bench.experiments import trial as trials
from bench.experiments.preset import Trial
from bench.experiments.study import Study
from train.engine.loop import Loop
from train.engine.processes import moved
from train.engine.run_folder import write_atomically


def cadence(loop: Loop, steps: int) -> int:
    """Steps after which the work of a step repeats."""
    if isinstance(loop.optimizer, Kron):
        # It updates its preconditioner ever more seldom. Timed is its mean over the run, evenly spread.
        updates, waited = 0, 0
        for step in range(steps):
            waited += 1
            if waited >= 1 / precond_update_prob_schedule(step):
                updates, waited = updates + 1, 0
        every = round(steps / updates)
        for group in loop.optimizer.param_groups:
            group["preconditioner_update_probability"] = 1 / (every - 0.5)  # it compares 1/p with a count
        return every
    decor = loop.config.decor
    return decor.every if decor.enable else 1


def time_steps(study: Study, arms: Sequence[str], rounds: int) -> dict[str, object]:
    """Seconds of a step of every arm, interleaved, and their ratios to the first arm's within a round.

    A step is forward, backward and the optimizers', without the loading of data. Arms that do not do the same
    at every step are timed over whole turns.
    """
    timed = []
    for name in arms:
        record.progress(f"{name}: building")
        with tempfile.TemporaryDirectory() as out:
            loop = trials.prepare(Trial(study.name, name, 1e-3, 0), out, study.data)
            batch = next(loop.batches)
            loop.close()
        every = cadence(loop, loop.config.steps)
        timed.append((_step(loop, batch), every * math.ceil(4 / every)))
    times = []
    device = loop.processes.device
    for turn in range(1 + rounds):
        record.progress(f"round {turn} of {rounds}{'' if turn else ', to warm up'}")
        times.append(measure.rotated_round(timed, turn, lambda arm: measure.seconds(arm[0], device, arm[1])))
    found = {}
    by_arm = list(zip(*times[1:], strict=True))
    for name, seconds in zip(arms, by_arm, strict=True):
        found[name] = {
            "seconds": measure.quartiles(seconds)._asdict(),
            "ratio": measure.paired_ratio(seconds, by_arm[0])._asdict(),
            "settings": Trial(study.name, name, 1e-3, 0).settings(study.data),
        }
    return found


def _step(loop: Loop, batch: dict) -> Callable[[], None]:
    device = loop.processes.device
    batch = moved(batch, device)

    def step() -> None:
        with torch.autocast(device.type, loop.autocast, enabled=loop.autocast is not None):
            loss = loop.task.loss(loop.model, batch)
        loss.backward()
        loop.optimizer.step()
        loop.optimizer.zero_grad(set_to_none=True)

    return step


def write(study: Study, arms: Sequence[str], rounds: int) -> None:
    """Time the steps and write timing.json."""
    measure.keep_freed_memory()
    arms = ["adamw", *(name for name in arms if name != "adamw")]
    config = Trial(study.name, "adamw", 1e-3, 0).config("", study.data)
    # As for the trials, without the folder, which is of this machine only.
    command = ["study", study.name, "--arms", *arms, "--time", str(rounds)]
    head = record.header(command, torch.device(config.device), config.precision)
    timing = head | {"arms": time_steps(study, arms, rounds)}
    study.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(study.folder / "timing.json", json.dumps(timing, indent=1) + "\n")
