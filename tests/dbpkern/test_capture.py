"""Which rows are sampled, when they count, and where they lie, for layers with an R beside them."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from rules import convert, decor_sgd, preconditioner
from torch import nn
from torch.utils.checkpoint import checkpoint
from vits import captured, everything

from dbpkern.capture import TURNS, RowKind, Sampler, Slot, slot_of

pytestmark = pytest.mark.filterwarnings("error")

D = 6


def network(*widths, dtype=torch.float64):
    return nn.Sequential(*(nn.Linear(d, o, dtype=dtype) for d, o in itertools.pairwise(widths)))


def around(model, **rule):
    """A preconditioner of all layers that samples every row, and its optimizer."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)
    chosen = {"sites": None, "filter": everything, "rank": None, "sample": 1.0, "every": 1}
    return preconditioner(model, optimizer, **chosen | rule), optimizer


def rows(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def same_rows(found, *parts):
    torch.testing.assert_close(found, torch.cat([part.reshape(-1, D) for part in parts]), rtol=0, atol=0)


# When rows count.


def test_two_forwards_and_then_two_backwards():
    model = network(D, 4)
    decor, _ = around(model)
    one, other = rows(5, D), rows(7, D)
    first, second = model(one).square().sum(), model(other).square().sum()
    assert captured(decor) == {}
    second.backward()
    same_rows(captured(decor)["0"], other)
    first.backward()
    same_rows(captured(decor)["0"], one, other)


def test_a_forward_without_a_backward_leaves_nothing_and_its_room_is_used_again():
    model, x = network(D, 4), rows(9, D)
    decor, optimizer = around(model)
    model(x).sum().backward()
    optimizer.step()
    (site,) = decor.engine.sites
    for _ in range(3):
        model(rows(9, D))  # whose graph is gone at once
        model(x).sum().backward()
        same_rows(captured(decor)["0"], x)
        assert site.slot.in_room(9)
        optimizer.step()
    model(x)
    before = site.factors[0].clone()
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(site.factors[0], before)


def test_a_second_backward_of_one_graph_counts_once():
    model, x = network(D, 4), rows(9, D)
    decor, _ = around(model)
    loss = model(x).square().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    same_rows(captured(decor)["0"], x)


@pytest.mark.parametrize("how", ["no_grad", "inference_mode", "eval", "frozen"])
def test_nothing_is_sampled_where_nothing_trains(how):
    model, x = network(D, 4), rows(9, D).requires_grad_()
    decor, _ = around(model)
    if how in ("no_grad", "inference_mode"):
        with getattr(torch, how)():
            model(x)
    else:
        if how == "eval":
            model.eval()
        else:
            model.requires_grad_(False)
        model(x).sum().backward()
    assert captured(decor) == {}


def test_the_steps_in_between_sample_nothing():
    model = network(D, 4)
    decor, optimizer = around(model, every=3)
    sampled = []
    for _ in range(7):
        optimizer.zero_grad()
        model(rows(9, D)).square().sum().backward()
        sampled.append(captured(decor).keys() == {"0"})
        optimizer.step()
    assert sampled == [True, False, False, True, False, False, True]


# What is sampled.


@pytest.mark.parametrize("shape", [(9, D), (3, 5, D), (D,)])
def test_the_output_may_be_changed_in_place(shape):
    """Of an input of three dimensions the output is a view of a matrix."""
    model, x = network(D, 4), rows(*shape)
    decor, optimizer = around(model)
    for _ in range(2):
        optimizer.zero_grad()
        y = F.relu_(model(x))
        y.square().sum().backward()
        same_rows(captured(decor)["0"], x)
        gradient = model[0].weight.grad.clone()
        model[0].weight.grad = None
        F.linear(x, model[0].weight, model[0].bias).relu().square().sum().backward()
        torch.testing.assert_close(model[0].weight.grad, gradient)
        optimizer.step()


def test_the_input_may_be_changed_once_the_layer_has_read_it():
    model, x = network(D, 4), rows(9, D)
    decor, _ = around(model)
    y, before = model[0](x).square().sum(), x.clone()
    with torch.no_grad():
        y.backward()
        x.zero_()
    same_rows(captured(decor)["0"], before)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("sample", [1.0, 0.3])
def test_activation_checkpointing_samples_once(reentrant, sample):
    model, x = network(D, D, 4), rows(20, D).requires_grad_()
    decor, _ = around(model, sample=sample)
    model(x).square().sum().backward()
    plain = captured(decor)
    decor.drop_samples()
    for _ in range(2):
        checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
        found = captured(decor)
        assert found.keys() == plain.keys()
        for name, part in plain.items():
            torch.testing.assert_close(found[name], part)
        decor.drop_samples()


@pytest.mark.parametrize("inside", ["layers", "optimizer"])
def test_too_many_micro_batches_warn_once_and_sample_no_more(inside):
    model, x = network(D, 4), rows(2, D)
    if inside == "layers":
        decor = decor_sgd(convert(model, sites=None, filter=everything, form="fold"), sample=1.0)
        step = decor.step
    else:
        decor, optimizer = around(model)
        step = optimizer.step
    for _ in range(TURNS):
        model(x).sum().backward()
    with pytest.warns(UserWarning, match=f"{TURNS} micro-batches were sampled since the last step"):
        model(x).sum().backward()
    model(x).sum().backward()  # a second warning would be an error here
    assert len(captured(decor)["0"]) == 2 * TURNS
    step()
    model(x).sum().backward()
    assert len(captured(decor)["0"]) == 2


# Where rows lie.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_on_a_CPU_rows_have_the_dtype_of_R(dtype, autocast):
    model, x = network(D, 4, dtype=dtype), rows(9, D, dtype=dtype)
    decor, optimizer = around(model)
    wide = torch.promote_types(dtype, torch.float32)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(x)
        y.float().sum().backward()
        found = captured(decor)["0"]
        assert found.dtype == wide
        same_rows(found, x.to(wide))
        optimizer.step()


def test_buffers_keep_their_address_and_move_once_for_more_rows_than_before():
    model = network(D, D, D, 4)
    decor, optimizer = around(model)
    slots = [site.slot for site in decor.engine.sites]
    places = []
    for n in (20, 20, 7, 0, 20, 33, 33, 8, 33):
        optimizer.zero_grad()
        for part in rows(n, D).split(5) if n else ():
            model(part).square().sum().backward()
        if places and n in (7, 8, places[-1][0]):
            assert all(slot.in_room(n) for slot in slots)
        optimizer.step()
        (stack,) = decor.engine.stacks()
        places.append((n, *(slot.room.data_ptr() for slot in slots)))
        buffers = {id(slot.room._base) for slot in slots}
        assert buffers == {id(buffer) for buffer in stack.samples.values()}
        assert len(buffers) == 1
    before, after = ({place[1:] for place in places[a:b]} for a, b in ((0, 5), (5, None)))
    assert len(before) == len(after) == 1
    assert before != after


def test_a_dtype_that_changes_gets_room_of_its_own():
    model = network(D, 4, dtype=torch.float32)
    decor, optimizer = around(model)
    for dtype in (torch.float32, torch.float64, torch.float64):
        model.to(dtype)
        optimizer.zero_grad()
        x = rows(9, D, dtype=dtype)
        model(x).sum().backward()
        optimizer.step()
        assert decor.layers["0"].factors[0].dtype == dtype
        assert decor.engine.loss()["0"].dtype == dtype
    assert captured(decor) == {}


# The operator by which the backward of a compiled layer leaves its rows.


class Everything:
    """A layer whose rows are its input's."""

    def count_rows(self, x):
        return len(x)

    def take_rows(self, out, x, index):
        out.copy_(x if index is None else x[index])


def slot_of_rows(width):
    slot = Slot(Everything(), Sampler(1.0, 0))
    slot.kind = RowKind(torch.eye(width)[None])
    return slot


def test_the_operator():
    slot = slot_of_rows(5)
    torch.library.opcheck(torch.ops.dbpkern.capture.default, (torch.randn(4, 5), torch.randn(3, 5), slot.key))
    slot.clear()
    gradient, x = torch.randn(4, 5), torch.randn(3, 5)
    before = gradient.clone()
    torch.ops.dbpkern.capture(gradient, x, slot.key)
    assert torch.equal(slot.gather(), x)
    assert torch.equal(gradient, before)


def test_a_slot_that_is_gone_takes_nothing():
    key = slot_of_rows(5).key
    assert slot_of(key) is None
    torch.ops.dbpkern.capture(torch.randn(4, 5), torch.randn(3, 5), key)
