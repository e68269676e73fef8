"""Comparison of runs: targets, crossings, averaging."""

import json

import pytest
from PIL import Image

from train import compare
from train.engine.energy import carbon_intensity
from train.engine.plots import trailing_mean


def write_run(
    folder, losses, *, seed=0, decor=None, seconds_per_step=0.5, extra=(), joules=None, country=None
):
    """A run's folder; `joules` are those of a step by kind of device."""
    folder.mkdir()
    config = {"model": "m", "seed": seed, "out": str(folder), "decor": decor or {"enable": False}}
    config["energy"] = {"country": country}
    (folder / "config.yaml").write_text(json.dumps(config))
    records = [
        {
            "kind": "step" if loss else "skip",
            "step": i + 1,
            "loss": loss,
            "seconds": (i + 1) * seconds_per_step,
        }
        for i, loss in enumerate(losses)
    ]
    for record in records[1:] if joules else ():  # counters have not moved in the first step
        record["joules"] = {kind: value * record["step"] for kind, value in joules.items()}
    records.append(
        {"kind": "eval", "step": len(losses), "heldout_loss": 2.0 + seed, "decorrelation_loss": {}}
    )
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*records, *extra]))
    return folder


DBP = {"enable": True, "sites": "sublayers"}


def test_trailing_mean_is_the_mean_of_what_is_there():
    assert trailing_mean([4.0, 2.0, 0.0, 2.0], window=3) == [4.0, 3.0, 2.0, pytest.approx(4 / 3)]
    assert trailing_mean([]) == []


def test_the_first_arm_reaches_its_own_target_at_its_end(tmp_path):
    plain = [1.0 - 0.001 * i for i in range(200)]
    (arm,) = compare.group([compare.read(write_run(tmp_path / "plain", plain))])
    assert arm.final == pytest.approx(sum(plain[-50:]) / 50)
    assert arm.reaches(arm.final) == 200


def test_an_arm_crosses_where_its_smoothed_curve_stays_below(tmp_path):
    plain = write_run(tmp_path / "plain", [1.0] * 200)
    # Below the target from step 101 on, smoothed from step 150 on; a dip before does not count.
    losses = [3.0] * 40 + [-5.0] + [3.0] * 59 + [0.5] * 100
    dbp = write_run(tmp_path / "dbp", losses, decor=DBP, seconds_per_step=1.0)
    arms = compare.group([compare.read(plain), compare.read(dbp)])
    text, rows = compare.table(arms)
    expected = next(
        i + 1
        for i in range(200)
        if all(sum(losses[j - 49 : j + 1]) / 50 <= 1.0 for j in range(max(i, 49), 200))
    )
    assert rows[1]["arm"] == "DBP sublayers"
    assert rows[1]["steps_to_target"] == expected
    assert rows[1]["seconds_to_target"] == expected * 1.0
    assert rows[0]["steps_to_target"] == 1
    assert f"{expected} (" in text


def test_an_arm_that_ends_above_the_target_does_not_reach_it(tmp_path):
    plain = write_run(tmp_path / "plain", [1.0] * 100)
    worse = write_run(tmp_path / "worse", [0.5] * 60 + [2.0] * 40, decor=DBP)
    text, rows = compare.table(compare.group([compare.read(plain), compare.read(worse)]))
    assert rows[1]["steps_to_target"] is None
    assert "not reached" in text


def test_runs_that_differ_in_their_seed_are_averaged(tmp_path):
    runs = [
        write_run(tmp_path / "a", [1.0] * 100, seed=0),
        write_run(tmp_path / "b", [3.0] * 100, seed=1),
        write_run(tmp_path / "c", [1.5] * 100, seed=0, decor=DBP),
    ]
    arms = compare.group([compare.read(run) for run in runs])
    assert [(arm.name, len(arm.runs)) for arm in arms] == [("plain", 2), ("DBP sublayers", 1)]
    assert arms[0].final == pytest.approx(2.0)
    assert arms[0].spread == pytest.approx(2.0)
    assert arms[0].heldout == pytest.approx(2.5)
    assert arms[1].reaches(arms[0].final) == 1


def test_skipped_steps_count_as_steps(tmp_path):
    run = compare.read(write_run(tmp_path / "a", [None, 3.0, None, None, 1.0]))
    assert run.losses == [3.0, 3.0, 3.0, 3.0, 1.0]
    assert run.seconds == [0.5, 1.0, 1.5, 2.0, 2.5]


def test_a_log_without_its_first_steps_is_refused(tmp_path):
    folder = write_run(tmp_path / "a", [1.0, 2.0, 3.0])
    lines = (folder / "log.jsonl").read_text().splitlines(keepends=True)
    (folder / "log.jsonl").write_text("".join(lines[1:]))
    with pytest.raises(ValueError, match="lacks steps: expected 1, found 2"):
        compare.read(folder)


def test_a_log_cut_short_is_read_up_to_the_cut(tmp_path):
    folder = write_run(tmp_path / "a", [1.0, 2.0])
    with (folder / "log.jsonl").open("a") as log:
        log.write('{"kind": "step", "step": 3, "lo')
    assert compare.read(folder).losses == [1.0, 2.0]


def test_the_command_prints_a_table_and_draws(tmp_path, capsys):
    plain = write_run(tmp_path / "plain", [2.0 - 0.01 * i for i in range(100)])
    dbp = write_run(tmp_path / "dbp", [1.795 - 0.01 * i for i in range(100)], decor=DBP)
    out = tmp_path / "plot.png"
    compare.main([str(plain), str(dbp), f"--out={out}", f"--json={tmp_path / 'table.json'}"])
    printed = capsys.readouterr().out
    assert "| plain | 1 |" in printed
    assert "| DBP sublayers | 1 |" in printed
    assert "80 (80%)" in printed
    low, high = Image.open(out).convert("L").getextrema()
    assert high - low > 100
    assert [row["steps_to_target"] for row in json.loads((tmp_path / "table.json").read_text())] == [100, 80]


def test_energy_to_the_target(tmp_path):
    falling = [2.0 - 0.01 * i for i in range(100)]
    faster = [value - 0.205 for value in falling]  # reaches the target after 80 steps
    runs = [
        write_run(tmp_path / "a", falling, seed=0, joules={"cpu": 10.0, "gpu": 30.0}, country="DEU"),
        write_run(tmp_path / "b", falling, seed=1, joules={"cpu": 10.0, "gpu": 50.0}, country="FRA"),
        # What only some runs have measured compares with nothing.
        write_run(tmp_path / "c", faster, decor=DBP, joules={"dram": 1.0, "gpu": 80.0}, country="DEU"),
    ]
    text, rows = compare.table(compare.group([compare.read(run) for run in runs]))
    assert [row["steps_to_target"] for row in rows] == [100, 80]
    assert [row["joules_to_target"] for row in rows] == [4000.0, 6400.0]
    german, french = (carbon_intensity(country)[0] / 3.6e6 for country in ("DEU", "FRA"))
    plain, dbp = (3000 * german + 5000 * french) / 2, 6400 * german
    assert [row["kg_co2_to_target"] for row in rows] == pytest.approx([plain, dbp])
    heading, _, first, second = text.splitlines()[2:]
    assert heading.endswith("| seconds to target | joules to target (gpu) | kg CO2 to target |")
    assert first.endswith(f"| 4000 (100%) | {plain:.3g} (100%) |")
    assert second.endswith(f"| 6400 (160%) | {dbp:.3g} ({dbp / plain:.0%}) |")


def test_energy_without_a_country_shows_no_co2(tmp_path):
    runs = [
        write_run(tmp_path / "a", [1.0] * 60, joules={"gpu": 2.0}, country="DEU"),
        write_run(tmp_path / "b", [2.0] * 60, decor=DBP, joules={"gpu": 2.0}),
    ]
    text, rows = compare.table(compare.group([compare.read(run) for run in runs]))
    assert "joules to target (gpu) |" in text
    assert "CO2" not in text
    assert [row["kg_co2_to_target"] for row in rows] == [None, None]
    # The first arm is at its target after a step in which the counter has not moved: that is not zero joules.
    assert text.splitlines()[-2].endswith("| 1 (100%) | 0.5 (100%) | - |")
    assert text.splitlines()[-1].endswith("| not reached | not reached | not reached |")


def test_energy_that_a_run_lacks_shows_nothing(tmp_path):
    runs = [
        write_run(tmp_path / "a", [1.0] * 60, joules={"gpu": 2.0}, country="DEU"),
        write_run(tmp_path / "b", [1.0] * 60, decor=DBP, country="DEU"),
    ]
    text, rows = compare.table(compare.group([compare.read(run) for run in runs]))
    assert "joules" not in text
    assert "CO2" not in text
    assert {(row["joules_to_target"], row["kg_co2_to_target"]) for row in rows} == {(None, None)}


def test_a_country_without_figures_is_named(tmp_path):
    run = write_run(tmp_path / "a", [1.0] * 3, joules={"gpu": 2.0}, country="XXX")
    with pytest.raises(SystemExit, match="got 'XXX'"):
        compare.main([str(run), f"--out={tmp_path / 'plot.png'}"])
    assert not (tmp_path / "plot.png").exists()


def test_folders_that_are_no_runs(tmp_path):
    with pytest.raises(SystemExit, match="no run at"):
        compare.main([str(tmp_path / "missing")])
    folder = write_run(tmp_path / "empty", [])
    with pytest.raises(SystemExit, match="no finished step"):
        compare.main([str(folder)])


@pytest.mark.parametrize(
    ("decor", "name"),
    [
        ({"enable": False, "sites": "all", "rank": 4}, "plain"),
        ({"enable": True, "sites": ["qkv", "fc1"], "rank": None}, "DBP qkv+fc1"),
        ({"enable": True, "sites": "all", "rank": 64}, "DBP all, rank 64"),
        ({"enable": True, "sites": "all", "rank": {"fc1": 8, "fc2": 64}}, "DBP all, rank fc1 8, fc2 64"),
    ],
)
def test_names_of_arms(decor, name):
    assert compare.describe({"decor": decor}) == name
