"""`bench kernels` and `bench report`: costs, the gate, what is written, and what is told of it."""

import dataclasses
import gc
import json
import math
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import accuracy, kernels, measure, options, report, workloads
from bench.__main__ import main
from bench.workloads import Cost, Model
from dbpkern import ops, reference
from dbpkern.ops import _triton

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]
TINY = Model(width=8, depth=2, patch_values=12)
BATCH, TOKENS, SAMPLES, RANK = 4, 50, 20, 3
RUN = ["--model", "tiny", "--batch", "4", "--tokens", "50", "--rank", "3", "--no-compile", "--rounds", "2"]


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setitem(workloads.MODELS, "tiny", TINY)
    monkeypatch.setattr(
        kernels, "measure_ceilings", lambda device: {"ieee": 1e11, "copy": 1e10}
    )  # the real ones take a second


def tiny(op: str, dtype: str = "fp32") -> list[workloads.Workload]:
    return workloads.workloads([op], ["tiny"], [BATCH], [TOKENS], [dtype], RANK)


def arguments(*argv: str):
    parser = kernels.argparse.ArgumentParser()
    kernels.add_arguments(parser)
    return parser.parse_args(["--device", "cpu", *argv])


def judged(workload: workloads.Workload, *names: str) -> dict[str, kernels.Candidate]:
    """Every arm that needs no compiler, or those of these names, checked."""
    inputs = workload.make(CPU, 0)
    found = kernels.candidates(workload, arguments("--no-compile"))
    found = [candidate for candidate in found if not names or candidate.arm.name in names]
    kernels.check(kernels.Gate(workload, inputs), workloads.widen(inputs), found)
    return {candidate.arm.name: candidate for candidate in found}


def flops_of(arm: workloads.Arm, workload: workloads.Workload) -> int:
    """What PyTorch counts in one call."""
    step = arm.prepare(workloads.widen(workload.make(CPU, 0)), 1e-6)
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


class TestCosts:
    def test_layers_of_a_model(self):
        stacks = {name: model.stacks for name, model in workloads.MODELS.items()}
        assert stacks["S"] == [(384, 36), (768, 1), (1536, 12)]
        assert stacks["B"] == [(768, 37), (3072, 12)]  # the patch embedding is as wide as the model
        assert stacks["L"] == [(768, 1), (1024, 72), (4096, 24)]
        assert stacks["H"] == [(588, 1), (1280, 96), (5120, 32)]
        assert TINY.linears == [(24, 8), (8, 8), (32, 8), (8, 32)]

    @pytest.mark.parametrize(
        ("workload", "flops", "moved", "published"),
        [
            # L 2, n 3, d 5: 2 * 2 * 3 * 25; x and z, 30 each, and R, 50.
            (workloads.transform(2, 3, 5, "fp32", "forward"), 300, 4 * 110, 300),
            (workloads.transform(2, 3, 5, "bf16", "backward"), 300, 2 * 60 + 4 * 50, 300),
            # o 7, d 5: 2 * 7 * 25; W, 35, R, 25, and the result, 35.
            (workloads.fold(7, 5, "fp32", "forward"), 350, 4 * 95, 350),
            (workloads.fold(7, 5, "bf16", "forward"), 350, 4 * 60 + 2 * 35, 350),
            # n 3, o 7, d 5: fold 350 and 2 * 3 * 7 * 5; or every row through R, 2 * 3 * 25.
            (workloads.linear(3, 7, 5, "fp32", "forward"), 560, 4 * (15 + 21 + 35 + 25), 360),
            # x, g, dx; W~, dW and R.
            (workloads.linear(3, 7, 5, "fp32", "backward"), 770, 4 * (51 + 70 + 25), 570),
            # Half of the symmetric product: 2 * 3 * 5 * 6; z, 30, M, 50, and a, 10.
            (workloads.correlation(2, 3, 5, "fp32"), 180, 4 * 90, 300),
            (workloads.apply_(2, 5), 500, 4 * 150, 500),
            # z^T (z R), 4 * 3 * 25, is less than M, 3 * 5 * 6, and M R, 2 * 125; z, R twice.
            (workloads.update_(2, 3, 5, "fp32"), 2 * 300, 4 * 130, 2 * (150 + 250)),
            # With 9 rows M is the cheaper way: 9 * 5 * 6 + 250 < 4 * 9 * 25.
            (workloads.update_(1, 9, 5, "bf16"), 520, 2 * 45 + 4 * 50, 450 + 250),
            # All rows, 2 * 9 * 25, then as update_ with 3; x, z, index in 8 bytes, R twice and a.
            (workloads.fused_step(9, 3, 5, "fp32"), 450 + 300, 4 * 145 + 8 * 3, 450 + 300 + 250),
            # Rank 2: x Q, T Q^T, 2 * 3 * 5 * 2 each, and T S, 2 * 3 * 4.
            (
                workloads.lowrank_transform(2, 3, 5, 2, "fp32", "forward"),
                2 * (60 + 60 + 24),
                4 * (60 + 2 * 14),
                300,
            ),
            (workloads.lowrank_fold(7, 5, 2, "fp32", "forward"), 140 + 140 + 56, 4 * (70 + 14), 350),
            # P and Y, 60 each, and half of B, 3 * 2 * 3; x, Q, Y, B, c.
            (
                workloads.lowrank_statistics(2, 3, 5, 2, "bf16"),
                2 * (120 + 18),
                2 * 30 + 4 * 2 * (10 + 10 + 4 + 5),
                600,
            ),
            # 11 products of d r^2, 10 of r^3; Q and S twice, Y, B, c.
            (workloads.lowrank_step_(2, 5, 2), 2 * (220 + 80), 4 * 2 * (30 + 12 + 5), 500),
        ],
        ids=lambda value: value.describe() if isinstance(value, workloads.Workload) else "",
    )
    def test_by_hand(self, workload: workloads.Workload, flops: int, moved: int, published: int):
        assert workload.cost == Cost(flops, moved)
        assert workload.published_flops == published

    def test_update_of_vit_b(self):
        stacks = workloads.MODELS["B"].stacks
        update = workloads.model_update(stacks, 1280, "fp32", 64)
        z = 2 * 1280 * (37 * 768**2 + 12 * 3072**2)
        small = 37 * (1280 * 768 * 769 + 2 * 768**3)  # more rows than features: M first
        large = 12 * 4 * 1280 * 3072**2
        assert update.cost.flops == z + small + large
        matrices = 37 * 768**2 + 12 * 3072**2
        assert update.cost.bytes == 4 * 1280 * (37 * 768 + 12 * 3072) + 8 * matrices
        assert update.published_flops == 2 * z + 2 * (37 * 768**3 + 12 * 3072**3)
        assert update.published_flops / update.cost.flops == pytest.approx(1.44, abs=0.005)
        (low,) = {arm.cost for arm in update.arms if arm.group == "rank 64"}
        rows = 4 * 1280 * 64 + 1280 * 64 * 65 // 768  # per feature, the second term only about
        assert low.flops == pytest.approx((rows + 11 * 64**2) * (37 * 768 + 12 * 3072), rel=0.02)
        factors = 8 * (37 * (768 * 64 + 64**2) + 12 * (3072 * 64 + 64**2))
        assert low.bytes == 4 * 1280 * (37 * 768 + 12 * 3072) + factors

    @pytest.mark.parametrize("dtype", ["fp32", "bf16"])
    @pytest.mark.parametrize("op", workloads.OPS)
    def test_published_arms_spend_what_is_stated(self, op: str, dtype: str):
        for workload in tiny(op, dtype):
            for arm in workload.arms:
                if arm.name in ("published", "published bf16"):
                    assert flops_of(arm, workload) == workload.published_flops

    @pytest.mark.parametrize("op", workloads.OPS)
    def test_the_best_algebra_takes_the_cheaper_association(self, op: str):
        """With all of a symmetric product, which no product of PyTorch halves."""

        def update(n: int, d: int) -> int:
            return min(2 * n * d**2 + 2 * d**3, 4 * n * d**2)

        def expected(workload: workloads.Workload, arm: workloads.Arm) -> int:
            sizes = workload.sizes
            L, n, d, r = (sizes.get(name, 0) for name in ("L", "n", "d", "r"))
            if op == "correlation":
                return L * 2 * n * d**2
            if op == "update_":
                return L * update(n, d)
            if op == "fused_step":
                return 2 * n * d**2 + update(sizes["n_s"], d)
            if op == "lowrank_statistics":
                return L * (4 * n * d * r + 2 * n * r**2)
            if op == "model_update" and arm.group:
                statistics = sum(L * (4 * n * d * RANK + 2 * n * RANK**2) for d, L in TINY.stacks)
                return statistics + sum(L * (16 * d * RANK**2 + 35 * RANK**3) for d, L in TINY.stacks)
            if op == "model_update":
                return sum(L * (2 * n * d**2 + update(n, d)) for d, L in TINY.stacks)
            return workload.cost.flops

        for workload in tiny(op):
            arms = [arm for arm in workload.arms if arm.family == "baddbmm"]
            assert bool(arms) == (op != "lowrank_step_")
            for arm in arms:
                assert flops_of(arm, workload) == expected(workload, arm), workload.describe()

    def test_every_shape_once(self):
        chosen = workloads.workloads(["apply_", "update_"], ["S"], [64, 256], [50, 197], ["fp32"], 64)
        assert [(w.op, w.sizes) for w in chosen] == [
            ("apply_", {"L": 36, "d": 384}),
            ("apply_", {"L": 12, "d": 1536}),
            *(
                ("update_", {"L": L, "n": n, "d": d})
                for n in (320, 1261, 1280, 5043)  # a tenth of batch times tokens, rounded
                for L, d in ((36, 384), (12, 1536))
            ),
        ]
        assert chosen[-1].where == {"model": "S", "batch": 256, "tokens": 197}


class TestAccuracy:
    def test_tf32_keeps_ten_bits(self):
        exact = torch.tensor([1.0, -1 - 2**-10, 3 * 2.0**20, 0.0])
        assert torch.equal(accuracy.round_tf32(exact), exact)
        rounded = accuracy.round_tf32(torch.tensor([1 + 2**-11, 1 + 2**-12, -1 - 3 * 2**-12]))
        assert torch.equal(rounded, torch.tensor([1 + 2**-10, 1, -1 - 2**-10]))
        x = torch.randn(1000)
        assert ((accuracy.round_tf32(x) - x).abs() <= x.abs() * 2**-11).all()

    def test_operands_are_rounded_and_nothing_else(self):
        a, b = torch.randn(2, 7, 7)
        with accuracy.RoundedOperands("16bit"):
            found, added = a @ b, a + b
        expected = a.bfloat16().double() @ b.bfloat16().double()
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)
        assert torch.equal(added, a + b)
        with accuracy.RoundedOperands("ieee"):
            assert torch.equal(a @ b, torch.mm(a, b))

    def test_error_and_limit(self):
        truth = torch.tensor([1.0, -4.0], dtype=torch.float64)
        assert accuracy.error(torch.tensor([1.5, -4.0]), truth) == 0.125
        assert accuracy.error(torch.tensor([math.nan, -4.0]), truth) == math.inf
        assert accuracy.error(torch.tensor([math.inf, -4.0]), truth) == math.inf
        assert accuracy.error(torch.tensor([1.0]), truth) == math.inf
        limit = accuracy.limit(torch.tensor([1.5, -4.0]), truth, torch.float32)
        assert limit == 2 * 0.125 + 4 * 2**-23
        # The yardstick is rounded to the dtype of the result, too: 1 + 2^-9 is no bfloat16.
        truth = torch.tensor([1 + 2**-9], dtype=torch.float64)
        assert accuracy.limit(truth.float(), truth, torch.bfloat16) == pytest.approx(
            2**-8 + 4 * 2**-7, rel=0.01
        )


def test_the_truth_is_the_specification():
    R, Q = torch.randn(2, 5, 5).double(), torch.linalg.qr(torch.randn(2, 5, 3).double())[0]
    S, W = torch.randn(2, 3, 3).double(), torch.randn(2, 4, 5).double()
    for n in (1, 4, 5, 9):  # fewer rows than features, as many, more
        z = torch.randn(2, n, 5).double()
        torch.testing.assert_close(workloads.exact_update(R, z, 0.3), reference.update(R, z, 0.3))
        torch.testing.assert_close(workloads.mean_squares(z), reference.correlation(z)[1])
        for found, expected in zip(
            workloads.exact_statistics(z, Q), reference.lowrank_statistics(z, Q), strict=True
        ):
            torch.testing.assert_close(found, expected)
        torch.testing.assert_close(workloads.exact_lowrank(z, Q, S.mT), reference.lowrank_transform(z, Q, S))
    torch.testing.assert_close(workloads.exact_lowrank(W, Q, S), reference.lowrank_fold(W, Q, S))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("op", workloads.OPS)
def test_all_arms_are_right(op: str, dtype: str):
    for workload in tiny(op, dtype):
        found = judged(workload)
        wrong = {name: c.found["failed"] for name, c in found.items() if "failed" in c.found}
        assert wrong == {}, workload.describe()
        measured = {name for name, candidate in found.items() if candidate.valid}
        assert {"ours", "ours eager", "published"} <= measured
        assert ("baddbmm" in measured) == (op != "lowrank_step_")
        layers = workload.dtype == "bf16" and workload.mode != "step"  # where autocast has a say
        assert ("published bf16" in measured) == layers
        for candidate in found.values():
            if candidate.valid:
                assert candidate.found["error"] <= candidate.found["limit"] < 0.1


def scaled(name: str, factor: float):
    """The op with a result that is too large."""
    right = getattr(ops, name)

    def wrong(*args, **kwargs):
        found = right(*args, **kwargs)
        first, *others = found if isinstance(found, tuple) else (found,)
        return (first * factor, *others) if others else first * factor

    return wrong


def wrong_rate(name: str, place: int, factor: float):
    """The op with another rate."""
    right = getattr(ops, name)

    def wrong(*args, **kwargs):
        args = list(args)
        args[place] *= factor
        return right(*args, **kwargs)

    return wrong


@pytest.mark.parametrize(
    ("op", "wrong"),
    [
        ("transform", lambda: scaled("transform", 1.0001)),
        ("fold", lambda: scaled("fold", 1.0001)),
        ("correlation", lambda: scaled("correlation", 1.0001)),
        ("fused_step", lambda: wrong_rate("fused_step", 3, 1.01)),
        ("apply_", lambda: wrong_rate("apply_", 2, 1.01)),
        ("update_", lambda: wrong_rate("update_", 2, 1.01)),
        ("lowrank_transform", lambda: scaled("lowrank_transform", 1.0001)),
        ("lowrank_fold", lambda: scaled("lowrank_fold", 1.0001)),
        ("lowrank_statistics", lambda: scaled("lowrank_statistics", 1.0001)),
        ("lowrank_step_", lambda: wrong_rate("lowrank_step_", 1, 1.01)),
    ],
)
def test_a_wrong_result_is_found(op: str, wrong, monkeypatch):
    monkeypatch.setattr(ops, op, wrong())
    for workload in tiny(op):
        found = judged(workload)
        assert "of the largest value" in found["ours"].found["failed"], workload.describe()
        assert found["published"].valid


def test_a_wrong_result_of_bf16_rows_is_found(monkeypatch):
    monkeypatch.setattr(ops, "update_", wrong_rate("update_", 2, 1.1))
    for workload in [*tiny("update_", "bf16"), *tiny("model_update", "bf16")]:
        assert "failed" in judged(workload)["ours"].found


def its_input(name: str):
    """The low-rank op as if S were zero and the step nothing."""

    def wrong(A, *args, **kwargs):
        if name == "lowrank_fold":
            return A.to(args[2])
        if name == "lowrank_statistics":
            (Q,) = args
            c = A.float().square().mean(1)
            return Q.mT @ (c[:, :, None] * Q), c[:, :, None] * Q, c  # as of uncorrelated features
        return None if name == "lowrank_step_" else A

    return wrong


def transposed(name: str):
    """The low-rank op with S transposed."""
    right = getattr(ops, name)

    def wrong(*args, **kwargs):
        if name == "lowrank_step_":
            for stack in args[0]:
                stack[1].copy_(stack[1].mT.clone())
            return right(*args, **kwargs)
        A, Q, S, *others = args
        return right(A, Q, S.mT.contiguous(), *others, **kwargs)

    return wrong


@pytest.fixture
def _not_interpreted(monkeypatch):
    """Triton's interpreter is slow, and a run on the CPU does not have it."""
    monkeypatch.setattr(_triton, "INTERPRETED", False)


@pytest.mark.usefixtures("_not_interpreted")
class TestLowRankOfWidths:
    """The correction of a low-rank R is so large that bf16 does not hide it, whatever the width."""

    @staticmethod
    def bf16(op: str, d: int) -> list[workloads.Workload]:
        r = 64
        if op == "lowrank_step_":
            return [workloads.lowrank_step_(1, d, r)]  # fp32 always
        if op == "lowrank_statistics":
            return [workloads.lowrank_statistics(1, 320, d, r, "bf16")]
        if op == "model_update":
            return [workloads.model_update([(d, 1)], 320, "bf16", r)]
        make = workloads.lowrank_fold if op == "lowrank_fold" else workloads.lowrank_transform
        lead = (5,) if op == "lowrank_fold" else (2, 5)
        return [make(*lead, d, r, "bf16", mode) for mode in ("forward", "backward")]

    @pytest.mark.parametrize("d", [768, 3072])
    @pytest.mark.parametrize(
        ("op", "changed", "wrong"),
        [
            ("lowrank_transform", "lowrank_transform", its_input),
            ("lowrank_transform", "lowrank_transform", transposed),
            ("lowrank_fold", "lowrank_fold", its_input),
            ("lowrank_fold", "lowrank_fold", transposed),
            ("lowrank_statistics", "lowrank_statistics", its_input),
            ("lowrank_step_", "lowrank_step_", its_input),
            ("lowrank_step_", "lowrank_step_", transposed),
            ("model_update", "lowrank_statistics", its_input),
            ("model_update", "lowrank_step_", its_input),
            ("model_update", "lowrank_step_", transposed),
        ],
    )
    def test_wrong_ones_are_found(self, op: str, changed: str, wrong, d: int, monkeypatch):
        name = "ours rank 64" if op == "model_update" else "ours"
        chosen = self.bf16(op, d)
        right = [judged(workload, name)[name].found for workload in chosen]
        assert all("failed" not in found for found in right), right
        if op == "model_update" and changed == "lowrank_step_":
            name = "baddbmm rank 64"  # which calls the op, too
            assert "failed" not in judged(chosen[0], name)[name].found
        replacement = wrong(changed)
        monkeypatch.setattr(ops, changed, lambda *args, backend=None, **kwargs: replacement(*args, **kwargs))
        for workload in chosen:
            found = judged(workload, name)[name].found
            assert "of the largest value" in found["failed"], workload.describe()
            assert found["error"] > 4 * found["limit"]


def test_a_wrong_last_layer_is_found(monkeypatch):
    right = ops.update_

    def wrong(R, z, lr, **kwargs):
        right(R[:-1], z[:-1], lr, **kwargs)  # one layer too few
        return R

    monkeypatch.setattr(ops, "update_", wrong)
    for workload in tiny("model_update"):
        found = judged(workload)
        assert "failed" in found["ours"].found
        assert found["ours rank 3"].valid


@pytest.mark.parametrize("result", [torch.full((6, 20, 8), math.nan), torch.zeros(6, 19, 8)])
def test_no_number_and_no_shape_pass(result: torch.Tensor, monkeypatch):
    monkeypatch.setattr(ops, "transform", lambda x, R, backend: result)
    workload = workloads.transform(6, 20, 8, "fp32", "forward")
    assert "expected finite values [3, 20, 8]" in judged(workload)["ours"].found["failed"]


def test_layers_checked():
    assert [workloads.checked_layers(n) for n in (1, 2, 3, 37)] == [[0], [0, 1], [0, 1, 2], [0, 18, 36]]


def test_steps_leave_the_inputs_of_the_check_alone():
    (workload, _) = tiny("update_")
    inputs = workload.make(CPU, 0)
    before = {name: x.clone() for name, x in inputs.items()}
    found = kernels.candidates(workload, arguments("--no-compile"))
    kernels.check(kernels.Gate(workload, inputs), inputs, found)
    assert all(torch.equal(inputs[name], x) for name, x in before.items())


class TestBackends:
    def test_unable_ones_say_why(self, monkeypatch):
        def transform(x, R, backend):
            if backend == "cuda":
                raise ValueError("transform: no such backend\nat all")
            if backend == "triton":
                raise RuntimeError("launch failed")
            return x @ R.mT

        monkeypatch.setattr(ops, "transform", transform)
        found = judged(workloads.transform(2, 3, 5, "fp32", "forward"))
        assert found["ours cuda"].found["refused"] == "transform: no such backend"
        # It could serve, and did not.
        assert found["ours triton"].found["failed"] == "RuntimeError: launch failed"

    def test_the_only_one_is_not_timed_twice(self, monkeypatch):
        def serving(*names: str | None):
            def transform(x, R, backend):
                if backend not in names:
                    raise ValueError("cannot")
                return x @ R.mT

            monkeypatch.setattr(ops, "transform", transform)
            found = judged(workloads.transform(2, 3, 5, "fp32", "forward"))
            kernels._skip_doubles(list(found.values()))
            return {name for name, c in found.items() if c.valid and c.arm.family == "ours"}

        assert serving(None, "eager") == {"ours"}
        assert serving(None, "eager", "triton") == {"ours", "ours eager", "ours triton"}


class TestMeasures:
    def test_operators_within_an_operator_count(self):
        x, R = torch.randn(1, 20, 8), torch.eye(8)[None]
        count, peak = measure.count_step(lambda: torch.bmm(x, R).exp(), CPU)
        assert (count, peak) == (2, 2 * 4 * 160)
        count, _ = measure.count_step(lambda: ops.transform(x, R), CPU)
        assert count >= 1

    def test_calls_take_turns(self):
        calls = []
        steps = [lambda i=i: calls.append(i) for i in range(3)]
        assert measure.cold_seconds(steps, CPU, 5, None) > 0
        assert calls == [0, 1, 2, 0, 1]

    def test_settings_are_put_back(self):
        before = torch.get_float32_matmul_precision()
        with measure.matmul_setting("tf32"):
            assert torch.get_float32_matmul_precision() == "high"
            with measure.matmul_setting("ieee"):
                assert torch.get_float32_matmul_precision() == "highest"
            assert torch.get_float32_matmul_precision() == "high"
        assert torch.get_float32_matmul_precision() == before

    def test_rates_and_shares(self):
        (workload, _) = tiny("apply_")
        found = kernels.candidates(workload, arguments("--no-compile"))
        by_name = {candidate.arm.name: candidate for candidate in found}
        by_name["ours"].found["seconds"] = [1.0, 2.0, 4.0]
        by_name["published"].found["seconds"] = [2.0, 2.0, 2.0]
        kernels._evaluate(workload, found, {"ieee": 2 * workload.cost.flops, "copy": workload.cost.bytes})
        ours = by_name["ours"].found
        assert ours["median_seconds"] == 2.0
        assert ours["speedup"] == {"low": 0.75, "median": 1.0, "high": 1.5}  # of 2, 1 and 0.5
        assert ours["flops_per_second"] == workload.cost.flops / 2
        assert (ours["flop_share"], ours["byte_share"]) == (0.25, 0.5)
        assert "median_seconds" not in by_name["baddbmm"].found


def test_what_is_measured_by_default():
    cpu = kernels.selected(arguments())
    assert cpu[0].op == "model_update"
    assert cpu[0].sizes == {"L[768]": 37, "L[3072]": 12, "n": 1280}
    assert {w.op for w in cpu} == set(workloads.OPS)
    assert {w.where["model"] for w in cpu[1:]} == {"S"}
    args = arguments()
    args.device = torch.device("cuda")
    gpu = kernels.selected(args)
    assert {w.op for w in gpu} == set(workloads.OPS)
    updates = [w.where for w in gpu if w.op == "model_update"]
    assert len(updates) == len(workloads.MODELS) * 3 * 2
    assert {w.dtype for w in gpu} == {"bf16", "fp32"}  # apply_ knows fp32 alone
    (chosen,) = kernels.selected(arguments("--op", "model_update", "--model", "L"))
    assert chosen.where == {"model": "L", "batch": 256, "tokens": 50}


@pytest.mark.parametrize("op", ["apply_", "update_", "lowrank_step_", "model_update"])
def test_timed_steps_leave_the_inputs_where_they_are(op: str):
    for workload in tiny(op):
        inputs = workload.make(CPU, 0)
        before = {name: inputs[name].clone() for name in workload.mutates}
        for arm in workload.arms:
            if arm.backend is None and not arm.compiled:
                step = arm.prepare(inputs, kernels.TIMED_RATE)
                for _ in range(5):
                    step()
        for name, x in before.items():
            torch.testing.assert_close(inputs[name], x, rtol=0, atol=1e-4 * float(x.abs().max()))


class Caused(RuntimeError):
    """An error as a compiler passes it on."""

    def __init__(self, text: str) -> None:
        super().__init__("backend='inductor' raised")
        self.__cause__ = RuntimeError(text)


class TestExcuses:
    @pytest.mark.parametrize(
        ("fields", "error", "fate"),
        [
            ({}, torch.OutOfMemoryError("full"), "refused"),
            ({}, NotImplementedError("aten::bmm"), "failed"),
            ({"halves": True}, NotImplementedError("aten::bmm.dtype"), "refused"),
            ({"halves": True}, RuntimeError("shapes do not fit"), "failed"),
            ({"halves": True}, TypeError("no argument out_dtype"), "failed"),
            ({"halves": True}, ValueError("wrong"), "failed"),
            ({"compiled": True}, Caused("No working C++ compiler found in config"), "refused"),
            ({"compiled": True}, RuntimeError("Failed to find C compiler. Please"), "refused"),
            ({"compiled": True}, Caused("shapes do not fit"), "failed"),
            ({"compiled": True}, ValueError("wrong"), "failed"),
            ({"compiled": True}, NotImplementedError("wrong"), "failed"),
            ({}, RuntimeError("No working C++ compiler found"), "failed"),
            ({"backend": "cuda"}, ValueError("no such device"), "refused"),
            ({"backend": "cuda"}, RuntimeError("launch failed"), "failed"),
            ({}, ValueError("no backend"), "failed"),
        ],
    )
    def test_only_what_is_expected(self, fields: dict, error: Exception, fate: str):
        def prepare(inputs, lr):
            raise error

        (workload, _) = tiny("apply_")
        arm = workloads.Arm("baddbmm", prepare, **fields)
        candidate = kernels.Candidate(arm, "ieee", {})
        inputs = workload.make(CPU, 0)
        kernels.check(kernels.Gate(workload, inputs), inputs, [candidate])
        assert candidate.found.keys() == {fate}

    def test_a_missing_compiler_says_so(self, tmp_path):
        """In the words that are looked for."""
        code = """
import torch
from bench import kernels, workloads
arm = workloads.Arm("published", None, compiled=True)
try:
    torch.compile(lambda x: x.sin() + 1)(torch.ones(9))
except Exception as error:
    print(kernels.excused(arm, error))
"""
        environment = os.environ | {"CXX": "/no/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT
        )
        assert done.stdout == "True\n", done.stderr

    @pytest.mark.usefixtures("_not_interpreted")
    def test_a_broken_baseline_fails_the_run(self, capsys, monkeypatch):
        right = workloads.product

        def product(a, b, out, halves):
            if halves:
                raise RuntimeError("broken")
            return right(a, b, out, halves)

        monkeypatch.setattr(workloads, "product", product)
        assert main(["kernels", "--device", "cpu", *RUN, "--op", "transform", "--dtype", "bf16"]) == 1
        assert "FAILED: baddbmm bf16 (bf16): RuntimeError: broken" in capsys.readouterr().out

    def test_long_reasons_are_cut(self):
        assert len(kernels._reason(RuntimeError("word " * 999))) < 250


def out_of_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")


@pytest.mark.usefixtures("_not_interpreted")
@pytest.mark.parametrize("place", ["make", "widen", "judge"])
def test_a_workload_too_large_for_memory_is_left_out(place: str, tmp_path, capsys, monkeypatch):
    first, second = tiny("apply_")
    chosen = [first, second]
    if place == "make":
        chosen[0] = dataclasses.replace(first, make=out_of_memory)
    else:
        owner, right = (
            (workloads, workloads.widen) if place == "widen" else (kernels.Gate, kernels.Gate.judge)
        )
        calls = []

        def once(*args):
            calls.append(place)
            return out_of_memory() if len(calls) == 1 else right(*args)

        monkeypatch.setattr(owner, place, once)
    monkeypatch.setattr(kernels, "selected", lambda args: chosen)
    path = tmp_path / "kernels.json"
    assert main(["kernels", "--device", "cpu", *RUN, "--out", str(path)]) == 0
    reason = "OutOfMemoryError: CUDA out of memory. Tried to allocate"
    assert f"Not measured: {reason}" in capsys.readouterr().out
    lost, found = json.loads(path.read_text())["results"]
    assert (lost["refused"], lost["arms"], lost["sizes"]) == (reason, [], first.sizes)
    assert all("seconds" in arm for arm in found["arms"] if arm["arm"] == "published")
    assert main(["report", str(path)]) == 0
    section = capsys.readouterr().out.partition("### Not measured")[2].partition("###")[0]
    assert section.count(reason) == 1


class TestReplays:
    @staticmethod
    def replayed(monkeypatch, play, op: str = "update_") -> kernels.Candidate:
        """Ours as if captured, with `play(step, outputs, turn)` for a replay."""

        def graph_replay(prepare):
            step = prepare()
            outputs, turns = [x.clone() if isinstance(x, torch.Tensor) else x for x in step()], []

            def replay():
                turns.append(None)
                play(step, outputs, len(turns))

            replay.outputs = outputs
            return replay

        monkeypatch.setattr(measure, "graph_replay", graph_replay)
        (workload, *_) = tiny(op)
        candidate = next(c for c in kernels.candidates(workload, arguments()) if c.arm.name == "ours eager")
        inputs = workload.make(CPU, 0)
        before = {name: x.clone() for name, x in inputs.items()}
        kernels.check_replay(kernels.Gate(workload, inputs), inputs, candidate)
        assert all(torch.equal(inputs[name], x) for name, x in before.items())
        return candidate

    @staticmethod
    def right(step, outputs, turn):
        for output, found in zip(outputs, step(), strict=True):
            output.copy_(found)

    @pytest.mark.parametrize("op", ["transform", "update_", "lowrank_step_"])
    def test_right_ones_pass(self, op: str, monkeypatch):
        candidate = self.replayed(monkeypatch, self.right, op)
        assert candidate.valid
        assert candidate.found["error"] <= candidate.found["limit"]

    def test_one_that_does_nothing_fails(self, monkeypatch):
        candidate = self.replayed(monkeypatch, lambda step, outputs, turn: None)
        assert candidate.found["failed"].startswith("replayed as a CUDA graph: expected finite values")

    def test_one_that_is_right_once_fails(self, monkeypatch):
        def play(step, outputs, turn):
            self.right(step, outputs, turn)
            if turn > 1:
                outputs[0].mul_(1.01)

        candidate = self.replayed(monkeypatch, play)
        assert candidate.found["failed"].startswith("replayed as a CUDA graph: its error is")

    def test_a_replay_keeps_what_it_reads(self, monkeypatch):
        class Stream:
            def wait_stream(self, other):
                pass

        class Graph:
            def replay(self):
                return "nothing"

        class Within:
            def __init__(self, *args, **kwargs):
                pass

            def __enter__(self):
                pass

            def __exit__(self, *exception):
                pass

        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "current_stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", Within)
        monkeypatch.setattr(torch.cuda, "graph", Within)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        seen = []

        def prepare():
            x = torch.ones(3)
            seen.append(weakref.ref(x))
            return lambda: [x + 1]

        replay = measure.graph_replay(prepare)
        gc.collect()
        assert seen[0]() is not None
        assert replay() is None
        assert torch.equal(replay.outputs[0], torch.full((3,), 2.0))


def test_speedups_of_bf16_layers_are_over_bf16_layers():
    for op, base in (("transform", "published bf16"), ("linear", "published bf16"), ("update_", "published")):
        (workload, *_) = tiny(op, "bf16")
        found = kernels.candidates(workload, arguments("--no-compile"))
        by_name = {candidate.arm.name: candidate.found for candidate in found}
        by_name["ours"]["seconds"] = [1.0]
        by_name["published"]["seconds"] = [8.0]
        if "published bf16" in by_name:
            by_name["published bf16"]["seconds"] = [2.0]
        kernels._evaluate(workload, found, {"ieee": 1.0, "copy": 1.0})
        assert by_name["ours"]["speedup"]["median"] == (2.0 if base == "published bf16" else 8.0)
        about = {"base": kernels._base(workload)}
        bases = [name for name, item in by_name.items() if report._is_base(about, item)]
        assert bases == [base]
    (workload, *_) = tiny("transform")
    assert kernels._base(workload) == "published"


@pytest.mark.usefixtures("_not_interpreted")
@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_run_and_report(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the report's plots need matplotlib")
    path = tmp_path / "kernels.json"
    chosen = ["--op", "transform", "update_", "model_update", "--out", str(path)]
    assert main(["kernels", *RUN, *chosen]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0] == kernels.NEEDS_GPU
    assert "NVIDIA GPU" in lines[0]
    assert "torch" in lines[1]
    data = json.loads(path.read_text())
    assert data["machine"]["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert data["ceilings"] == {"ieee": 1e11, "copy": 1e10}
    assert [(r["op"], r["mode"]) for r in data["results"]] == [
        *[("transform", "forward"), ("transform", "backward")] * 2,
        *[("update_", "step")] * 2,
        ("model_update", "step"),
    ]
    for result in data["results"]:
        arms = {arm["arm"]: arm for arm in result["arms"]}
        for name in ("ours", "published", "baddbmm"):
            arm = arms[name]
            assert len(arm["seconds"]) == 2
            assert arm["error"] <= arm["limit"]
            assert arm["launches"] > 0
            assert arm["flops_per_second"] == pytest.approx(arm["flops"] / arm["median_seconds"])
        assert arms["published"]["speedup"] == {"low": 1.0, "median": 1.0, "high": 1.0}
        assert {"refused", "error"} <= arms["ours eager"].keys()  # checked, and not timed twice
        assert "refused" in arms["ours cuda"]
        assert "refused" in arms["ours triton"]
    assert {"ours rank 3", "baddbmm rank 3"} <= arms.keys()  # of the model's update
    assert arms["ours rank 3"]["flops"] < arms["ours"]["flops"]
    assert "## update_, step: L=6 n=20 d=8, fp32 (ViT-tiny, batch 4, 50 tokens)" in lines

    folder = tmp_path / "report"
    assert main(["report", str(path), "--out", str(folder)]) == 0
    written = (folder / "report.md").read_text()
    assert capsys.readouterr().out.strip() in written
    assert data["command"] in written
    compared = len(report.comparisons(data["results"]))
    assert compared == len(data["results"]) + 1  # the model's update with full and with low rank
    assert f"of {compared} rows" in written
    for name in ("speed-up", "roofline"):
        assert f"(kernels_{name}.png)" in written
        assert (folder / f"kernels_{name}.png").stat().st_size > 5000


@pytest.mark.usefixtures("_not_interpreted")
def test_a_failed_arm_gets_no_time(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ops, "correlation", scaled("correlation", 1.01))
    path = tmp_path / "kernels.json"
    assert main(["kernels", "--device", "cpu", *RUN, "--op", "correlation", "--out", str(path)]) == 1
    out = capsys.readouterr().out
    assert "FAILED: ours (ieee)" in out
    assert "| ours " not in out
    assert "| published " in out
    for result in json.loads(path.read_text())["results"]:
        arms = {arm["arm"]: arm for arm in result["arms"]}
        assert not {"seconds", "median_seconds"} & arms["ours"].keys()
        assert "seconds" in arms["published"]
    assert main(["report", str(path)]) == 0
    assert "### Failed" in capsys.readouterr().out


@pytest.mark.usefixtures("_not_interpreted")
def test_an_interruption_leaves_what_was_measured(tmp_path, monkeypatch):
    right, calls = kernels.measure_workload, []

    def interrupted(*args):
        if calls:
            raise KeyboardInterrupt
        calls.append(args)
        return right(*args)

    monkeypatch.setattr(kernels, "measure_workload", interrupted)
    path = tmp_path / "kernels.json"
    with pytest.raises(KeyboardInterrupt):
        main(["kernels", "--device", "cpu", *RUN, "--op", "apply_", "--out", str(path)])
    assert len(json.loads(path.read_text())["results"]) == 1


def test_compiled_arm():
    (workload, _) = tiny("update_")
    (candidate,) = (c for c in kernels.candidates(workload, arguments()) if c.arm.compiled)
    inputs = workload.make(CPU, 0)
    kernels.check(kernels.Gate(workload, inputs), inputs, [candidate])
    assert candidate.valid, candidate.found
    assert candidate.found["error"] <= candidate.found["limit"]


@pytest.mark.gpu
def test_run_on_a_gpu(tmp_path):
    path = tmp_path / "kernels.json"
    chosen = ["--op", "update_", "fold", "model_update", "--out", str(path)]
    assert main(["kernels", *RUN, *chosen]) == 0
    data = json.loads(path.read_text())
    assert data["device"] == torch.cuda.get_device_name()
    for result in data["results"]:
        arms = {(arm["arm"], arm["matmul"]): arm for arm in result["arms"]}
        assert result["input_sets"] == 3
        for name, setting in (
            ("ours", "ieee"),
            ("ours", "tf32"),
            ("baddbmm", "ieee"),
            ("baddbmm bf16", "bf16"),
        ):
            timed = arms[name, setting]
            assert timed["launches"] > 0
            assert len(timed["graph_seconds"]) == len(timed["seconds"]) == 2
        assert ("graph_seconds" in arms["published", "ieee"]) == (result["op"] != "model_update")
    device = torch.device("cuda")
    count, peak = measure.count_step(lambda: torch.ones(1000, device=device).exp(), device)
    assert count == 2
    assert peak >= 8000


def arm(name: str, seconds: list[float], matmul: str = "ieee", **fields) -> dict:
    family, *others = name.split()
    backend = others[-1] if others and others[-1] in workloads.BACKENDS else None
    return {
        "arm": name,
        "family": family,
        "group": "",
        "backend": backend,
        "compiled": "compiled" in others,
        "matmul": matmul,
        "seconds": seconds,
        "median_seconds": sorted(seconds)[len(seconds) // 2],
        "speedup": {"low": 1.0, "median": 1.0, "high": 1.0},
        "flops": 100,
        "bytes": 10,
        "flops_per_second": 1e9,
        "bytes_per_second": 1e8,
        "flop_share": 0.5,
        "byte_share": 0.25,
        "error": 1e-7,
        "limit": 1e-6,
        "peak_bytes": 2**20,
        "launches": 3,
    } | fields


def result(arms: list[dict], **fields) -> dict:
    about = {"op": "update_", "mode": "step", "model": "B", "batch": 256, "tokens": 50, "dtype": "bf16"}
    return about | {"sizes": {"L": 2, "d": 8}, "arms": arms} | fields


class TestReport:
    ARMS = (
        arm("ours", [3.0, 4.0, 5.0]),
        arm("ours eager", [3.0, 4.0, 5.0]),
        arm("ours triton", [1.5, 2.0, 2.5]),
        arm("published", [9.0, 9.0, 9.0]),
        arm("baddbmm", [2.0, 3.0, 4.0]),
        arm("baddbmm", [1.0, 1.0, 1.0], matmul="tf32"),
    )

    def test_ours_meets_the_best_baseline_of_its_setting(self):
        (item,) = report.comparisons([result(list(self.ARMS))])
        assert item["best"] is self.ARMS[4]  # neither the slower one nor that with TF32
        assert item["ratio"] == {"low": pytest.approx((2 / 3 + 0.75) / 2), "median": 0.75, "high": 0.775}

    def test_low_rank_is_compared_with_its_own_and_the_published(self):
        arms = [
            arm("ours", [2.0]),
            arm("baddbmm", [1.0]),
            arm("published", [8.0]),
            arm("ours rank 4", [1.5], group="rank 4"),
            arm("baddbmm rank 4", [3.0], group="rank 4"),
        ]
        full, low = report.comparisons([result(arms)])
        assert (full["best"]["arm"], full["ratio"]["median"]) == ("baddbmm", 0.5)
        assert (low["best"]["arm"], low["ratio"]["median"]) == ("baddbmm rank 4", 2.0)

    def test_the_backend_that_should_have_been_chosen(self):
        (item,) = report.backends([result(list(self.ARMS))])
        assert item["seconds"] == {"eager": 4.0, "triton": 2.0}
        assert (item["fastest"], item["lost"]) == ("triton", 2.0)
        text = report.kernels_section(
            {"ceilings": {"ieee": 1e12, "copy": 1e9}, "results": [result(list(self.ARMS))]}
        )
        assert "no, 2.00 times its time" in text

    def test_rows_that_a_baseline_wins_stay(self):
        won = result([arm("ours", [1.0]), arm("published", [2.0])], sizes={"d": 16})
        data = {"ceilings": {"ieee": 1e12, "copy": 1e9}, "results": [result(list(self.ARMS)), won]}
        text = report.kernels_section(data)
        assert "Ours is faster in 1 of 2 rows." in text
        everything, _, losses = text.partition("### Where a baseline wins")
        assert everything.count("| update_ step |") == 2
        losses = losses.partition("###")[0]
        assert losses.count("| update_ step |") == 1
        assert "L=2 d=8" in losses
        assert "0.75 [" in losses

    def test_reasons_stand_below_the_table(self):
        arms = [
            arm("ours", [1.0]),
            {"arm": "ours cuda", "matmul": "ieee", "refused": "no kernel"},
            {"arm": "ours cuda", "matmul": "tf32", "refused": "no kernel"},
            {"arm": "baddbmm", "matmul": "ieee", "failed": "wrong", "error": 0.1, "limit": 0.01},
        ]
        lines = report.arms_table(result(arms)).splitlines()
        assert len([line for line in lines if line.startswith("|")]) == 3
        assert "Not measured: ours cuda (ieee), ours cuda (tf32): no kernel" in lines
        assert "FAILED: baddbmm (ieee): wrong" in lines

    def test_missing_graphs_stand_below_the_table(self):
        arms = [arm("ours", [1.0]), arm("published", [2.0], graph_refused="RuntimeError: not permitted")]
        lines = report.arms_table(result(arms)).splitlines()
        assert len([line for line in lines if line.startswith("|")]) == 4
        assert "No CUDA graph: published (ieee): RuntimeError: not permitted" in lines

    def test_missing_baselines_of_bf16_operands_count(self):
        low = {"group": "rank 4"}
        full = [arm("ours", [1.0]), arm("baddbmm", [2.0])]
        ranks = [arm("ours rank 4", [1.0], **low), arm("baddbmm rank 4", [2.0], **low)]
        halves = arm("baddbmm bf16", [2.0], matmul="bf16")
        lost = {"arm": "baddbmm rank 4 bf16", "family": "baddbmm", "matmul": "bf16", "refused": "none"} | low
        lead = "Ours is faster in 2 of 2 rows."

        def text(arms: list[dict], **fields) -> str:
            data = {"ceilings": {"ieee": 1e12, "copy": 1e9}, "results": [result(arms, **fields)]}
            return report.kernels_section(data)

        missing = "of them the baseline with bf16 operands is missing."
        assert f"{lead} In 2 {missing}" in text(full + ranks)
        assert f"{lead} In 1 {missing}" in text([*full, *ranks, halves, lost])
        found = text([*full, *ranks, halves, arm("baddbmm rank 4 bf16", [2.0], matmul="bf16", **low)])
        assert lead in found
        assert missing not in found
        assert missing not in text(full + ranks, dtype="fp32")

    @pytest.mark.parametrize("name", ["step", "memory"])
    def test_other_measurements(self, name: str, capsys):
        files = sorted((ROOT / "bench" / "results").glob(f"*/{name}.json"))
        assert files
        assert main(["report", *map(str, files)]) == 0
        out = capsys.readouterr().out
        assert "| published " in out
        assert f"python -m bench {name}" in out

    @pytest.mark.parametrize("content", ["{}", "[]", '{"command": "python -m train"}', "no JSON"])
    def test_other_files_are_refused(self, content: str, tmp_path, capsys):
        path = tmp_path / "file.json"
        path.write_text(content)
        assert main(["report", str(path)]) == 1
        captured = capsys.readouterr()
        assert f"{path}: expected a file of python -m bench kernels, step or memory" in captured.err
        assert captured.out == ""


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["kernels", "--op", "matmul"], "invalid choice: 'matmul'"),
        (["kernels", "--model", "XL"], "invalid choice: 'XL'"),
        (["kernels", "--batch", "0"], "expected a positive number, got 0"),
        (["kernels", "--out", "no/such/folder/file.json"], "there is no folder no/such/folder"),
        (["report", "nothing.json"], "there is no file nothing.json"),
        (["report"], "JSON"),
    ],
)
def test_bad_arguments(argv: list[str], message: str, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_needs_neither_timm_nor_matplotlib(tmp_path):
    """On a machine with torch, Triton and NumPy alone."""
    code = f"""
import sys
for name in ("timm", "torchvision", "matplotlib"):
    sys.modules[name] = None  # importing it raises
sys.path.insert(0, {str(ROOT)!r})
import torch
from bench import kernels, workloads
from bench.__main__ import main
kernels.measure_ceilings = lambda device: {{"ieee": 1e11, "copy": 1e10}}
workloads.MODELS["tiny"] = workloads.Model(8, 1, 12)
common = ["--model", "tiny", "--batch", "1", "--device", "cpu", "--no-compile", "--rounds", "1"]
out = {str(tmp_path / "kernels.json")!r}
assert main(["kernels", *common, "--op", "apply_", "--threads", "1", "--out", out]) == 0
assert main(["report", out]) == 0
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "### Every arm" in done.stdout


def test_files_for_options(tmp_path):
    assert options.readable(str(Path(__file__))) == Path(__file__)
    assert options.file(str(tmp_path / "new.json")) == tmp_path / "new.json"
