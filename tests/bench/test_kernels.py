"""`python -m bench kernels`: costs, the gate before every time, what is written and what is said of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import kernels, options
from bench.__main__ import main
from dbpkern import ops, problems

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
SHAPE = (2, 12, 32)


@pytest.fixture
def tiny(monkeypatch):
    """The command in this process, on a model of one width, without the machine's ceilings."""
    monkeypatch.setitem(kernels.WIDTHS, "S", (16, 1))
    monkeypatch.setattr(problems, "isolated", lambda work, *args, seconds: work(*args))
    for ceiling in ("matmul_ceiling", "copy_ceiling"):
        monkeypatch.setattr(kernels.measure, ceiling, lambda *args: 1e9)
    return ["kernels", "--device", "cpu", "--model", "S", "--rows", "8", "--rounds", "2", "--no-compile"]


@pytest.mark.parametrize("name", problems.MAKERS)
def test_every_way_to_compute_an_op_is_right(name):
    found = kernels.examine(name, SHAPE, "cpu", 1, compiled=False)
    kernel = {"triton"} & set(problems.kernels(name.partition(",")[0]))
    assert found["arms"].keys() == {"ours", "plain", "eager", *kernel}  # in the interpreter
    for arm in found["arms"].values():
        assert arm["error_ratio"] <= 1
        assert len(arm["seconds"]) == 1


def test_costs():
    L, n, d = SHAPE
    found = kernels.cost(problems.make("transform", L, n, d, CPU))
    assert found["flops"] == 2 * L * n * d**2
    # Rows of 2 bytes are read; R is read; what the formula makes of fp32 copies is written.
    assert found["bytes"] == 2 * L * n * d + 4 * L * d * d + 4 * L * n * d
    assert kernels.cost(problems.make("correlation", L, n, d, CPU))["flops"] == 2 * L * n * d**2


def test_a_wrong_result_gets_no_time_and_fails_the_command(tiny, tmp_path, monkeypatch, capsys):
    right = ops.transform
    monkeypatch.setattr(ops, "transform", lambda x, R, backend: 1.1 * right(x, R, backend=backend))
    assert main([*tiny, "--op", "transform", "fold", "--out", str(tmp_path)]) == 1
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    wrong = [row["arms"]["ours"] for row in rows if row["op"] == "transform"]
    assert len(wrong) == 2  # widths
    assert all("seconds" not in arm and arm["error"].startswith("wrong: its error is") for arm in wrong)
    assert all(row["arms"]["plain"]["seconds"] for row in rows)  # PyTorch's figures stay
    assert "- transform, 3x8x16, ours: wrong" in capsys.readouterr().out
    monkeypatch.undo()


def test_an_op_that_raises_or_hangs_is_an_error(tiny, tmp_path, monkeypatch, capsys):
    def refuse(*args, backend):
        raise ValueError("not today\nand more")

    monkeypatch.setattr(ops, "transform", refuse)
    assert main([*tiny, "--op", "transform"]) == 1
    assert "- transform, 3x8x16, ours: ValueError: not today\n" in capsys.readouterr().out
    monkeypatch.setattr(problems, "isolated", lambda *args, seconds: {"error": f"no answer in {seconds:g} s"})
    assert main([*tiny, "--op", "fold", "--limit", "7"]) == 1
    assert "- fold, 3x8x16: no answer in 7 s\n" in capsys.readouterr().out


def test_what_is_written(tiny, tmp_path, capsys):
    assert main([*tiny, "--op", "fold", "adamw_", "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "kernels.json").read_text())
    assert [(row["op"], row["shape"]) for row in content["rows"]] == [
        ("fold", [3, 8, 16]),
        ("fold", [1, 8, 64]),
        ("adamw_", [3, 8, 16]),
        ("adamw_", [1, 8, 64]),
    ]
    text = (tmp_path / "kernels.md").read_text()
    assert text.count("3x8x16") == 4  # ours against the best, and every way
    assert "![speed-up](kernels.png)" in text
    assert (tmp_path / "kernels.png").stat().st_size > 1000
    assert kernels.tables(content) in capsys.readouterr().out


def test_an_interruption_leaves_what_was_measured(tiny, tmp_path, monkeypatch):
    def stop(work, name, *args, seconds):
        if name == "fold":
            raise KeyboardInterrupt
        return work(name, *args)

    monkeypatch.setattr(problems, "isolated", stop)
    with pytest.raises(KeyboardInterrupt):
        main([*tiny, "--op", "transform", "fold", "--out", str(tmp_path)])
    content = json.loads((tmp_path / "kernels.json").read_text())
    assert [row["op"] for row in content["rows"]] == ["transform", "transform"]


def test_speedups_are_over_the_fastest_of_pytorchs_ways_within_rounds():
    arms = {
        "ours": {"seconds": [1.0, 2.0, 4.0], "error_ratio": 0.5},
        "triton": {"seconds": [0.1, 0.1, 0.1], "error_ratio": 0.5},
        "eager": {"seconds": [2.0, 4.0, 8.0], "error_ratio": 0.5},
        "plain": {"seconds": [9.0, 9.0, 9.0], "error_ratio": 0.5},
        "plain, compiled": {"error_ratio": 3.0, "error": "wrong"},
        "torch.optim.AdamW": {"seconds": [0.1, 0.1, 0.1]},  # computes something else
    }
    assert kernels.best_baseline(arms) == "eager"
    assert kernels.speedup({"arms": arms}) == (2.0, 2.0, 2.0)
    assert kernels.speedup({"arms": {"ours": {"error": "wrong"}}}) is None
    assert kernels.speedup({"error": "it hangs"}) is None


def test_the_compiled_formula_is_right():
    found = kernels.examine("lowrank_fold", SHAPE, "cpu", 1, compiled=True)["arms"]["plain, compiled"]
    if "error" in found:  # only where there is no compiler
        assert "ompiler" in found["error"], found["error"]
    else:
        assert found["error_ratio"] <= 1


def test_fused_adamw_with_maps_is_what_adamw_computes():
    problem = problems.make("adamw_", 1, 4, 16, CPU)
    own, other = problem.fresh(), problem.fresh()
    for count in own[4]:
        count.fill_(1.0)
    for moment in (*own[2], *own[3]):
        moment.zero_()
    ops.adamw_(*own, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01)  # PyTorch's defaults
    kernels.fused_adamw(True, *other)()
    # Decay acts on V here, and inside of the map there.
    torch.testing.assert_close(other[0][0], own[0][0], rtol=0, atol=1e-4)
    assert (other[0][0] - problem.inputs[0][0]).abs().max() > 5e-4


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--op", "matmul"], "invalid choice: 'matmul'"),
        (["--model", "XL"], "invalid choice: 'XL'"),
        (["--rows", "0"], "expected a positive number, got 0"),
    ],
)
def test_bad_arguments(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["kernels", *argv])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_bare_machine_will_do(tmp_path):
    """One with torch, Triton and NumPy: kernels are measured in processes of their own, without a picture."""
    code = f"""
import sys
for name in ("timm", "torchvision", "matplotlib"):
    sys.modules[name] = None  # importing it raises
sys.path.insert(0, {str(ROOT)!r})
from bench import kernels
from bench.__main__ import main
kernels.measure.matmul_ceiling = kernels.measure.copy_ceiling = lambda *args: 1e9
kernels.WIDTHS["S"] = (8, 1)
common = ["--model", "S", "--device", "cpu", "--rows", "8", "--no-compile", "--rounds", "1", "--threads", "1"]
if __name__ == "__main__":
    sys.exit(main(["kernels", *common, "--op", "apply_", "--out", {str(tmp_path)!r}]))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "| apply_ | 3x8x8" in done.stdout
    assert not (tmp_path / "kernels.png").exists()


def test_files_for_options(tmp_path):
    assert options.file(str(tmp_path / "new.json")) == tmp_path / "new.json"
