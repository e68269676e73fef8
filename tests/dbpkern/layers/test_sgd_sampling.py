"""The rows that DecorSGD samples: how many and which, over micro-batches and steps, and where they lie."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from layers import CPU, Rs, backward, exact, identical, linears
from rules import convert, decor_sgd
from torch import nn
from vits import captured, decorrelated, everything

from dbpkern import distributed, reference
from dbpkern.capture import Sampler

# The exception is torch 2.11's profiler.
pytestmark = pytest.mark.filterwarnings("error", "default:Warning. Profiler clears events")


@pytest.mark.parametrize("sample", [0.1, 0.25, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("n", [1, 2, 5, 10, 37, 1000])
def test_sample_size_and_no_replacement(n, sample):
    size = max(1, round(sample * n))
    sampler = Sampler(sample, 0)
    assert sampler.size(n) == size
    index = sampler.index(n, 0, CPU)
    if size == n:
        assert index is None
    else:
        assert index.shape == (size,)
        assert index.unique().shape == (size,)
        assert index.min() >= 0
        assert index.max() < n


def test_nothing_is_sampled_from_nothing():
    assert Sampler(0.1, 0).size(0) == 0


def test_every_row_is_as_likely():
    sampler, counts = Sampler(0.25, 0), torch.zeros(8)
    for _ in range(2000):
        counts[sampler.index(8, 0, CPU)] += 1
        sampler.advance()
    assert (counts / 2000 - 0.25).abs().max() < 0.05  # 5 standard deviations


def test_draws_are_a_function_of_seed_rank_step_micro_batch_and_count(monkeypatch):
    def draw(seed=0, rank=0, step=0, turn=0, n=1000):
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        sampler = Sampler(0.1, seed)
        sampler.seek(seed, step)
        return sampler.index(n, turn, CPU).tolist()

    variants = [{}, {"seed": 1}, {"rank": 1}, {"rank": 2}, {"step": 1}, {"turn": 1}, {"n": 1001}]
    draws = [draw(**variant) for variant in variants]
    assert len({tuple(d) for d in draws}) == len(variants)
    assert [draw(**variant) for variant in variants] == draws


def test_draws_do_not_touch_the_global_generator():
    before = torch.get_rng_state()
    Sampler(0.1, 0).index(100, 0, CPU)
    identical(torch.get_rng_state(), before)


def test_layers_with_equal_token_counts_share_the_index():
    model = nn.ModuleList([nn.Linear(5, 5) for _ in range(3)])
    convert(model, sites=None, filter=everything)
    decor = decor_sgd(model, sample=0.3, limit=None)
    x, y = torch.randn(2, 20, 5), torch.randn(30, 5)
    (model[0](x).sum() + model[1](x.view(4, 10, 5)).sum() + model[2](y).sum()).backward()
    rows = captured(decor)
    assert {name: len(r) for name, r in rows.items()} == {"0": 12, "1": 12, "2": 9}
    identical(rows["0"], rows["1"])
    identical(rows["0"], x.view(40, 5)[decor.engine.sampler.index(40, 0, CPU)])
    identical(rows["2"], y[decor.engine.sampler.index(30, 0, CPU)])


def test_steps_and_micro_batches_draw_anew():
    model, x = linears(1, 5), torch.randn(1000, 5)
    decor = decor_sgd(model, sample=0.01, limit=None)
    drawn = []
    for _ in range(3):
        for _ in range(2):
            backward(model, x)
        drawn += captured(decor)["0"].split(10)
        decor.step()
    assert len(drawn) == 6
    assert all(not torch.equal(one, other) for i, one in enumerate(drawn) for other in drawn[:i])


@pytest.mark.parametrize("sizes", [(8, 8), (8, 8, 8), (4, 12, 7), (1, 0, 9), (12, 3)])
def test_accumulation_gives_the_statistic_of_all_samples(sizes):
    model = linears(2, 5, torch.float64)
    decor = decor_sgd(model, eta=0.1, kappa=0.2, sample=1.0, limit=None)
    for _ in range(3):  # the second and third step reuse the room of the first
        before, xs = Rs(model), [torch.randn(n, 5, dtype=torch.float64) for n in sizes]
        for x in xs:
            model(x).sum().backward()
        inputs = {"0": torch.cat(xs), "2": torch.tanh(model[0](torch.cat(xs))).detach()}
        decor.step()
        for name, R in Rs(model).items():
            exact(R, reference.published_step(before[name], inputs[name], 0.1, 0.2))


def test_micro_batches_of_other_sizes_from_step_to_step():
    """Rows that outgrow their room, shrink again, and layers that sample unequally."""
    model = linears(2, 4, torch.float64)
    decor = decor_sgd(model, eta=0.1, sample=1.0, limit=None)
    for step, sizes in enumerate([(6,), (9,), (2,), (2, 2), (12, 1), (3,), (13,)]):
        before, total = Rs(model), {"0": [], "2": []}
        for n in sizes:
            x = torch.randn(n, 4, dtype=torch.float64)
            model(x).sum().backward()
            total["0"].append(x)
            total["2"].append(torch.tanh(model[0](x)).detach())
        if step % 2:  # one layer alone
            x = torch.randn(3, 4, dtype=torch.float64)
            model[2](x).sum().backward()
            total["2"].append(x)
        decor.step()
        for name, R in Rs(model).items():
            exact(R, reference.published_step(before[name], torch.cat(total[name]), 0.1))
        # Buffers that were outgrown are not kept.
        spans = sorted(decor.engine.stacks()[0].samples)
        assert all(one[1] <= other[0] for one, other in itertools.pairwise(spans))


def replace_R(model):
    for layer in decorrelated(model).values():
        layer.R = layer.R.clone()


NEW_STORAGE = {
    "double": lambda model: model.double(),
    "assigned checkpoint": lambda m: m.load_state_dict(copy.deepcopy(m.state_dict()), assign=True),
    "replaced": replace_R,
}


@pytest.mark.parametrize("when", ["between steps", "between backward and step"])
@pytest.mark.parametrize("change", NEW_STORAGE)
def test_R_may_get_new_storage_at_any_time(change, when):
    model = linears(3, 5)
    decor = decor_sgd(model, eta=0.1, sample=1.0, limit=None)
    for i in range(3):
        if i == 1 and when == "between steps":
            NEW_STORAGE[change](model)
        x = torch.randn(9, 5, dtype=model[0].weight.dtype)
        model(x).sum().backward()
        if i == 1 and when != "between steps":
            NEW_STORAGE[change](model)
        before = Rs(model)
        decor.step()
        for name, R in Rs(model).items():
            assert not torch.equal(R, before[name])
        exact(Rs(model)["0"], reference.published_step(before["0"], x.to(before["0"].dtype), 0.1), 1e-6)
    assert decor.param_groups[0]["params"][0] is model[0].R


def test_in_the_steady_state_nothing_moves():
    model = linears(3, 6)
    decor = decor_sgd(model, eta=0.01, sample=0.5, limit=None)
    R_places = {name: layer.R.data_ptr() for name, layer in decorrelated(model).items()}
    x = torch.randn(20, 6)
    backward(model, x)
    decor.step()
    places = None
    for n in (20, 20, 7, 20):
        backward(model, x[:n])
        slots = [site.slot for site in decor.engine.sites]
        assert all(slot.count() == round(n / 2) and slot.in_room(round(n / 2)) for slot in slots)
        new = [slot.room.data_ptr() for slot in slots]
        decor.step()
        assert places is None or new == places
        places = new
    (stack,) = decor.engine.stacks()[0].factors
    assert [layer.R.data_ptr() for layer in decorrelated(model).values()] == [R.data_ptr() for R in stack]
    assert R_places == {name: layer.R.data_ptr() for name, layer in decorrelated(model).items()}


@pytest.mark.parametrize("order", ["BB BB BB", "BF BF BF", "BB FF BB", "FF BB FB", "BF FB BF"])
def test_rows_of_mixed_dtypes(order):
    """bfloat16 or float32 by layer and step, as autocast over parts of the work gives: kept in R's dtype."""
    model = linears(2, 6)
    decor = decor_sgd(model, eta=0.1, sample=1.0, limit=None)
    for step in order.split():
        before, x = Rs(model), torch.randn(9, 6)
        for layer, kind in zip((model[0], model[2]), step, strict=True):
            with torch.autocast("cpu", torch.bfloat16, enabled=kind == "B"):
                y = layer(x)
            y.float().square().mean().backward()
        assert {rows.dtype for rows in captured(decor).values()} == {torch.float32}
        decor.step()
        for (name, R), kind in zip(Rs(model).items(), step, strict=True):
            rows = x.bfloat16().float() if kind == "B" else x
            exact(R, reference.published_step(before[name], rows, 0.1), 1e-6)


def test_layers_that_never_sampled_are_named_once():
    model = linears(3, 5)
    model[2].requires_grad_(False)
    decor = decor_sgd(model, limit=None)
    backward(model, torch.randn(20, 5))
    with pytest.warns(UserWarning, match="1 of 3 layers sampled no input .* no gradient .*: 2"):
        decor.step()
    identical(model[2].R, torch.eye(5))
    backward(model, torch.randn(20, 5))
    decor.step()  # no second warning: it would be an error here


def test_a_model_that_reads_weights_without_calling_the_layer_is_refused():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return F.linear(x, self.inner.weight)

    model = convert(Reader(), sites=None, filter=everything)
    decor = decor_sgd(model, limit=None)
    backward(model, torch.randn(3, 4))
    with pytest.raises(
        RuntimeError, match=r"1 of 1 layers sampled no input.*inner.*without calling its lay.*"
    ):
        decor.step()
    decor = decor_sgd(model, limit=None, unsampled="warn")
    backward(model, torch.randn(3, 4))
    with pytest.warns(UserWarning, match="1 of 1 layers sampled no input.*inner"):
        decor.step()
