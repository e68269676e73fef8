"""`python -m bench gpu`, dry: stages in real processes, those that fail, and the budget."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import gpu, gpu_stages
from bench.__main__ import main
from bench.record import Stage

ROOT = Path(__file__).parents[2]


def options(out, **changes):
    names = {"budget": 120.0, "stages": list(gpu.PLANS), "dry": True, "inside": None}
    return argparse.Namespace(out=out, **names | changes)


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path / "rows.json", options(tmp_path), ["gpu"])


def rows_of(stage):
    """What the file holds, which must be all of it at any time."""
    content = json.loads(stage.file.read_text())
    assert content == json.loads(json.dumps(stage.content))
    return content["rows"]


def test_stages_that_die_or_raise_stop_no_other(tmp_path):
    command = [sys.executable, "-m", "bench", "gpu", "--dry", "--out", str(tmp_path), "--budget", "300"]
    done = subprocess.run(
        [*command, "--stages", "small", "graphs", "env"],
        env=os.environ | {gpu.FAULT: "small=die,graphs=raise"},
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=280,
    )
    assert done.returncode == 1, done.stderr
    stages = summary_of(tmp_path)["stages"]
    assert list(stages) == ["small", "graphs", "env"]
    assert stages["small"]["status"] == "failed, exit code 9"
    assert stages["graphs"]["status"] == "failed, exit code 1"
    assert stages["graphs"]["last_line"] == "RuntimeError: a fault for a test"
    assert stages["env"]["status"] == "done"
    assert stages["env"]["file"] == "env.json"
    found = json.loads((tmp_path / "env.json").read_text())
    assert found["dry"] is True
    assert found["machine"]["packages"]["torch"]
    assert [row["ceiling"] for row in found["rows"]] == ["16bit", "tf32", "ieee", "copy"]
    assert "env: done" in done.stderr


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_stage_that_hangs_is_killed_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setenv(gpu.FAULT, "env=hang")
    begin = time.monotonic()
    limit = 15.0
    found = gpu.run_stage("env", options(tmp_path), limit)
    assert found["status"] == "killed after 15 s"
    assert time.monotonic() - begin < 2 * limit
    child = int((tmp_path / "env.log").read_text().split()[-1])
    time.sleep(0.5)
    assert not alive(child)


def test_what_no_longer_fits_is_skipped(tmp_path):
    assert gpu.run(options(tmp_path, budget=1.0), []) == 1
    found = summary_of(tmp_path)
    assert found["seconds"] < 5
    assert list(found["stages"]) == list(gpu.PLANS)
    assert all(one["status"].endswith("s are too few") for one in found["stages"].values())


def test_a_stage_gets_its_share_and_no_more_than_is_left(tmp_path, monkeypatch):
    limits, now = {}, [0.0]

    def run_stage(name, args, limit):
        limits[name] = limit
        now[0] += 3.2  # more than its share
        return {"status": "done", "seconds": 3.2}

    monkeypatch.setattr(gpu, "run_stage", run_stage)
    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(gpu, "PLANS", dict.fromkeys("abcd", gpu.Plan(None, "x.json", 1.0, 1.0)))
    assert gpu.run(options(tmp_path, budget=12.0, stages=list("abcd")), []) == 0
    assert limits == pytest.approx({"a": 3, "b": 3, "c": 3, "d": 2.4})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert main(["gpu", "--out", str(tmp_path / "new")]) == 2
    assert "--dry" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_smoke(stage, monkeypatch):
    monkeypatch.setattr(gpu_stages.problems, "MAKERS", {"sample_rows_": None, "fold": None})
    monkeypatch.setattr(
        gpu_stages.problems, "isolated", lambda work, name, *args, seconds: {"error": "it hangs"}
    )
    gpu_stages.smoke(stage)
    rows = rows_of(stage)
    assert [(row["op"], row["right"], row["error"]) for row in rows] == [
        ("sample_rows_", False, "it hangs"),
        ("fold", False, "it hangs"),
    ]


@pytest.mark.parametrize("name", ["fold", "map_, changes, low rank"])
def test_a_kernel_is_tried(name):
    found = gpu_stages.try_kernel(name, "triton", (1, 12, 32), "cpu", 2)
    assert found["right"]
    assert found["repeats_equal"]
    assert found["error_ratio"] <= 1
    assert found["replay_equal"] == gpu_stages.NEEDS_GPU


def test_ops_are_compared_with_pytorch(stage, monkeypatch):
    monkeypatch.setattr(gpu_stages, "COMPARED", ("adamw_, low rank", "apply_"))
    monkeypatch.setattr(gpu_stages.problems, "isolated", lambda work, *args, seconds: work(*args))
    gpu_stages.compare(stage)
    adamw, apply = rows_of(stage)
    assert adamw["arms"].keys() == {"ours", "triton", "eager", "plain"}
    assert apply["arms"].keys() == {"ours", "eager", "plain"}
    assert all(arm["error_ratio"] <= 1 for row in (adamw, apply) for arm in row["arms"].values())


def test_the_parts_of_a_step(stage):
    gpu_stages.small(stage)
    rows = rows_of(stage)
    assert not [row for row in rows if "error" in row]
    ratios = stage.content["ratios"]
    assert len(ratios) == 1  # both comparisons are of one case
    (of_case,) = ratios.values()
    assert {"Muon", "DecorMuon", "DecorAdamW"} <= of_case.keys()
    parts = of_case["DecorAdamW"]["median_seconds"]
    assert parts["R"] < parts["optimizer"] < parts["step"]
    assert parts["host of step"] > 0
    assert of_case["AdamW, fused"]["ratio"]["median"] == 1
    due = {row["due"] for row in rows if "profile" in row and row["arm"] == "DecorAdamW"}
    assert due == {False, True}
    assert all(row["profile"]["launches"] > 0 for row in rows if "profile" in row)


def test_graphs_need_a_gpu(stage):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    gpu_stages.graphs(stage)
    assert rows_of(stage) == [
        {"due": False, "error": gpu_stages.NEEDS_GPU},
        {"due": True, "error": gpu_stages.NEEDS_GPU},
    ]
