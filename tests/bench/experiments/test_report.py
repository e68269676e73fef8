"""Reports of studies: made-up curves, and lines that cannot be used."""

import json
import math

import pytest
from PIL import Image
from studies import DBP, HEADER, MADE, drop, line_of, report_of, slope, write_result

from bench.__main__ import main
from bench.experiments import figures, preset, trial
from bench.experiments.preset import Preset, Trial
from bench.experiments.study import Study
from train import pretrain
from train.engine.plots import trailing_mean


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


def test_a_study_without_trials_makes_no_report(tmp_path, capsys):
    assert main(["study", "made", "--folder", str(tmp_path), "--report"]) == 2
    assert "runs.jsonl holds no trial that can be used" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
