"""Tiny studies of pre-training, made-up results of their trials, and what their reports tell."""

import json
import os
import sys
from dataclasses import asdict

from bench import study as command
from bench.__main__ import main
from bench.experiments import pretraining
from bench.experiments.preset import PRESETS, Preset, Trial
from bench.experiments.study import FINISHED
from train import pretrain

SMALL = {
    "model": "mae_vit_tiny",
    "model_args": {
        "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2,
        "decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2,
    },
    "img_size": 16,
    "batch_size": 32,
    "device": "cpu",
    "precision": "fp32",
}  # fmt: skip
DBP = "DecorPreconditioner"  # the title of the arm dbp
ONE_LR = {"adamw": (3e-3,), "dbp": (3e-3,)}


def made(settings, **further):
    """A tiny preset with the arms of all studies of pre-training."""
    arms, families = pretraining.ARMS, pretraining.ABLATIONS
    return Preset(pretrain, SMALL | settings, arms, families, evaluations=2, lrs=ONE_LR, **further)


MADE = made({"steps": 200, "optim.warmup_steps": 4})
TINY = made({"steps": 8, "optim.warmup_steps": 2}, probe=20)
HEADER = {
    "date": "2026-01-02T03:04:05+00:00",
    "device": "cpu",
    "machine": {
        "cpu": "A processor",
        "threads": 1,
        "packages": {"torch": "2.9", "triton": None, "timm": "1.0"},
        "dbpkern": "0.1",
        "commit": "0123456789abcdef",
    },
}
ENERGY = {"by_device": {}, "missing": {"cpu": "no counter", "kg_co2": "energy.country is not set"}}

WORKER = f"""\
import sys

sys.path.insert(0, {os.path.dirname(__file__)!r})
from studies import shrink
from bench.__main__ import main

shrink(dict.__setitem__)
sys.exit(main(["study", "--worker", sys.argv[1]]))
"""


def shrink(setitem):
    """Add tiny presets, in which two arms have one rate."""
    setitem(PRESETS, "made", MADE)
    setitem(PRESETS, "tiny", TINY)


def write_worker(folder, monkeypatch, script=WORKER):
    """Let workers know the tiny presets, or do something else altogether."""
    path = folder / "worker.py"
    path.write_text(script)
    monkeypatch.setattr(command, "WORKER", (sys.executable, str(path)))


def write_result(folder, arm, losses, *, lr=3e-3, seed=0, preset="made", **changes):
    """Add the line of a made-up trial; returns the file."""
    made = Trial(preset, arm, lr, seed)
    steps = PRESETS[preset].steps
    evals = [
        {"step": step, "heldout_loss": 2.0 + seed - step / 100, "probe": 0.5 + seed / 10 + step / 1000}
        for step in (0, steps // 2, steps)
    ]
    content = {
        "trial": asdict(made),
        "outcome": FINISHED,
        "settings": made.settings({}),
        "losses": [round(loss, 5) for loss in losses],
        "seconds": 98765.432,
        "evals": evals,
        "held_out": 4,
        "energy": ENERGY,
        "skipped_steps": 0,
        "jobs": 1,
        "encoder": None,
        "machine": HEADER,
    }
    path = folder / preset / "runs.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_text().splitlines() if path.exists() else []
    kept = [line for line in before if json.loads(line)["trial"] != content["trial"]]
    path.write_text("\n".join([*kept, json.dumps(content | changes)]) + "\n")
    return path


def slope(seed):
    """AdamW's curve: its last 50 losses have the mean 1.1225 + seed / 10."""
    return [2 + seed / 10 - 0.005 * step for step in range(1, 201)]


def drop(at):
    """2 up to step `at`, 0.5 from there on."""
    return [2.0] * at + [0.5] * (200 - at)


def report_of(folder, preset="made", code=0):
    assert main(["study", preset, "--folder", str(folder), "--report"]) == code
    text = (folder / preset / "report.md").read_text()
    return text, json.loads((folder / preset / "report.json").read_text())


def line_of(text, title, heading="## Arms"):
    """The cells of an arm's row in the table below a heading."""
    below = text[text.index(heading) :].splitlines()
    return next([c.strip() for c in x.split("|")[1:-1]] for x in below if x.startswith(f"| {title} "))
