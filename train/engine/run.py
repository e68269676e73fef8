"""What a run does whatever it trains: read its options, open its folder, train, tell how it went."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from jsonargparse import ArgumentParser

from train.data.reading import DataError
from train.engine import checkpoint, processes
from train.engine.config import RunConfig
from train.engine.loop import Diverged, Interrupted, Loop
from train.engine.processes import Processes
from train.engine.results import whole_weights, write_results
from train.engine.run_folder import NEUTRAL, RunFolder, flat, lines

Config = TypeVar("Config", bound=RunConfig)


def parse_config(
    kind: type[Config], prog: str, about: str, arguments: list[str] | None = None, **defaults: Any
) -> Config:
    """The configuration from the command line and YAML files.

    Args:
        kind: Its class.
        prog: The script, as --help calls it.
        about: What --help says of it.
        arguments: Of the command line, None for those of this process.
        defaults: Other defaults than those of the class, by dotted name.
    """
    parser = ArgumentParser(prog=prog, description=about)
    parser.add_argument("--config", action="config", help="YAML file with any of the options below")
    parser.add_class_arguments(kind)
    parser.set_defaults(defaults)
    settings = parser.instantiate(parser.parse_args(arguments))
    settings.pop("config")
    return kind(**settings)


def check_same_run(old: Mapping[str, Any], config: RunConfig, where: str) -> None:
    """Raise ValueError naming the settings in which an old configuration differs from that of this run.

    A setting that did not exist when the old one was written was what it is by default.
    """
    old, new = flat(old), flat(asdict(config))
    kind: type[Any] = type(config)  # all that it asks for beside `out` has a default
    for name, value in flat(asdict(kind(""))).items():
        if not any(known.startswith(f"{name}.") for known in old):  # a rank, say, may be one or many
            old.setdefault(name, value)
    differing = [
        f"{name} was {old.get(name)!r}, is {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and name not in NEUTRAL
    ]
    if differing:
        raise ValueError(f"{where} is of another configuration: {'; '.join(differing)}")


def open_run(
    config: RunConfig, procs: Processes, files: Sequence[str]
) -> tuple[RunFolder, tuple[Path, dict[str, Any]] | None]:
    """The run's folder, and the checkpoint to continue from with its state if there is one.

    Args:
        config: What is asked for.
        procs: This process among the others.
        files: What the data are, line by line: names of the training images, and what else tells.

    Raises:
        ValueError: the folder holds another run, or this one while `resume` is "none"; or the run to continue
            has other data.
        train.engine.checkpoint.CheckpointError: the checkpoint that `resume` names is missing or damaged.
    """
    run = RunFolder(config.out)
    old = run.read_config()
    if old is not None:
        check_same_run(old, config, f"out: the run in {run.path}")
        if config.resume == "none":
            raise ValueError(f"out: {run.path} holds a run; continue it with --resume auto or choose another")
    if config.resume == "none":
        return run, None
    if config.resume == "auto":
        found = checkpoint.newest(run.checkpoints, procs)
        if found is None:
            return run, None
        path, state = found
    else:
        path = Path(config.resume)
        state = checkpoint.load(path, procs)
    check_same_run(state["config"], config, f"resume: {path}")
    if run.files.is_file() and run.files.read_text() != lines(files):
        raise ValueError(f"data: they are no longer those of {run.files}; restore them")
    if procs.is_main:
        print(f"resuming from {path}, step {state['step']}", flush=True)
    return run, (path, state)


def run_script(
    name: str,
    parse: Callable[[list[str] | None], Config],
    prepare: Callable[[Config, Processes], Loop],
    arguments: list[str] | None,
) -> None:
    """Run a training script, and say in one line what went wrong where it is not a defect of the program.

    Args:
        name: What messages start with.
        parse: Reads the command line.
        prepare: Everything up to the first step.
        arguments: Of the command line, None for those of this process.
    """
    procs = None
    try:
        config = parse(arguments)
        if config.deterministic:
            # Asked for by cuBLAS, which reads it at its start.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        procs = processes.start(config.device)
        loop = prepare(config, procs)
    except (ValueError, FileNotFoundError) as error:
        processes.stop()
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"{name}: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    try:
        loop.train()
        weights = whole_weights(loop.model)
    except Diverged as error:
        sys.exit(f"{name}: {error}" if procs.is_main else 1)
    except DataError as error:
        # From a process of the loader it comes with that one's traceback before it.
        sys.exit(f"{name}: {str(error).strip().rpartition('DataError: ')[2]}")
    except Interrupted as stopped:
        if procs.is_main:
            print(f"{name}: stopped at step {loop.step}. {stopped}; continue with --resume auto")
        return
    finally:
        loop.close()
        processes.stop()
    if procs.is_main:
        write_results(loop, weights)
        if loop.unreadable:
            print(f"{name}: {len(loop.unreadable)} unreadable files were skipped, see {loop.run.summary}")
        print(f"{name}: {loop.step} steps in {loop.seconds:.1f} s, results in {config.out}")
