"""DBPKERN_AUTOTUNE: what is tried, kept, and left alone. A stand-in for the clock says what is fast."""

import json
import logging
import sys

import pytest
import torch

from dbpkern import distributed, ops
from dbpkern.ops import _dispatch, _triton, _tuning
from dbpkern.ops._dispatch import Tiles

CPU = torch.device("cpu")
SIZES = {"d": 64, "rows": 100}

if torch.cuda.is_available():
    pytest.skip("the logic alone is tested, on the CPU", allow_module_level=True)


@pytest.fixture
def tuning(monkeypatch, tmp_path):
    """Tuning on, its cache in a folder of its own; afterwards nothing is tuned any more."""
    monkeypatch.setenv("DBPKERN_AUTOTUNE", "1")
    monkeypatch.setenv("DBPKERN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_dispatch, "_tuned", {})
    _tuning.choices.cache_clear()
    yield _tuning
    _tuning.choices.cache_clear()


calls = []


def record(backend):
    calls.append(backend)


def stand_in(monkeypatch, eager, triton):
    """Times by backend; `triton` maps tiles to seconds, or to an exception."""
    calls.clear()

    def seconds(run, device):
        run()
        if calls[-1] == "eager":
            return eager
        time = triton(_dispatch._tuned["matmul", "16bit", 64])
        if isinstance(time, Exception):
            raise time
        return time

    monkeypatch.setattr(_tuning, "seconds", seconds)


def best(sizes=SIZES):
    return _tuning.best("fold", "matmul", "16bit", CPU, sizes, record)


def test_the_fastest_tiles_are_taken_and_kept(tuning, monkeypatch):
    favourite = _tuning.trials("matmul", "16bit", 64)[-1]
    stand_in(monkeypatch, 2.0, lambda tiles: 1.0 if tiles == favourite else 3.0)
    assert best() == "triton"
    assert _dispatch.tiles("matmul", "16bit", 64, CPU) == favourite
    assert calls == ["eager"] + ["triton"] * len(_tuning.trials("matmul", "16bit", 64))
    # The same, from the file, without another trial, also for sizes that round up to the same.
    monkeypatch.setattr(_dispatch, "_tuned", {})
    _tuning.choices.cache_clear()
    before = len(calls)
    assert best({"d": 64, "rows": 128}) == "triton"
    assert _dispatch.tiles("matmul", "16bit", 64, CPU) == favourite
    assert len(calls) == before
    assert best({"d": 64, "rows": 129}) == "triton"
    assert len(calls) > before


def test_eager_may_win(tuning, monkeypatch):
    stand_in(monkeypatch, 1.0, lambda tiles: 1.5)
    assert best() == "eager"
    assert _dispatch._tuned == {}


def test_tiles_that_do_not_run_are_passed_over(tuning, monkeypatch):
    trials = _tuning.trials("matmul", "16bit", 64)
    assert len(trials) > 1
    stand_in(monkeypatch, 2.0, lambda tiles: 1.0 if tiles == trials[0] else RuntimeError("out of resources"))
    assert best() == "triton"
    assert _dispatch.tiles("matmul", "16bit", 64, CPU) == trials[0]


def test_several_processes_only_read(tuning, monkeypatch):
    stand_in(monkeypatch, 2.0, lambda tiles: 1.0)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    assert best() is None
    monkeypatch.setattr(distributed, "world_size", lambda: 1)
    assert best() == "triton"
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    assert best() == "triton"
    monkeypatch.delenv("DBPKERN_CACHE")  # a folder of each machine's own: they may differ
    assert best() is None


def test_a_broken_file_is_no_obstacle(tuning, monkeypatch, caplog):
    stand_in(monkeypatch, 2.0, lambda tiles: 1.0)
    file = _tuning.cache_file(CPU)
    file.parent.mkdir(parents=True)
    file.write_text("{")
    with caplog.at_level(logging.WARNING, logger="dbpkern"):
        assert best() == "triton"
    assert "is not read" in caplog.text
    assert list(json.loads(file.read_text())) == ["fold matmul 16bit d=64 rows=128"]


def test_a_folder_that_cannot_be_written(tuning, monkeypatch, tmp_path, caplog):
    stand_in(monkeypatch, 2.0, lambda tiles: 1.0)
    (tmp_path / "cache").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING, logger="dbpkern"):
        assert best() == "triton"
    assert "the next run tunes again" in caplog.text


def test_nothing_is_tried_unless_asked(tuning, monkeypatch):
    def never(*_):
        raise AssertionError("tuned")

    monkeypatch.setattr(_tuning, "best", never)
    ops.fold(torch.randn(4, 3), torch.eye(3))  # the CPU has nothing to tune
    monkeypatch.delenv("DBPKERN_AUTOTUNE")
    monkeypatch.setattr(_dispatch, "pays", lambda *_, **__: True)
    gpu = torch.device("cuda")
    assert _tuning.serving("fold", "", None, "matmul", "16bit", gpu, SIZES, never) == "triton"


def test_the_choice_of_an_op_follows_the_trial(tuning, monkeypatch):
    monkeypatch.setattr(_tuning, "best", lambda *_: "triton")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    gpu = torch.device("cuda")
    assert _tuning.serving("fold", "", None, "matmul", "16bit", gpu, SIZES, record) == "triton"
    assert _tuning.serving("fold", "eager", None, "matmul", "16bit", gpu, SIZES, record) == "eager"
    assert _tuning.serving("fold", "", "no", "matmul", "16bit", gpu, SIZES, record) == "eager"


def test_in_place_ops_are_tried_on_copies(tuning, monkeypatch):
    R, z = torch.eye(20).repeat(2, 1, 1), torch.randn(2, 9, 20)
    tried = []
    monkeypatch.setattr(
        _tuning,
        "serving",
        lambda op, requested, refusal, table, kind, device, sizes, run: (
            requested or (tried.append(run("eager")), "eager")[1]
        ),
    )
    expected = ops.update_(R.clone(), z, 0.1)
    assert tried
    again = R.clone()
    ops.update_(again, z, 0.1)
    assert torch.equal(again, expected)
    M = torch.randn(2, 20, 20)
    once = ops.apply_(R.clone(), M, 0.1)
    torch.testing.assert_close(once, R - 0.1 * M @ R)


def test_the_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("DBPKERN_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _tuning.cache_folder() == tmp_path / "dbpkern"
    monkeypatch.setattr(_triton, "triton", None)
    assert _tuning.cache_file(CPU).name.endswith("triton_none.json")


def test_trials_cover_every_table():
    assert Tiles(128, 128, 64, 8, 3) in _tuning.trials("matmul", "16bit", 768)
    assert all(tiles.m <= 64 for tiles in _tuning.trials("matmul", "16bit", 771))
    assert sys.modules["dbpkern.ops.fold"]
