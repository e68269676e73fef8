"""`python -m bench launches`: in processes of their own, as the tests' own Triton is the interpreter."""

import json
import os
import subprocess
import sys

import pytest

ARMS = (
    "AdamW, fused", "DecorAdamW", "DecorPreconditioner", "DecorPreconditioner, full R, sublayers",
    "published", "Muon", "DecorMuon",
)  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The figures of a small model, by arm and whether R is due."""
    file = tmp_path_factory.mktemp("launches") / "launches.json"
    size = ("--width", "128", "--depth", "2", "--batch", "8")
    done = subprocess.run(
        [sys.executable, "-m", "bench", "launches", *size, "--arms", *ARMS, "--json", str(file)],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
    )
    assert done.returncode == 0, done.stderr
    assert "estimates for h200" in done.stdout
    found = json.loads(file.read_text())
    assert found["gpu"] == "h200"
    assert found["ceilings"]["processors"] == 132
    return {(row["arm"], row["due"]): row for row in found["rows"]}


MAPS = {"map_kernel", "lowrank_map_kernel"}
ADAMW = {"adamw_kernel", "lowrank_adamw_kernel"}
STATISTICS = {"correlation_kernel", "project_kernel", "moments_kernel"}


@pytest.mark.parametrize(
    ("arm", "every_step"),
    [("DecorAdamW", ADAMW), ("DecorPreconditioner", MAPS), ("DecorMuon", MAPS | {"gram_kernel"})],
)
def test_the_default_step_under_autocast_launches_the_kernels(rows, arm, every_step):
    idle, due = rows[arm, False]["launches"], rows[arm, True]["launches"]
    assert every_step <= idle.keys() & due.keys()
    assert not STATISTICS & idle.keys()
    assert STATISTICS | {"rows_kernel", "patches_kernel"} <= due.keys()


@pytest.mark.parametrize(
    "arm", ["DecorAdamW", "DecorPreconditioner", "DecorPreconditioner, full R, sublayers"]
)
def test_launches_beyond_plain_training_are_few(rows, arm):
    for due in (False, True):
        if (arm, due) in rows:
            assert rows[arm, due]["operations_beyond_plain"] <= (120 if due else 40)
            assert rows[arm, due]["launches_beyond_plain"] <= (120 if due else 40)


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm.startswith("Decor")])
def test_no_large_product_of_fp32_is_on_the_path(rows, arm):
    for due in (False, True):
        if (arm, due) in rows:
            assert rows[arm, due]["largest_fp32_product"] <= 2e6


def test_figures_agree(rows):
    plain = rows["AdamW, fused", True]
    assert plain["overhead"] == plain["operations_beyond_plain"] == 0
    assert plain["launches"] == {}
    for (arm, due), row in rows.items():
        base = rows["Muon" if "Muon" in arm else "AdamW, fused", True]
        assert row["overhead"] == pytest.approx(row["milliseconds"] / base["milliseconds"] - 1)
        both = [rows[arm, d]["overhead"] for d in (False, True) if (arm, d) in rows]
        assert row["mean_overhead"] == pytest.approx(sum(both) / len(both))
        assert sum(row["flops"].values()) >= sum(base["flops"].values()) * 0.999, (arm, due)
    assert (
        rows["published", True]["operations_beyond_plain"]
        > 2 * rows["DecorAdamW", True]["operations_beyond_plain"]
    )


def test_the_interpreter_launches_nothing():
    done = subprocess.run(
        [sys.executable, "-m", "bench", "launches"],
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 2
    assert "interpreter" in done.stderr
