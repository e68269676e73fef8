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
    ops = ("correlation", "update_, associated", "fused_step, on chip")
    done = run("-m", "bench", "compile", "--arch", "90", "--op", *ops, "--json", str(file))
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    kernels = report["kernels"]
    assert {kernel["op"] for kernel in kernels} == set(ops)
    assert {kernel["kind"] for kernel in kernels} == {"16bit", "tf32", "ieee"}
    for kernel in kernels:
        assert kernel["spills"] == 0
        assert 0 < kernel["registers"] <= 255
        assert kernel["shared"] <= ahead.SHARED_LIMIT[90]
        assert bool(kernel["tensor_cores"]) or kernel["kind"] == "ieee"
    # Hopper's own instructions where the tiles are large enough.
    wide = [kernel for kernel in kernels if kernel["kind"] == "16bit" and kernel["d"] == 3072]
    assert wide
    assert all("HGMMA" in kernel["tensor_cores"] for kernel in wide)
    assert f"{len(kernels)} kernels compiled, 0 with a failure" in done.stdout


def test_a_configuration_that_spills_fails():
    code = """
import sys
from bench import __main__
from dbpkern.ops import _dispatch
row = {"min_d": 0, "multiple": 1, "m": 256, "n": 256, "k": 32, "warps": 4, "stages": 2}
_dispatch.rows = lambda name, op, kind: [row] if kind == "16bit" else []
sys.exit(__main__.main(["compile", "--arch", "90", "--op", "correlation"]))
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
        "d": 64,
        "kernel": "matmul_kernel",
        "tiles": "",
        "registers": 100,
        "shared": 1000,
        "spills": 0,
        "tensor_cores": "HGMMA",
    }
    return ahead.Resources(**whole | changes)


@pytest.mark.parametrize(
    ("changes", "failure"),
    [
        ({}, None),
        ({"kind": "ieee", "tensor_cores": ""}, None),
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


@pytest.mark.parametrize("arch", sorted(ahead.SHARED_LIMIT))
def test_every_row_of_the_tables_is_compiled(arch):
    constants = {"m": "BLOCK_M", "n": "BLOCK_N", "k": "BLOCK_K"}

    def blocks(launch, field):
        # Square tiles have one name; the kernel on chip has its width for n, and no k.
        return launch.constants.get(constants[field], launch.constants.get("BLOCK"))

    found = ahead.configurations(arch)
    for table in {table for table, _ in ahead.WORKLOADS.values()}:
        for kind in ahead.KINDS:
            launches = [c.launch for c in found if (ahead.WORKLOADS[c.op][0], c.kind) == (table, kind)]
            for row in _dispatch.rows(f"sm_{arch}", table, kind) or ():
                fields = ["m"] if table == "fused_on_chip" else ["m", "n", "k"]
                assert any(
                    all(blocks(launch, field) == row[field] for field in fields)
                    and (launch.warps, launch.stages) == (row["warps"], row["stages"])
                    for launch in launches
                ), (table, kind, row)


@pytest.mark.parametrize("arch", sorted(ahead.SHARED_LIMIT))
def test_rates_are_compiled_as_numbers_and_as_tensors(arch):
    rates = {}
    for c in ahead.configurations(arch):
        if "LR_TENSOR" in c.launch.constants:
            rates.setdefault(c.op, set()).add(c.launch.constants["LR_TENSOR"])
    assert len(rates) == 5
    assert all(kinds == {False, True} for kinds in rates.values())
