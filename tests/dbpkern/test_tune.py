"""`python -m dbpkern.tune`, the problems that it solves, and what a file of it changes."""

import json
import logging
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dbpkern import problems, tune
from dbpkern.ops import _dispatch, _tuned
from dbpkern.ops._dispatch import AUTOMATIC, BACKENDS, Tiles

ROOT = Path(__file__).parents[2]
CPU, GPU = torch.device("cpu"), torch.device("cuda")
NAME = "A GPU of tests"


@pytest.fixture(autouse=True)
def fresh():
    """Nothing is known of files, before and after."""
    for cached in (_tuned.read, _tuned._tell_processes, _tuned._gpu):
        cached.cache_clear()
    yield
    for cached in (_tuned.read, _tuned._tell_processes, _tuned._gpu):
        cached.cache_clear()


@pytest.fixture
def gpu(monkeypatch, tmp_path, caplog):
    """As on a GPU, with an empty cache; returns the file of this GPU."""
    monkeypatch.setenv("DBPKERN_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: NAME)
    caplog.set_level(logging.INFO, "dbpkern")
    return _tuned.tuned_file(NAME)


def entry(**changes):
    sizes = {"m": 64, "n": 64, "k": 32, "warps": 4, "stages": 5}
    return {"kernel": "correlation", "kind": "16bit", "least": 128, "multiple": 16, **sizes, **changes}


def write(file, **changes):
    content = {**_tuned.versions(NAME), "backends": {"correlation": "eager"}, "tiles": [entry()], **changes}
    tune.write(file, content)


# ---- the problems


def test_every_op_with_a_kernel_has_a_problem():
    assert {name.partition(",")[0] for name in problems.MAKERS} >= AUTOMATIC.keys()


@pytest.mark.parametrize("d", [32, 19])
@pytest.mark.parametrize("name", problems.MAKERS)
def test_every_backend_is_right(name, d):
    device = GPU if torch.cuda.is_available() else CPU
    problem = problems.make(name, 2, 20, d, device)
    for backend in ("eager", *problems.kernels(problem.op)):
        if (name, d, backend) != ("lowrank_statistics", 19, "triton"):  # serves multiples of 16
            assert problem.error(problem.call(*problem.fresh(), backend=backend)) <= 1


@pytest.mark.parametrize("name", ["correlation", "map_, gradients", "adamw_, low rank", "sample_rows_"])
def test_a_wrong_result_is_noticed(name):
    problem = problems.make(name, 2, 20, 32, CPU)
    found = problem.call(*problem.fresh(), backend="eager")
    first = found if isinstance(found, torch.Tensor) else found[0]
    first = first if isinstance(first, torch.Tensor) else first[0]
    first.view(-1)[3] += 0.1 * first.abs().max()
    assert 1 < problem.error(found) < math.inf
    first.view(-1)[3] = math.nan
    assert problem.error(found) == math.inf


def test_problems_repeat_themselves_and_keep_their_inputs():
    one, other = (problems.make("map_, gradients", 2, 5, 16, CPU) for _ in range(2))
    one.call(*one.fresh(), backend="eager")
    assert all(map(torch.equal, one.inputs[0], other.inputs[0]))


# ---- candidates


def test_a_candidate_that_hangs_dies_or_raises_is_an_error():
    begin = time.monotonic()
    assert problems.isolated(time.sleep, 600, seconds=1) == {"error": "no answer within 1 s"}
    assert time.monotonic() - begin < 60
    assert problems.isolated(os._exit, 3, seconds=60) == {"error": "the process died, exit code 3"}
    assert problems.isolated(int, "x", seconds=60)["error"].startswith("ValueError: invalid literal")
    assert problems.isolated(dict, [("a", 1)], seconds=60) == {"a": 1}


def row(backend, seconds, error=0.5):
    return {"backend": backend, "seconds": seconds, "eager_seconds": 1.0, "error_ratio": error}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([row("eager", 1), row("triton", 0.5)], 1),
        ([row("eager", 1), row("triton", 2)], 0),
        ([row("eager", 1), row("triton", 0.5, 1.5), row("cuda", 0.7)], 2),
        ([row("eager", 1), row("triton", 0.5, math.inf), {"error": "it hangs"}], 0),
        ([{"error": "memory"}, {"error": "it hangs"}], 0),
        ([row("eager", 1, 3.0), row("triton", 2)], 1),
    ],
)
def test_the_fastest_that_is_right_is_chosen(rows, expected):
    assert tune.choose(rows) is rows[expected]


def run(*options):
    command = [sys.executable, "-m", "dbpkern.tune", *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)


def test_dry_run(tmp_path):
    file = tmp_path / "found.json"
    done = run("--dry", "--ops", "correlation", "sample_rows_", "--out", str(file))
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    content = json.loads(file.read_text())
    assert content["backends"].keys() == {"correlation", "sample_rows_"}
    tried = [found["candidate"] for found in content["rows"] if found["op"] == "correlation"]
    assert tried == ["eager", "triton", "triton 64x64x64x4x4", "triton 128x128x32x8x4"]
    assert all(found["error_ratio"] <= 1 for found in content["rows"])
    assert "written to" in done.stdout
    assert done.stdout.count("right") == 6
    # A process on such a machine would read it.
    found = _tuned.parse(file.read_text(), "dry run", BACKENDS)
    assert found.backends == content["backends"]
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    done = run()
    assert done.returncode == 2
    assert done.stderr == "there is no CUDA GPU here, so nothing can be tuned\n"


# ---- what a file changes


def test_a_file_overrides_choice_and_tiles(gpu, caplog):
    write(gpu, backends={"correlation": "eager", "lowrank_statistics": "cuda"})
    assert _dispatch.preferred("correlation", GPU) == "eager"
    assert _dispatch.preferred("lowrank_statistics", GPU) == "cuda"
    assert _dispatch.preferred("transform", GPU) == AUTOMATIC["transform"]
    assert _dispatch.preferred("lowrank_statistics", GPU, "tf32") == "eager"
    assert _dispatch.preferred("lowrank_statistics", CPU) == "eager"
    assert _dispatch.tiles("correlation", "16bit", 768) == Tiles(64, 64, 32, 4, 5)
    assert _dispatch.tiles("correlation", "16bit", 771) == _dispatch.TILES["correlation", "16bit"][128, 1]
    assert "says which kernels serve" in caplog.text
    with _dispatch.assume((9, 0)):  # a GPU that is not there
        assert _dispatch.preferred("correlation", GPU) == AUTOMATIC["correlation"]
    gpu.unlink()
    assert _dispatch.preferred("correlation", GPU) == "eager"  # it was read once


def test_without_a_file_one_line_tells_what_to_run(gpu, caplog):
    for _ in range(2):
        assert _dispatch.preferred("correlation", GPU) == AUTOMATIC["correlation"]
    assert [record.message for record in caplog.records] == [
        "not tuned on this GPU: run python -m dbpkern.tune"
    ]
    assert caplog.records[0].levelno == logging.INFO


@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: file.write_text("{"),
        lambda file: file.write_text("[]"),
        lambda file: file.mkdir(),
        lambda file: write(file, torch="1.0"),
        lambda file: write(file, gpu="another"),
        lambda file: write(file, backends={"correlation": "magic"}),
        lambda file: write(file, backends=["correlation"]),
        lambda file: write(file, tiles=[entry(m=48)]),
        lambda file: write(file, tiles=[{"kernel": "correlation"}]),
    ],
)
def test_a_bad_file_is_left_out_with_a_warning(gpu, caplog, spoil):
    spoil(gpu)
    assert _dispatch.preferred("correlation", GPU) == AUTOMATIC["correlation"]
    assert _dispatch.tiles("correlation", "16bit", 768) == _dispatch.TILES["correlation", "16bit"][128, 16]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "is left out" in record.message


def test_processes_that_run_together_need_a_named_folder(gpu, monkeypatch, caplog):
    write(gpu)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert _dispatch.preferred("correlation", GPU) == "eager"
    monkeypatch.setenv("DBPKERN_CACHE", "")
    assert _dispatch.preferred("correlation", GPU) == AUTOMATIC["correlation"]
    assert "DBPKERN_CACHE" in caplog.text


@pytest.mark.parametrize(
    ("variables", "folder"),
    [({"DBPKERN_CACHE": "/a"}, "/a"), ({"XDG_CACHE_HOME": "/b"}, "/b/dbpkern"), ({}, "/h/.cache/dbpkern")],
)
def test_where_the_file_lies(monkeypatch, variables, folder):
    for name in ("DBPKERN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/h", **variables}.items():
        monkeypatch.setenv(name, value)
    file = _tuned.tuned_file("NVIDIA H200/x")
    assert str(file.parent) == folder
    assert file.name.startswith(f"NVIDIA_H200_x-torch{torch.__version__.replace('/', '_')}-triton")
