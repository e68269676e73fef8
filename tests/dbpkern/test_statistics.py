"""Statistics over many processes in both modes: parity with one process, what is sent, and in which order."""

import itertools

import distributed_worker
import launch
import pytest
import torch
from distributed_worker import CASES, KINDS, ROWS
from rules import decor_sgd

from dbpkern import distributed

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(scope="module", params=[2, 4], ids=lambda n: f"{n} processes")
def ranks(request, tmp_path_factory):
    """The results of every process, in the order of ranks."""
    folder, world = tmp_path_factory.mktemp("ranks"), request.param
    launch.processes(distributed_worker.run_statistics, world, str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


@pytest.fixture(scope="module")
def single():
    """The same training in this process alone, on all rows."""
    return {case: distributed_worker.uneven_training(case) for case in CASES}


RUNS = [(case, mode) for case in CASES for mode in distributed_worker.modes_of(case)]


@pytest.mark.parametrize(("case", "mode"), RUNS)
def test_uneven_steps_equal_those_of_one_process(ranks, single, case, mode):
    expected = single[case]
    for rank in ranks:
        found = rank["trained"][case, mode]
        assert found["state"].keys() == expected["state"].keys()
        for key, value in expected["state"].items():
            torch.testing.assert_close(found["state"][key], value, rtol=1e-9, atol=1e-9)
        for ours, theirs in zip(found["rates"], expected["rates"], strict=True):
            for name, rate in theirs.items():
                torch.testing.assert_close(ours[name], rate, rtol=1e-9, atol=0)
    if "limited" in case:
        assert all(rate < CASES[case]["eta"] for rate in expected["rates"][0].values())


def test_R_have_moved(single):
    for case, found in single.items():
        moved = {k: v for k, v in found["state"].items() if k.endswith((".R", ".Q", ".S"))}
        assert len(moved) >= 7
        for name, value in moved.items():
            start = 0.0 if name.endswith(".S") else torch.eye(*value.shape, dtype=value.dtype)
            assert (value - start).abs().max() > 1e-4, (case, name)


def test_some_processes_have_no_rows(ranks):
    counts = [rank["trained"]["plain", "owner"]["rows"] for rank in ranks]
    assert [sum(of_step) for of_step in zip(*counts, strict=True)] == [sum(rows) for rows in ROWS]
    assert [count[distributed_worker.ALONE] for count in counts] == [9] + [0] * (len(ranks) - 1)
    assert len({count[0] for count in counts}) == 2


def test_everything_is_bitwise_equal_on_all_ranks(ranks):
    for run in RUNS:
        first = ranks[0]["trained"][run]
        ours = [key for key in first["state"] if key.endswith((".R", ".Q", ".S"))]
        assert len(ours) >= 7
        for rank in ranks[1:]:
            found = rank["trained"][run]
            assert all(torch.equal(found["state"][key], first["state"][key]) for key in ours)
            for rates, others in zip(found["rates"], first["rates"], strict=True):
                assert all(torch.equal(rates[name], rate) for name, rate in others.items())


@pytest.mark.parametrize("kind", KINDS)
def test_samples_that_are_not_finite_rest_on_all_ranks_alike(ranks, kind):
    spoilt = "layers.1"
    for rank in ranks:
        steps = rank["spoilt"][kind]["steps"]
        assert [step["caution"] for step in steps] == [{}, {spoilt: 0.5}, {spoilt: 0.5}]
        for earlier, later in itertools.pairwise(steps):
            for name, factors in later["factors"].items():
                rests = later is steps[1] and name == spoilt
                changed = [
                    not torch.equal(a, b) for a, b in zip(factors, earlier["factors"][name], strict=True)
                ]
                assert all(factor.isfinite().all() for factor in factors)
                assert not any(changed) if rests else all(changed)
        assert steps[1]["rates"][spoilt] == 0
        for step, first in zip(steps, ranks[0]["spoilt"][kind]["steps"], strict=True):
            assert all(torch.equal(step["rates"][name], rate) for name, rate in first["rates"].items())
            for name, factors in first["factors"].items():
                assert all(torch.equal(a, b) for a, b in zip(step["factors"][name], factors, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_both_stacks_are_sent_before_the_first_wait(ranks, kind):
    for rank in ranks:
        order = [name if name != "wait" else f"wait {n}" for name, n in rank["collectives"][kind]["events"]]
        if kind == (None, "owner"):
            scatter, gather = "reduce_scatter_tensor", "all_gather_into_tensor"
            assert order == [scatter, scatter, "wait 0", gather, "wait 1", gather, "wait 2", "wait 3"]
        else:
            assert order == ["all_reduce", "all_reduce", "wait 0", "wait 1"]


@pytest.mark.parametrize("kind", KINDS)
def test_traffic_is_that_of_the_collectives(ranks, kind):
    """Three layers of 4 features and two of 7, fp64: by the formulas, and by the tensors that were sent."""
    (low, mode), world = kind, len(ranks)
    for rank in ranks:
        found = rank["collectives"][kind]
        assert found["before"] == []
        events = [(name, nbytes) for name, nbytes in found["events"] if name != "wait"]
        sent = [(2 if name == "all_reduce" else 1) * nbytes * (world - 1) / world for name, nbytes in events]
        expected = []
        for i, (L, d) in enumerate(((3, 4), (2, 7))):
            if mode == "owner":
                # Two processes own two layers and one each, of four the first own one each.
                padded = world * (2 if (L, world) == (3, 2) else 1)
                share = (world - 1) / world * padded
                numbers = share * (d * (d + 1) // 2 + d + 1) + share * (d * d + 2)
                of_events = sent[i] + sent[i + 2]
            else:
                each = d * (d + 1) // 2 + d + 1 if low is None else low * low + d * low + d + 1
                numbers = 2 * (world - 1) / world * L * each
                of_events = sent[i]
            shape = [L, d, d if low is None else low]
            expected.append((tuple(shape), mode, int(8 * numbers)))
            assert int(of_events) == int(8 * numbers)
        assert found["traffic"] == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_never_reads_a_value(ranks, kind):
    low, _ = kind
    update = "dbpkern::apply_" if low is None else "dbpkern::lowrank_step_"
    names = [set(rank["operators"][kind]) for rank in ranks]
    assert update in names[0]  # in owner mode the last of four processes own no layer
    for operators in names:
        assert not {"aten::item", "aten::_local_scalar_dense", "aten::nonzero"} & operators


def test_processes_that_have_different_things_to_do_are_told(ranks):
    for number, rank in enumerate(ranks):
        assert rank["refused"].keys() == {"widths", "options"}
        for message in rank["refused"].values():
            assert "expected the same R, types of device and rule on all processes" in message
        assert f"'every': {number + 1}" in rank["refused"]["options"]


def test_one_process_sends_nothing():
    model = distributed_worker.mlp(4, 4)
    decor = decor_sgd(model, sample=1.0)
    model(torch.randn(9, 4)).sum().backward()
    decor.step()
    assert decor.engine.traffic() == []


@pytest.fixture
def eight(monkeypatch):
    """As the last but two of eight processes."""
    monkeypatch.setattr(distributed, "world_size", lambda: 8)
    monkeypatch.setattr(distributed, "rank", lambda: 5)


@pytest.mark.parametrize("L", [1, 5, 6, 8, 12, 37])
def test_every_layer_has_one_owner(eight, monkeypatch, L):
    owned = []
    for rank in range(8):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        owned.append(list(range(L))[distributed.own_layers(L)])
    assert list(itertools.chain(*owned)) == list(range(L))
    assert len(owned[0]) == max(len(layers) for layers in owned) == -(-L // 8)


def test_seconds_are_bytes_and_operations(eight, monkeypatch):
    monkeypatch.setattr(distributed, "BANDWIDTH", {"cuda": 100.0, "cpu": 1.0})
    monkeypatch.setattr(distributed, "THROUGHPUT", {"cuda": 1000.0, "cpu": 1.0})
    # Ten layers of 3 features: a triangle has 6 numbers, R has 9, the update takes 54 operations.
    assert distributed.seconds("all-reduce", 10, 3, 4, "cuda") == pytest.approx(
        2 * 7 / 8 * 10 * 6 * 4 / 100 + 10 * 54 / 1000
    )
    assert distributed.seconds("owner", 10, 3, 4, "cuda") == pytest.approx(
        7 / 8 * 16 * (6 + 9) * 4 / 100 + 2 * 54 / 1000
    )
    assert distributed.seconds("owner", 10, 3, 4, "xpu") == distributed.seconds("owner", 10, 3, 4, "cuda")


def test_wide_stacks_have_owners_and_narrow_ones_do_not(eight):
    for device_type in distributed.BANDWIDTH:
        modes = [distributed.choose_mode(16, 2**i, 4, device_type) for i in range(2, 15)]
        assert modes == sorted(modes)  # "all-reduce", then "owner"
        assert len(set(modes)) == 2
