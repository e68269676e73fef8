"""Studies of pre-training: arms, workers, a real tiny study, times, probes."""

import json
import math
import os
import signal
import threading
from dataclasses import replace

import pytest
import torch
from PIL import Image
from studies import DBP, MADE, SMALL, drop, line_of, report_of, slope, write_result, write_worker
from timm.optim import kron
from torch import nn

from bench.__main__ import main
from bench.experiments import preset, pretraining, probe, timing, trial
from bench.experiments.preset import PRESETS, Arm, Trial
from bench.experiments.study import FINISHED, Study
from models.darl import DARL, create_darl
from models.mae import create_mae
from train.compare import average
from train.tasks.pretraining import Config, DecorConfig


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
