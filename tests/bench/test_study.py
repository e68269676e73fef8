"""Studies of pre-training and their report: made-up curves, and real trials of a tiny preset."""

import json
import math
import os
import signal
import sys
import threading
from dataclasses import asdict, replace

import pytest
import torch
from PIL import Image
from timm.optim import kron
from torch import nn

from bench import study as command
from bench.__main__ import main
from bench.experiments import figures, preset, pretraining, probe, timing, trial
from bench.experiments.preset import PRESETS, Arm, Preset, Trial
from bench.experiments.study import FINISHED, Study
from models.darl import DARL, create_darl
from models.mae import create_mae
from train import pretrain
from train.compare import average
from train.engine.plots import trailing_mean
from train.tasks.pretraining import Config, DecorConfig

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
from test_study import shrink
from bench.__main__ import main

shrink(dict.__setitem__)
sys.exit(main(["study", "--worker", sys.argv[1]]))
"""


def shrink(setitem):
    """Add tiny presets, in which two arms have one rate."""
    setitem(PRESETS, "made", MADE)
    setitem(PRESETS, "tiny", TINY)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    shrink(monkeypatch.setitem)


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


def test_crossing_is_a_straight_line_between_evaluations():
    assert figures.crossing({0: 4.0, 10: 2.0, 20: 1.0}, 1.5) == 15
    assert figures.crossing({0: 4.0, 10: 2.0, 20: 1.0}, 2.0) == 10
    assert figures.crossing({0: 4.0, 10: 1.0, 20: 3.0, 30: 1.0}, 2.0) == 25  # the last time
    assert figures.crossing({0: 1.0, 10: 0.5}, 2.0) == 0
    assert figures.crossing({0: 4.0, 10: 2.0}, 1.0) is None
    assert figures.crossing({0: 4.0, 10: None, 20: 1.0}, 1.5) == 20
    assert figures.crossing({0: 4.0, 10: math.nan}, 1.5) is None


def test_steps_to_the_held_out_losses_of_the_rivals(tmp_path):
    def evals(*losses):
        return [{"step": 100 * i, "heldout_loss": loss} for i, loss in enumerate(losses)]

    for seed in (0, 1):
        for arm, found in {"adamw": (3, 2, 1), "muon": (3, 1, 0.5), "dbp": (3, 1.5, 0.75 + seed)}.items():
            write_result(tmp_path, arm, drop(100), seed=seed, evals=evals(*found))
    text, found = report_of(tmp_path)
    assert found["arms"]["dbp"]["steps_to_heldout_of"] == {
        "adamw": {"0": 167, "1": None},
        "muon": {"0": None, "1": None},
    }
    assert found["arms"]["muon"]["steps_to_heldout_of"]["adamw"] == {"0": 100, "1": 100}
    assert line_of(text, "Muon", "## Held out") == [
        "Muon",
        "0.5000 (0.0000)",
        "50%",
        "100, 100",
        "100%",
        "200, 200",
    ]
    assert line_of(text, DBP, "## Held out")[2:] == [
        "-",
        "167, not reached",
        "-",
        "not reached, not reached",
    ]


def line_of(text, title, heading="## Arms"):
    """The cells of an arm's row in the table below a heading."""
    below = text[text.index(heading) :].splitlines()
    return next([c.strip() for c in x.split("|")[1:-1]] for x in below if x.startswith(f"| {title} "))


def write_two_arms(folder, **changes):
    for seed in (0, 1):
        write_result(folder, "adamw", slope(seed), seed=seed, **changes)
        write_result(folder, "dbp", drop(100 + 20 * seed), seed=seed, **changes)


def test_report_has_the_steps_computed_by_hand(tmp_path):
    write_two_arms(tmp_path)
    text, found = report_of(tmp_path)
    # AdamW ends at 1.1225 and 1.2225. k steps after its drop, a seed of DBP is at 2 - 0.03 k.
    assert found["target"] == pytest.approx(1.1725)
    # Averaged: 2 - 0.015 (k0 + k1) <= 1.1725 from k0 + k1 = 56 on, that is, 38 and 18.
    assert found["arms"]["dbp"]["steps_to_target"] == 138
    # Each by itself: 2 - 0.03 k <= 1.1225 from k = 30 on, <= 1.2225 from k = 26 on.
    assert found["arms"]["dbp"]["steps_by_seed"] == {"0": 130, "1": 146}
    assert found["arms"]["adamw"]["steps_to_target"] == 200
    assert found["arms"]["adamw"]["final_loss"] == {
        "mean": pytest.approx(1.1725),
        "spread": pytest.approx(0.1),
    }
    assert found["arms"]["dbp"]["heldout_loss"]["200"] == {
        "mean": pytest.approx(0.5),
        "spread": pytest.approx(1),
    }
    assert found["arms"]["dbp"]["probe"]["100"] == {"mean": pytest.approx(0.65), "spread": pytest.approx(0.1)}
    cells = [DBP, "0.003", "2 (fewer than 3)", "0.5000 (0.0000)", "0.5000 (1.0000)", "0.750 (0.100)"]
    assert line_of(text, DBP) == [*cells, "138 (69%)", "130, 146"]
    assert "A processor, 1 threads; torch 2.9, timm 1.0; dbpkern 0.1, commit 0123456789ab; 4 runs" in text


def test_clocks_of_the_runs_are_no_result_and_missing_times_are_told(tmp_path):
    write_two_arms(tmp_path)
    text, found = report_of(tmp_path)
    assert found["arms"]["dbp"]["seconds_to_target"] is None
    assert "There is no timing.json" in text
    assert "98765" not in text + json.dumps(found)
    assert line_of(text, DBP, "## Costs") == [DBP, "138 (69%)", "-", "-", "-"]
    assert "No joules: adamw_lr0.003_seed0 has none (cpu: no counter)." in text


def write_timing(folder, **settings):
    timing = {}
    for name, median in (("adamw", 0.010), ("dbp", 0.012)):
        quartiles = {"low": median - 0.001, "median": median, "high": median + 0.001}
        timing[name] = {
            "seconds": quartiles,
            "ratio": {"low": 100 * median - 0.1, "median": 100 * median, "high": 100 * median + 0.1},
            "settings": Trial("made", name, 1e-3, 0).settings({}) | settings,
        }
    (folder / "made" / "timing.json").write_text(json.dumps(HEADER | {"arms": timing}))


def test_seconds_are_steps_times_the_median_of_timing_json(tmp_path):
    write_two_arms(tmp_path)
    write_timing(tmp_path)
    text, found = report_of(tmp_path)
    assert found["arms"]["dbp"]["seconds_to_target"] == pytest.approx(138 * 0.012)
    cells = [DBP, "138 (69%)", "12 [11, 13]", "1.200 [1.100, 1.300]", "1.7 (83%)"]
    assert line_of(text, DBP, "## Costs") == cells
    write_timing(tmp_path, batch_size=7)
    text, found = report_of(tmp_path)
    assert found["arms"]["dbp"]["seconds_to_target"] is None
    assert "timing.json is of other settings for adamw, dbp." in text


def test_times_from_before_a_setting_came_count_as_of_its_default(tmp_path):
    write_two_arms(tmp_path)
    write_timing(tmp_path)
    path = tmp_path / "made" / "timing.json"
    timing = json.loads(path.read_text())
    for item in timing["arms"].values():
        del item["settings"]["data.val"]
    path.write_text(json.dumps(timing))
    _, found = report_of(tmp_path)
    assert found["arms"]["dbp"]["seconds_to_target"] == pytest.approx(138 * 0.012)


def test_joules_need_a_counter_in_all_runs_and_one_run_at_a_time(tmp_path):
    def energy(joules):
        return {"by_device": {"gpu": joules, "cpu": 7.0}, "missing": {}}

    write_result(tmp_path, "adamw", slope(0), energy=energy(100.0))
    write_result(tmp_path, "dbp", drop(100), energy={"by_device": {"gpu": 120.0}, "missing": {}})
    text, found = report_of(tmp_path)
    assert found["energy"] == {"kinds": ["gpu"], "reason": None}
    assert found["arms"]["dbp"]["joules_to_target"] == pytest.approx(120 * 130 / 200)
    assert line_of(text, DBP, "## Costs")[-1] == "78 (78%)"
    write_result(tmp_path, "dbp", drop(100), energy=energy(120.0), jobs=2)
    text, found = report_of(tmp_path)
    assert found["arms"]["dbp"]["joules_to_target"] is None
    assert "dbp_lr0.003_seed0 was one of 2 trials at a time" in text


def test_a_curve_that_rises_again_has_not_reached_the_target():
    assert figures.reach([3, 1, 3, 2, 2], 2) == 4
    assert figures.reach([2, 2], 2) == 1
    assert figures.reach([1, 1, 3], 2) is None
    assert figures.reach([3, 1, math.nan, 1], 2) == 4
    assert figures.reach([3, 1, math.nan], 2) is None
    assert figures.reach([3, 2, 2], 2, stride=5) == 10


def test_not_reached_and_diverged_are_told(tmp_path):
    for seed in (0, 1, 2):
        write_result(tmp_path, "adamw", slope(seed), seed=seed)
    write_result(tmp_path, "dbp", [1.5] * 200)
    outcome = "step 60: 10 steps in a row had a loss that is not finite"
    for seed in (0, 1):
        write_result(tmp_path, "muon", drop(50), seed=seed, lr=5e-3)
    write_result(tmp_path, "muon", drop(50)[:60], seed=2, lr=5e-3, outcome=outcome)
    write_result(tmp_path, "muon", [0.1] * 200, seed=0, lr=8e-3, outcome="the run ended not finite")
    write_result(tmp_path, "kron", [], outcome=outcome)
    text, found = report_of(tmp_path)
    assert line_of(text, "AdamW")[2] == "3"
    assert line_of(text, DBP)[6:] == ["not reached", "not reached"]
    # A seed without an end leaves no average, but the other seeds their own steps.
    muon = line_of(text, "Muon")
    assert (muon[2], muon[6], muon[7]) == ("3 (1 diverged)", "not reached", "80, 76, not reached")
    assert muon[1] == "0.005, lowest tried, 3 rates missing"
    assert found["arms"]["muon"]["final_loss"] == {"mean": 0.5, "spread": 0.0}
    assert found["arms"]["muon"]["lrs"] == {"0.005": 0.5, "0.008": None}
    assert line_of(text, "Kron (PSGD)")[1] == "all diverged"
    assert set(found["diverged"]) == {
        "muon_lr0.005_seed2",
        "muon_lr0.008_seed0",
        "kron_lr0.003_seed0",
    }
    assert f"- muon_lr0.005_seed2: {outcome}" in text


def test_best_rate_is_that_of_the_first_seed_and_its_edge_is_marked(tmp_path):
    for rate, level in ((2e-3, 0.9), (3e-3, 0.8), (5e-3, 0.7), (8e-3, 0.75), (1.2e-2, 0.8)):
        write_result(tmp_path, "muon", [level] * 200, lr=rate)
        write_result(tmp_path, "decor-muon", [level - 100 * rate] * 200, lr=rate)
    write_result(tmp_path, "muon", [0.1] * 200, lr=3e-3, seed=1)
    results = Study(tmp_path, "made")
    assert results.best_lr("muon", 0) == 5e-3
    assert results.best_lr("muon", 1) is None
    assert results.missing(["muon"], (0, 1, 2)) == [
        Trial("made", "muon", 5e-3, 1),
        Trial("made", "muon", 5e-3, 2),
    ]
    text, found = report_of(tmp_path)
    assert (found["arms"]["muon"]["lr"], found["arms"]["muon"]["edge"]) == (5e-3, None)
    assert (found["arms"]["decor-muon"]["lr"], found["arms"]["decor-muon"]["edge"]) == (1.2e-2, "highest")
    row = ["Muon", "0", "0.9000", "0.8000", "0.7000", "0.7500", "0.8000"]
    assert line_of(text, "Muon", "## Rates") == row
    assert found["target"] is None
    assert "There is no target" in text
    assert line_of(text, "Muon")[-2:] == ["-", "-"]


def test_ablations_stand_in_families_under_their_arm_and_every_plot_is_drawn(tmp_path):
    write_two_arms(tmp_path)
    write_result(tmp_path, "decor-adamw", drop(100), lr=3e-3)
    write_result(tmp_path, "decor-adamw", [2.0] * 200, lr=5e-3)
    write_result(tmp_path, "decor-adamw-rank-8", drop(90))
    write_timing(tmp_path)
    text, _ = report_of(tmp_path)
    section = text[text.index("## Ablation: rank") :]
    assert line_of(section, "DecorAdamW", "##")[6:] == ["128 (64%)", "130"]
    # Against both seeds' mean: 2 - 0.03 k <= 1.1725 from k = 28 on; against the first's 1.1225, from 30 on.
    assert line_of(section, "DecorAdamW, rank 8", "##")[6:] == ["118 (59%)", "120"]
    assert "## Ablation: every" not in text
    for name in ("loss", "heldout_loss", "probe"):
        assert f"({name}.png)" in text
        with Image.open(tmp_path / "made" / f"{name}.png") as image:
            assert len(image.convert("RGB").getcolors(10**6)) > 10


def test_a_family_stands_beside_the_arm_that_it_changes_and_a_rival(tmp_path):
    write_two_arms(tmp_path)
    write_result(tmp_path, "muon", drop(150), lr=8e-3)
    write_result(tmp_path, "muon-decay-0.4", drop(160), lr=8e-3)
    text, _ = report_of(tmp_path)
    section = text[text.index("## Ablation: decay") :]
    rows = [row.split("|")[1].strip() for row in section.split("\n\n")[1].splitlines()]
    assert rows[2:] == ["Muon", "AdamW", "Muon, weight decay 0.4"]


def test_kept_means_leave_the_curve_as_it_is(monkeypatch, tmp_path):
    monkeypatch.setattr(preset, "KEPT", 40)
    assert MADE.stride == 5
    assert Preset(pretrain, {"steps": 8}, {}).stride == 1
    assert Preset(pretrain, {"steps": 5003}, {}).stride == 1  # a prime: nothing divides it
    values = [math.sin(i / 7) + 2 for i in range(200)]
    kept = trial.in_strides(values, 5)
    assert len(kept) == 40
    assert trailing_mean(kept, 10) == pytest.approx(trailing_mean(values)[4::5], abs=1e-5)
    assert trial.in_strides(values[:13], 5) == pytest.approx(
        [sum(values[:5]) / 5, sum(values[5:10]) / 5], abs=1e-5
    )
    for seed in (0, 1):
        write_result(tmp_path, "adamw", trial.in_strides(slope(seed), 5), seed=seed)
        write_result(tmp_path, "dbp", trial.in_strides(drop(100 + 20 * seed), 5), seed=seed)
    text, found = report_of(tmp_path)
    assert found["target"] == pytest.approx(1.1725)
    assert found["arms"]["dbp"]["steps_to_target"] == 140  # 138, rounded up
    assert "Losses are kept as means of 5 steps" in text


def test_skipped_steps_take_the_loss_before_them():
    records = [
        {"kind": "eval", "step": 0, "heldout_loss": 3.0},
        {"kind": "skip", "step": 1, "loss": None},
        {"kind": "step", "step": 2, "loss": 2.0},
        {"kind": "skip", "step": 3, "loss": 1e9},
        {"kind": "step", "step": 4, "loss": 1.0},
        {"kind": "skip", "step": 5, "loss": None},
    ]
    assert trial.losses(records) == [2.0, 2.0, 2.0, 1.0, 1.0]
    assert trial.losses(records[:2]) == []


def damage(path):
    path.write_text(path.read_text()[:-200] + "\n")


def change(path, **settings):
    """Of the last line of results."""
    *before, last = path.read_text().splitlines()
    content = json.loads(last)
    content["settings"] |= settings
    path.write_text("\n".join([*before, json.dumps(content)]) + "\n")


def last_loss_becomes(path, text):
    *before, last = path.read_text().splitlines()
    path.write_text("\n".join([*before, last.replace("0.5,", text)]) + "\n")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (damage, "is damaged"),
        (lambda path: last_loss_becomes(path, "NaN,"), "is damaged"),
        (lambda path: change(path, **{"decor.eta": 0.5}), "decor.eta was 0.5, is 0.01"),
        (lambda path: change(path, **{"decor.old": 1}), "decor.old was 1, is not there"),
        (
            lambda path: path.write_text(
                path.read_text().replace('"study": "made", "arm": "dbp"', '"study": "tiny", "arm": "dbp"')
            ),
            "is a trial of tiny, expected one of made",
        ),
        (
            lambda path: path.write_text(path.read_text().replace('"arm": "dbp"', '"arm": "sgd"')),
            "is of an arm that there is no more: sgd",
        ),
    ],
)
def test_lines_that_cannot_be_used_are_named_and_mixed_with_nothing(tmp_path, capsys, harm, message):
    write_result(tmp_path, "adamw", slope(0))
    path = write_result(tmp_path, "dbp", drop(100))
    harm(path)
    text, found = report_of(tmp_path, code=1)
    assert "dbp" not in found["arms"]
    (left_out,) = found["left_out"]
    assert message in left_out
    assert left_out.startswith(f"{path}:2")
    assert left_out in text
    before = {p: p.read_bytes() for p in path.parent.iterdir()}
    capsys.readouterr()
    assert main(["study", "made", "--arms", "dbp", "--folder", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert {p: p.read_bytes() for p in path.parent.iterdir()} == before


def test_a_trial_that_is_there_twice_counts_once_and_is_named(tmp_path):
    path = write_result(tmp_path, "adamw", slope(0))
    path.write_text(2 * path.read_text())
    text, _ = report_of(tmp_path, code=1)
    assert line_of(text, "AdamW")[2] == "1 (fewer than 3)"
    assert f"{path}:2, adamw_lr0.003_seed0, is there twice" in text


def test_trials_of_several_sources_make_no_report(tmp_path, capsys):
    write_result(tmp_path, "adamw", slope(0))
    change(write_result(tmp_path, "dbp", drop(100)), **{"data.source": "folder:elsewhere"})
    assert main(["study", "made", "--folder", str(tmp_path), "--report"]) == 2
    assert "several sources: folder:elsewhere, photos" in capsys.readouterr().err


def test_a_family_of_ablations_has_no_arms_name():
    assert not pretraining.ABLATIONS.keys() & MADE.every_arm.keys()


def test_the_decorrelation_settings_of_an_arm_without_it_do_not_matter():
    plain, dbp, published = (
        Trial("made", arm, 1e-3, 0).settings({}) for arm in ("adamw", "dbp", "published")
    )
    assert [name for name in plain if name.startswith("decor.")] == ["decor.enable"]
    assert dbp["decor.eta"] == 0.01
    assert published["decor.eta"] == 5e-4
    assert published["published"]
    with pytest.raises(ValueError, match=r"name of a setting.*'decor.speed'"):
        preset.assign(Trial("made", "dbp", 1e-3, 0).config("", {}), "decor.speed", 1, "train.pretrain")
    with pytest.raises(ValueError, match=r"name of a setting.*'seed.x'"):
        preset.assign(Trial("made", "dbp", 1e-3, 0).config("", {}), "seed.x", 1, "train.pretrain")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--arms", "adamw", "sgd"], "expected some of adamw, muon, kron.* got sgd"),
        (["--arms", "rank"], "ablations run at the best rate of decor-adamw"),
        (["vit-s"], "vit-s needs --source, such as folder:PATH"),
        (["--source", "pictures"], "source must be 'photos'"),
        (["--source", "folder:nowhere"], "there is no folder nowhere"),
        (["--seeds", "0", "-1"], "at least 0, got -1"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_written(tmp_path, capsys, options, message):
    folder = tmp_path / "results"
    name = [] if options[0] == "vit-s" else ["made"]
    assert main(["study", *name, *options, "--folder", str(folder)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not folder.exists()


def test_an_arm_that_cannot_be_built_is_not_timed(tmp_path, capsys, monkeypatch):
    wide = Arm("rank 32", {"decor.enable": True, "decor.rank": 32}, (3e-3,))
    monkeypatch.setitem(PRESETS, "made", replace(MADE, arms=MADE.arms | {"dbp-rank32": wide}))
    command = ["study", "made", "--folder", str(tmp_path), "--arms", "dbp-rank32"]
    assert main([*command, "--time", "1"]) == 2
    told = capsys.readouterr().err
    assert "dbp-rank32: building" in told
    assert "rank: expected an integer in [1, 16]" in told
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [(["huge"], "'photos'"), (["--lr", "0"], "above 0"), (["--jobs", "0"], "positive")],
)
def test_the_command_line_refuses_values_out_of_range(capsys, options, message):
    with pytest.raises(SystemExit) as stopped:
        main(["study", *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_study_without_trials_makes_no_report(tmp_path, capsys):
    assert main(["study", "made", "--folder", str(tmp_path), "--report"]) == 2
    assert "runs.jsonl holds no trial that can be used" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


KILLED = """\
import json, os, signal, sys

spec = json.loads(sys.argv[1])
if spec["trial"]["seed"] == 0:
    open(spec["path"] + ".writing", "w").write("{")
    print("something broke", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
content = json.loads(open(os.path.join(os.path.dirname(spec["path"]), "..", "runs.jsonl")).readline())
content |= {"trial": spec["trial"], "settings": content["settings"] | {"seed": 1}}
open(spec["path"], "w").write(json.dumps(content))
"""


def test_a_killed_worker_leaves_no_line_and_stops_no_other_trial(tmp_path, capsys, monkeypatch):
    write_worker(tmp_path, monkeypatch, KILLED)
    file = write_result(tmp_path, "dbp", drop(100), seed=9)
    command = ["study", "made", "--folder", str(tmp_path), "--arms", "dbp", "--lr", "3e-3"]
    assert main([*command, "--seeds", "0", "1", "--jobs", "1"]) == 1
    told = capsys.readouterr().err
    assert "dbp_lr0.003_seed0: FAILED" in told
    assert "something broke" in told
    assert "dbp_lr0.003_seed1: final loss 0.5000" in told
    assert "1 trials failed: dbp_lr0.003_seed0" in told
    assert [json.loads(line)["trial"]["seed"] for line in file.read_text().splitlines()] == [9, 1]
    running = {path.name for path in (tmp_path / "made" / "running").iterdir()}
    assert running == {"dbp_lr0.003_seed0.log", "dbp_lr0.003_seed0.json.writing"}


def test_what_a_worker_left_while_nobody_waited_is_taken_over(tmp_path, capsys, monkeypatch):
    write_worker(tmp_path, monkeypatch, "raise SystemExit(1)")
    file = write_result(tmp_path, "dbp", drop(100))
    running = tmp_path / "made" / "running"
    running.mkdir()
    file.rename(running / "dbp_lr0.003_seed0.json")
    (running / "adamw_lr0.003_seed0.json").write_text("{")  # which is made again
    command = ["study", "made", "--folder", str(tmp_path), "--arms", "dbp", "adamw", "--seeds", "0"]
    assert main([*command, "--jobs", "1"]) == 1
    told = capsys.readouterr().err
    assert "dbp_lr0.003_seed0: started" not in told
    assert "adamw_lr0.003_seed0: started" in told
    (line,) = file.read_text().splitlines()
    assert json.loads(line)["trial"]["arm"] == "dbp"
    assert [path.name for path in running.iterdir()] == ["adamw_lr0.003_seed0.log"]


def test_results_of_several_commands_at_a_time_are_all_kept(tmp_path):
    write_result(tmp_path, "adamw", slope(0), seed=5)
    first, second = Study(tmp_path, "made"), Study(tmp_path, "made")
    (made,) = first.results.values()
    for seed, one in ((6, first), (7, second), (8, first)):
        settings = made.settings | {"seed": seed}
        one.add(replace(made, trial=replace(made.trial, seed=seed), settings=settings))
    assert sorted(found.seed for found in Study(tmp_path, "made").results) == [5, 6, 7, 8]


WAITING = """\
import json, os, sys, time

spec = json.loads(sys.argv[1])
open(spec["path"] + ".pid", "w").write(str(os.getpid()))
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_workers(tmp_path, capsys, monkeypatch, number):
    write_worker(tmp_path, monkeypatch, WAITING)
    runs = tmp_path / "made" / "running"

    def interrupt():
        while sum(path.stat().st_size > 0 for path in runs.glob("*.pid")) < 2:
            stop.wait(0.05)
        os.kill(os.getpid(), number)

    stop = threading.Event()
    threading.Thread(target=interrupt, daemon=True).start()
    before = signal.getsignal(signal.SIGTERM)
    command = ["study", "made", "--folder", str(tmp_path), "--arms", "dbp", "adamw"]
    kept = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell runs us behind
    try:
        assert main([*command, "--jobs", "2"]) == 130
    finally:
        signal.signal(signal.SIGINT, kept)
    assert signal.getsignal(signal.SIGTERM) == before
    assert "stopped" in capsys.readouterr().err
    for path in runs.glob("*.pid"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)
    assert not list(runs.glob("*.json"))
    assert not (tmp_path / "made" / "runs.jsonl").exists()


def test_a_tiny_study_is_filled_listed_continued_timed_and_reported(tmp_path, capsys, monkeypatch):
    write_worker(tmp_path, monkeypatch)
    command = ["study", "tiny", "--arms", "adamw", "dbp", "--folder", str(tmp_path)]
    seeds = ["--seeds", "0", "1"]
    assert main([*command, *seeds, "--list"]) == 0
    told = capsys.readouterr().out
    assert "adamw_lr0.003_seed0: missing" in told
    assert "0 of 2 trials are there" in told
    assert "wait until a best rate is known: adamw, dbp" in told
    file = tmp_path / "tiny" / "runs.jsonl"
    assert main([*command, "--seeds", "0", "--jobs", "2"]) == 0
    before = file.read_text()
    assert {json.loads(line)["trial"]["arm"] for line in before.splitlines()} == {"adamw", "dbp"}
    assert main([*command, *seeds, "--jobs", "2"]) == 0
    assert file.read_text().startswith(before)
    told = capsys.readouterr().err
    assert told.count(": started") == 4
    assert not list((tmp_path / "tiny" / "running").iterdir())
    results = {result.trial.name: result for result in Study(tmp_path, "tiny").results.values()}
    assert results.keys() == {f"{arm}_lr0.003_seed{seed}" for arm in ("adamw", "dbp") for seed in (0, 1)}
    for name, result in results.items():
        assert f"{name}: final loss {result.final:.4f}" in told
        assert (result.outcome, len(result.losses), result.jobs) == (FINISHED, 8, 2)
        assert [item["step"] for item in result.evals] == [0, 4, 8]
        assert all(0 <= item["probe"] <= 1 for item in result.evals)
    assert len(file.read_bytes()) < 4 * 10_000
    finals = {result.final for result in results.values()}
    assert len(finals) == 4
    assert main([*command, *seeds, "--list"]) == 0
    assert "4 of 4 trials are there" in capsys.readouterr().out
    assert main([*command, "--time", "1"]) == 0
    timing = json.loads((tmp_path / "tiny" / "timing.json").read_text())
    assert list(timing["arms"]) == ["adamw", "dbp"]
    assert timing["arms"]["adamw"]["ratio"]["median"] == 1
    text, found = report_of(tmp_path, "tiny")
    by_arm = {
        arm: average([results[f"{arm}_lr0.003_seed{seed}"].losses for seed in (0, 1)])
        for arm in ("adamw", "dbp")
    }
    assert found["target"] == pytest.approx(sum(by_arm["adamw"]) / 8)
    below = [sum(by_arm["dbp"][: i + 1]) / (i + 1) <= found["target"] for i in range(8)]
    expected = next((i + 1 for i in range(8) if all(below[i:])), None)
    row = found["arms"]["dbp"]
    assert row["steps_to_target"] == expected
    if expected:
        median = timing["arms"]["dbp"]["seconds"]["median"]
        assert row["seconds_to_target"] == pytest.approx(expected * median)
    assert line_of(text, DBP, "## Costs")[1].split()[0] == ("not" if expected is None else str(expected))
    assert "was one of 2 trials at a time" in text or "has none" in text


@pytest.mark.parametrize("arm", pretraining.ARMS)
def test_every_arm_can_be_trained(arm, tmp_path):
    loop = trial.prepare(Trial("tiny", arm, 3e-3, 0), str(tmp_path), {"data.source": "photos"})
    loop.task.observes = False
    before = [p.clone() for p in loop.model.parameters()]
    loop.total_steps = 2  # the rate of the first is 0
    loop.train()
    assert any(not torch.equal(p, q) for p, q in zip(loop.model.parameters(), before, strict=True))
    loop.close()


class Repeating(nn.Module):
    """Just enough of a training loop for `cadence`."""

    def __init__(self, optimizer, every=1):
        super().__init__()
        self.optimizer = optimizer
        self.config = Config("", decor=DecorConfig(enable=True, every=every))


def test_arms_are_timed_over_whole_turns(monkeypatch):
    weight = nn.Parameter(torch.ones(2))
    adamw = torch.optim.AdamW([weight])
    assert timing.cadence(Repeating(adamw, every=10), 500) == 10
    monkeypatch.setattr(kron, "has_dynamo", False)  # compiling takes longer than all the steps here

    def updates(optimizer, steps):
        found = 0
        for _ in range(steps):
            weight.grad = torch.ones(2)
            optimizer.step()
            found += optimizer.state[weight]["update_counter"] == 0
        return found

    steps = 1500
    every = timing.cadence(Repeating(timing.Kron([weight])), steps)
    assert every == round(steps / updates(timing.Kron([weight]), steps))
    timed = timing.Kron([weight])
    assert timing.cadence(Repeating(timed), 500) == 1
    assert updates(timed, 20) == 20
    timed = timing.Kron([weight])
    every = timing.cadence(Repeating(timed), 5000)
    assert every > 1
    assert updates(timed, 5 * every) == 5


def test_the_probe_is_deterministic_and_refuses_what_is_not_finite():
    torch.manual_seed(0)
    model = create_mae("mae_vit_tiny", "mae", img_size=16, norm_pix_loss=True, **SMALL["model_args"])
    asks = probe.of_digits(100, (16, 16))
    first = asks(model)
    assert first.keys() == trial.PROBES.keys()
    assert all(0.3 < accuracy <= 1 for accuracy in first.values())  # of ten digits
    torch.rand(7)
    assert asks(model) == first
    assert model.training
    with pytest.raises(ValueError, match="expected 1 to 898 digits, got 1000"):
        probe.of_digits(1000, (16, 16))
    with torch.no_grad():
        model.cls_token.fill_(math.nan)
    assert all(math.isnan(accuracy) for accuracy in asks(model).values())


def test_the_probe_reads_darl_as_in_its_pre_training(monkeypatch):
    model = create_darl("darl_vit_tiny", img_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=2)
    asks = probe.of_digits(100, (16, 16))
    first = asks(model)
    assert 0.3 < first["probe"] <= 1
    features, asked = DARL.features, []

    def seen(self, imgs, is_causal=False):
        asked.append(is_causal)
        return features(self, imgs, is_causal)

    monkeypatch.setattr(DARL, "features", seen)
    assert asks(model) == first
    assert asked == [True, True]  # a hundred images each


def test_the_probe_learns_from_images_of_training_and_is_asked_for_those_held_out(tmp_path):
    names = [f"{label}/{i}.png" for label in ("dark", "light") for i in range(6)]
    for number, name in enumerate(names):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (20, 16), (200 * name.startswith("light") + number,) * 3).save(path)
    training, held_out = [n for n in names if "5" not in n], ["light/5.png", "dark/5.png"]
    asks = probe.of_folder(tmp_path, training, held_out, 4, (16, 16))
    assert (asks.images.shape, asks.known) == ((6, 3, 16, 16), 4)
    assert asks.labels == [0, 0, 1, 1, 1, 0]  # spread over the classes; those held out come last
    assert asks.images[0].mean() < asks.images[2].mean()
    torch.manual_seed(0)
    model = create_mae("mae_vit_tiny", "mae", img_size=16, norm_pix_loss=True, **SMALL["model_args"])
    assert asks(model)["probe"] == 1
    with pytest.raises(ValueError, match="expected a sub-folder for each of two or more classes"):
        probe.of_folder(tmp_path / "dark", ["0.png", "1.png"], ["2.png"], 4, (16, 16))
