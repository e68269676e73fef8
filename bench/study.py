"""Studies: how soon each way to train reaches a loss, and what the encoders that it leaves are worth.

The trials of a study (`bench/experiments/`) are made, as many at a time as there are cores, or one on a GPU
(--jobs). Each is a process with one thread that trains by a training script's own loop. What is kept of it is
a line of FOLDER/STUDY/runs.jsonl; FOLDER/STUDY/running/NAME.log shows how far it is, and stays if it fails.
Trials that have their line are skipped: a study can be filled over days, Ctrl-C stops it. Encoders that a
trial starts from are made where they are missing; they lie in FOLDER/STUDY/encoders and are not for git. The
report, report.md with its plots, is written at the end, and by --report only.

--list says what is there. --time measures the time of a step of every arm, interleaved in one process; let
the machine do nothing else then.

The exit code is 1 if a trial failed or a line of results could not be used, and 2 if nothing could be done.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import record
from bench.experiments import report, timing, trial
from bench.experiments.figures import StudyFigures
from bench.experiments.jobs import run_all
from bench.experiments.preset import PRESETS, Trial
from bench.experiments.study import SEEDS, Study
from bench.options import count
from train.data.pretraining import DataConfig

FOLDER = Path(__file__).parent / "reports"
FOLDERS = ("folder", "ade20k", "cityscapes")  # kinds of sources that name one
WORKER = (sys.executable, "-m", "bench", "study", "--worker")  # what makes a trial or an encoder


def rate(text: str) -> float:
    """A learning rate, for argparse."""
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `python -m bench study`."""
    parser.add_argument(
        "study", choices=PRESETS, nargs="?", default="photos", metavar="STUDY",
        help=f"of {', '.join(PRESETS)} (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--arms", nargs="+", metavar="ARM", help="arms or families of ablations (default: all main arms)"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="(default: %(default)s)")
    parser.add_argument("--lr", type=rate, help="try all arms at this peak learning rate only")
    parser.add_argument("--jobs", type=count, help="trials at a time (default: cores; 1 on a GPU)")
    parser.add_argument("--source", help="images, as --data.source of the study's script")
    parser.add_argument("--images", help="to pre-train encoders on, likewise (default: photos)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the results (default: %(default)s)")
    parser.add_argument("--encoders", action="store_true", help="leave the encoders of pre-training")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--list", action="store_true", help="say which trials are there and which are not")
    action.add_argument("--report", action="store_true", help="write the report of what is there")
    action.add_argument(
        "--time", type=count, metavar="ROUNDS", help="time the arms' steps and do nothing else"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # the one thing that this process is to make


def listing(study: Study, args: argparse.Namespace, arms: Sequence[str]) -> str:
    """What is there of the trials that are asked for, and what is missing."""
    wanted = study.wanted(arms, args.seeds, args.lr)
    lines = [
        f"{trial.name}: {study.results[trial].short() if trial in study.results else 'missing'}"
        for trial in wanted
    ]
    lines.append(f"{sum(trial in study.results for trial in wanted)} of {len(wanted)} trials are there")
    waiting = study.waiting(arms, args.seeds, args.lr)
    if waiting:
        lines.append(f"further trials wait until a best rate is known: {', '.join(waiting)}")
    return "\n".join([*lines, *(unusable.text for unusable in study.unusable)])


def _check_folder(option: str, source: str | None, config: type) -> None:
    """Raise ValueError for images that no trial would find."""
    if source is None:
        return
    kind, _, path = config(source=source).source.partition(":")
    if kind in FOLDERS and not Path(path).expanduser().is_dir():
        raise ValueError(f"{option}: there is no folder {path}")


def open_study(args: argparse.Namespace) -> Study:
    """The study that is asked for.

    Raises:
        ValueError: the options do not go together, or what its encoders need is not known.
    """
    preset = PRESETS[args.study]
    if min(args.seeds) < 0:
        raise ValueError(f"--seeds: expected numbers of at least 0, got {min(args.seeds)}")
    if args.report:
        return Study(args.folder, args.study)
    _check_folder("--source", args.source, type(preset.script.Config("").data))
    _check_folder("--images", args.images, DataConfig)
    if args.time is not None and not preset.pretrains:
        raise ValueError(f"--time: is for pre-training, got {args.study}")
    if not args.list:
        if preset.needs_source and args.source is None:
            raise ValueError(f"{args.study} needs --source, such as folder:PATH")
        if preset.needs_images and args.images is None:
            raise ValueError(f"{args.study} needs --images, those to pre-train on")
        if preset.on_gpu and not torch.cuda.is_available():
            raise ValueError(f"{args.study} needs a GPU, and PyTorch finds none")
    source = args.source
    if source is None and preset.pretrains and not preset.needs_source:
        source = "photos"
    images = args.images or (None if preset.needs_images else "photos")
    return Study(
        args.folder,
        args.study,
        {} if source is None else {"data.source": source},
        {} if images is None else {"data.source": images},
    )


def check_arms(study: Study, args: argparse.Namespace, arms: Sequence[str]) -> None:
    """Raise ValueError for what would make trials fail, or mix those that differ."""
    wrong = [unusable.text for unusable in study.unusable if unusable.arm in (None, *arms)]
    if wrong:
        raise ValueError("\n".join([*wrong, "delete these lines, and their trials are made again"]))
    for arm in arms:
        lrs = study.preset.lrs_of(study.preset.tuned(arm))
        if not lrs and args.lr is None:
            raise ValueError(f"{arm}: it has no learning rates to try; give it some, or an --lr")
        Trial(args.study, arm, args.lr or lrs[0], args.seeds[0]).config("", {})  # raises for its settings
    ablations = [arm for arm in arms if arm not in study.preset.arms]
    waiting = study.waiting(ablations, args.seeds, args.lr)
    unknown = sorted({study.preset.tuned(arm) for arm in waiting} - set(arms))
    if unknown:
        raise ValueError(
            f"{', '.join(waiting)}: ablations run at the best rate of {' and '.join(unknown)}, which is not "
            f"known yet; add {' '.join(unknown)} to --arms, or give an --lr"
        )
    for arm in arms:
        study.encoder_of(arm, args.seeds[0])  # raises now


def run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Fill a study, list it, time its arms or report it; returns the exit code."""
    if args.worker is not None:
        trial.work(json.loads(args.worker))
        return 0
    failed: list[str] = []
    try:
        study = open_study(args)
        arms = study.preset.choose(args.arms)
        if args.list:
            print(listing(study, args, arms))
            return 0
        if args.time is not None:
            timing.write(study, arms, args.time)
            return 0
        if not args.report:
            check_arms(study, args, arms)
            at_a_time = args.jobs or (1 if study.preset.on_gpu else os.cpu_count() or 1)

            def missing():
                return study.jobs(arms, args.seeds, args.lr, at_a_time, args.encoders)

            study.take_over(missing())
            failed = run_all(WORKER, missing, study.collect, at_a_time)
        print(report.write(StudyFigures(study)))
    except ValueError as error:
        record.progress(f"study: {error}")
        return 1 if failed else 2
    except KeyboardInterrupt:
        record.progress("study: stopped; what was cut off is made again by the same command")
        return 130
    for unusable in study.unusable:
        record.progress(f"study: left out: {unusable.text}")
    if failed:
        record.progress(f"study: {len(failed)} trials failed: {', '.join(failed)}")
    return 1 if failed or study.unusable else 0
