"""Many processes with gloo: one script runs in 2 and in 4 of them, the tests judge what they wrote."""

import distributed_worker
import launch
import pytest
import torch

from dbpkern import distributed, reference

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(scope="module", params=[2, 4], ids=lambda n: f"{n} processes")
def ranks(request, tmp_path_factory):
    """The results of every process, in the order of ranks."""
    folder, world = tmp_path_factory.mktemp("ranks"), request.param
    launch.processes(distributed_worker.run, world, str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


@pytest.fixture(scope="module")
def single():
    """The same training in this process alone, on whole batches."""
    return {
        name: distributed_worker.train(model, batches)
        for name, (model, batches) in distributed_worker.models().items()
    }


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [("vit, float32", 1e-5), ("vit, some low rank, float64", 1e-9), ("mlp, float64", 1e-10)],
)
def test_many_processes_equal_one(ranks, single, name, tolerance):
    untrained = distributed_worker.models()[name][0].state_dict()
    for rank in ranks:
        trained = rank["trained"][name]
        assert trained.keys() == single[name].keys()
        for key, value in single[name].items():
            torch.testing.assert_close(trained[key], value, rtol=tolerance, atol=tolerance)
            if key.endswith(("R", "Q", "S", "weight")):
                assert (value - untrained[key]).abs().max() > 10 * tolerance, key


def test_R_are_bitwise_equal_on_all_ranks(ranks):
    for rank in ranks[1:]:
        for trained, first in zip(rank["trained"].values(), ranks[0]["trained"].values(), strict=True):
            ours = [key for key in trained if key.endswith((".R", ".Q", ".S"))]
            assert ours
            assert all(torch.equal(trained[key], first[key]) for key in ours)
        for part in ("sampled", "unequal"):
            for step, first in zip(rank[part]["steps"], ranks[0][part]["steps"], strict=True):
                assert all(torch.equal(step["after"][name], R) for name, R in first["after"].items())
        for step, first in zip(rank["lowrank"]["steps"], ranks[0]["lowrank"]["steps"], strict=True):
            for name, factors in first["after"].items():
                assert all(torch.equal(a, b) for a, b in zip(step["after"][name], factors, strict=True))


def test_ranks_draw_different_rows(ranks):
    draws = {tuple(rank["sampled"]["index"].tolist()) for rank in ranks}
    assert len(draws) == len(ranks)


@pytest.mark.parametrize(("part", "kappa"), [("sampled", 0.1), ("unequal", 0.0)])
def test_the_step_is_that_of_all_rows_together(ranks, part, kappa):
    """Unequal numbers of rows, none on one rank, none on any: each row counts once."""
    for steps in zip(*(rank[part]["steps"] for rank in ranks), strict=True):
        for name, before in steps[0]["before"].items():
            rows = torch.cat([step["rows"][name] for step in steps if name in step["rows"]] or [before[:0]])
            expected = reference.published_step(before, rows, 0.05, kappa) if len(rows) else before
            torch.testing.assert_close(steps[0]["after"][name], expected)


@pytest.mark.parametrize(("part", "kappa"), [("sampled", 0.1), ("unequal", 0.0)])
def test_losses_are_those_of_all_rows_together(ranks, part, kappa):
    for steps in zip(*(rank[part]["steps"] for rank in ranks), strict=True):
        sampled = {name for step in steps for name in step["rows"]}
        for step in steps:
            for when, Rs in (("loss", "before"), ("loss after", "after")):
                if when in step:
                    assert step[when].keys() == sampled
                    for name, loss in step[when].items():
                        rows = torch.cat([other["rows"][name] for other in steps if name in other["rows"]])
                        z = reference.transform(rows, step[Rs][name])
                        torch.testing.assert_close(loss, reference.loss(z[None], kappa)[0])


def test_low_rank_steps_and_losses_are_those_of_all_rows_together(ranks):
    for steps in zip(*(rank["lowrank"]["steps"] for rank in ranks), strict=True):
        for name, (Q, S) in steps[0]["before"].items():
            rows = torch.cat([step["rows"][name] for step in steps if name in step["rows"]] or [Q.mT[:0]])
            statistics = reference.lowrank_statistics(rows[None], Q[None])
            expected = reference.lowrank_apply(Q[None], S[None], *statistics, 0.05, 0.1)
            for actual, wanted in zip(steps[0]["after"][name], expected, strict=True):
                torch.testing.assert_close(actual, wanted[0], rtol=1e-8, atol=1e-8)
            for step in steps:
                assert (name in step["loss"]) == bool(len(rows))
                if len(rows):
                    z = reference.lowrank_transform(rows, Q, S)
                    torch.testing.assert_close(step["loss"][name], reference.loss(z[None], 0.1)[0])
    assert [len(rank["lowrank"]["steps"][1]["rows"]) for rank in ranks][:2] == [0, 2]


def test_the_unequal_case_is_unequal(ranks):
    first, last = ([rank["unequal"]["steps"][i]["rows"] for rank in ranks] for i in (0, 1))
    assert [len(rows["0"]) for rows in first] == [3 * rank + 2 for rank in range(len(ranks))]
    assert [len(rows["0"]) if rows else 0 for rows in last] == list(range(len(ranks)))
    assert all("4" not in rows for rows in last)


def test_broadcast_buffers_warns(ranks):
    for rank in ranks:
        assert len(rank["warnings"][True]) == 1
        assert "pass broadcast_buffers=False" in rank["warnings"][True][0]
        assert rank["warnings"][False] == []


def test_one_process_is_rank_0_of_1():
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.any_process(True, torch.device("cpu"))
    assert not distributed.any_process(False, torch.device("cpu"))
