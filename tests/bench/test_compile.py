"""`python -m bench compile`: the shipped kernels pass the compiler, and bad configurations are refused."""

import json
import os
import subprocess
import sys

import pytest
import torch

from bench import compile as ahead
from dbpkern.ops import _dispatch, _triton


def run(*command):
    # The interpreter's kernels cannot be compiled.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)


def test_a_subset_compiles_without_spills(tmp_path):
    file = tmp_path / "report.json"
    ops = ("choose_rates_", "correlation")
    done = run("-m", "bench", "compile", "--arch", "90", "--op", *ops, "--json", str(file))
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    kernels = report["kernels"]
    assert {kernel["op"] for kernel in kernels} == set(ops)
    assert {kernel["kind"] for kernel in kernels} == {"16bit", "tf32", "ieee"}
    for kernel in kernels:
        assert kernel["spills"] == 0
        assert 0 < kernel["registers"] <= 255
        assert kernel["shared"] <= ahead.LIMITS[90].shared_of_program
        assert kernel["resident"] >= 1
        assert bool(kernel["tensor_cores"]) or not kernel["multiplies"]
    # Hopper's own instructions where the tiles are large enough.
    wide = [kernel for kernel in kernels if kernel["multiplies"] and kernel["size"] == [3072]]
    assert {kernel["kernel"] for kernel in wide} == {"correlation_kernel"}
    assert all("HGMMA" in kernel["tensor_cores"] for kernel in wide)
    assert f"{len(kernels)} kernels compiled, 0 with a failure" in done.stdout


def test_a_configuration_that_spills_fails():
    code = """
import sys
from bench import __main__
from dbpkern.ops import _dispatch
from bench import compile
compile.KINDS = {"16bit": compile.KINDS["16bit"]}
compile.WORKLOADS["fold"] = (((768,),), compile.WORKLOADS["fold"][1])
_dispatch.tiles = lambda *_: _dispatch.Tiles(256, 128, 32, 4, 2)
sys.exit(__main__.main(["compile", "--arch", "90", "--op", "fold"]))
"""
    done = run("-c", code)
    assert done.returncode == 1
    assert "loads and stores of spilled registers" in done.stderr


def test_the_interpreter_is_named():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "bench", "compile"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert "nothing can be compiled: TRITON_INTERPRET=1 is set" in done.stderr


def resources(**changes):
    whole = {
        "arch": 90,
        "op": "fold",
        "kind": "16bit",
        "size": (64,),
        "kernel": "matmul_kernel",
        "tiles": "",
        "warps": 8,
        "registers": 100,
        "shared": 1000,
        "spills": 0,
        "multiplies": True,
        "tensor_cores": "HGMMA",
    }
    return ahead.Resources(**whole | changes)


@pytest.mark.parametrize(
    ("changes", "failure"),
    [
        ({}, None),
        ({"multiplies": False, "tensor_cores": ""}, None),
        ({"spills": 3}, "3 loads and stores of spilled registers"),
        ({"shared": 232_449}, "232449 bytes of shared memory, the limit is 232448"),
        ({"arch": 80, "shared": 200_000}, "the limit is 166912"),
        ({"tensor_cores": ""}, "no tensor-core instruction"),
    ],
)
def test_what_fails(changes, failure):
    found = resources(**changes).failure
    assert (found is None) if failure is None else (failure in found)


class Kernel:
    arg_names = ("x", "n", "one", "stride", "far", "scale", "BLOCK")


def test_arguments_are_specialized_as_at_a_launch():
    args = {
        "x": torch.empty(4, dtype=torch.bfloat16, device="meta"),
        "n": 7,
        "one": 1,
        "stride": 48,
        "far": 2**31,
        "scale": 0.5,
    }
    launch = _triton.Launch(Kernel, (1,), args, {"BLOCK": 16}, 4, 2)
    signature, constants, attributes = ahead.specialize(launch)
    assert signature == {
        "x": "*bf16",
        "n": "i32",
        "one": "constexpr",
        "stride": "i32",
        "far": "i64",
        "scale": "fp32",
        "BLOCK": "constexpr",
    }
    assert constants == {(2,): 1, (6,): 16}
    assert set(attributes) == {(0,), (3,), (4,)}


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "resident"),
    [
        (128, 0, 8, 2),
        (129, 0, 8, 1),
        (32, 0, 8, 8),
        (16, 0, 1, 32),
        (32, 100_000, 4, 2),
        (32, 116_000, 4, 1),
    ],
)
def test_resident_programs(registers, shared, warps, resident):
    found = resources(registers=registers, shared=shared, warps=warps)
    assert found.resident == resident


def test_every_row_of_the_tables_is_compiled(monkeypatch):
    asked = set()
    tiles = _dispatch.tiles
    rows = _dispatch.TILES

    def watch(kernel, kind, size):
        asked.update(
            (kernel, kind, row)
            for row, found in rows[kernel, kind].items()
            if found is tiles(kernel, kind, size)
        )
        return tiles(kernel, kind, size)

    monkeypatch.setattr(_dispatch, "tiles", watch)
    ahead.configurations(90)
    assert asked == {(kernel, kind, row) for (kernel, kind), table in rows.items() for row in table}


def test_eta_is_compiled_as_a_number_and_as_a_tensor():
    kinds = {}
    for c in ahead.configurations(90):
        if "ETA_TENSOR" in c.launch.constants:
            kinds.setdefault(c.op, set()).add(c.launch.constants["ETA_TENSOR"])
    assert kinds == {op: {False, True} for op in ("choose_rates_", "fused_step", "lowrank_step_")}
