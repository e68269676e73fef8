"""States and copies of DecorAdamW and DecorMuon, also by torch.distributed.checkpoint."""

import copy
import io
import pickle
from dataclasses import replace

import pytest
import torch
from optimizers import (
    BOTH,
    RULE,
    RULES,
    D,
    adamw,
    batch,
    factors,
    groups,
    identical,
    loss_of,
    network,
    parameters,
    same_run,
    same_state,
    train,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from dbpkern import DecorAdamW, DecorPreconditioner

pytestmark = pytest.mark.filterwarnings(
    "error",
    "ignore:.*autograd.function.Function.* should not be instantiated",  # older torch compilers' own
)


# Checkpoints and copies.


def saved(*parts):
    """State dicts that went through a file."""
    file = io.BytesIO()
    torch.save([part.state_dict() for part in parts], file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@BOTH
@pytest.mark.parametrize("rule", RULES)
def test_a_resumed_run_goes_on_exactly(make_optimizer, rule):
    def start():
        model = network()
        return model, make_optimizer(model, replace(RULES[rule], sample=0.3))

    straight, first, second = start(), start(), start()
    expected = train(*straight, 9)
    train(*first, 4)
    states = saved(*first)
    train(*second, 1)
    loss_of(second[0], batch(77)).backward()  # rows that must not reach the resumed run
    for part, state in zip(second, states, strict=True):
        part.load_state_dict(state)
    assert train(*second, 5, 4) == expected[4:]
    same_run(second, straight)


def test_a_run_can_be_resumed_before_its_first_step():
    runs = [(m, adamw(m)) for m in (network(), network())]
    runs[1][1].load_state_dict(saved(runs[0][1])[0])
    assert train(*runs[0], 3) == train(*runs[1], 3)
    same_run(*runs)


def test_DecorAdamW_and_DecorPreconditioner_take_each_others_state():
    model, other = network(), network()
    whole = DecorAdamW(groups(model, 0.0), 0.01, model=model, decor=RULE)
    plain = torch.optim.AdamW(groups(other, 0.0), 0.01)
    around = DecorPreconditioner(other, plain, RULE)
    train(model, whole, 3)
    other.load_state_dict(model.state_dict())
    plain.load_state_dict(saved(whole)[0])
    losses = train(model, whole, 3, 3)
    assert train(other, plain, 3, 3) == pytest.approx(losses, rel=1e-10)
    whole.load_state_dict(saved(plain)[0])
    identical(factors(whole), around.engine.factors())
    model.load_state_dict(other.state_dict())
    assert train(model, whole, 3, 6) == pytest.approx(train(other, plain, 3, 6), rel=1e-10)


@BOTH
def test_a_plain_state_loads_with_one_warning_and_R_is_the_identity(make_optimizer):
    model, other = network(), network()
    optimizer = make_optimizer(model)
    plain = type(optimizer)(groups(other), 0.03)
    train(model, optimizer, 3)
    train(other, plain, 2)
    with pytest.warns(UserWarning, match="the state holds no R") as caught:
        optimizer.load_state_dict(plain.state_dict())
    assert len(caught) == 1
    for R in factors(optimizer):
        assert torch.equal(R, torch.eye(len(R)).double())
    assert optimizer.param_groups[0]["lr"] == 0.03
    assert optimizer.engine.sampler.step == 0
    train(model, optimizer, 2)


def test_the_state_of_AdamW_itself_loads():
    model, other = network(), network()
    plain, optimizer = torch.optim.AdamW(groups(other), 0.01), adamw(model)
    train(other, plain, 2)
    with pytest.warns(UserWarning, match="the state holds no R"):
        optimizer.load_state_dict(plain.state_dict())
    model.load_state_dict(other.state_dict())
    train(model, optimizer, 2, 2)


@BOTH
@pytest.mark.parametrize("rule", ["low", "mixed"])
def test_R_of_other_layers_is_refused_and_nothing_changes(make_optimizer, rule):
    runs = [(m, make_optimizer(m, RULES[r])) for m, r in ((network(), "full"), (network(), rule))]
    for run in runs:
        train(*run, 3)
    before = copy.deepcopy(runs[0][1].state_dict())
    foreign = copy.deepcopy(runs[1][1].state_dict())
    foreign["param_groups"][0]["lr"] = 77.0
    with pytest.raises(ValueError, match=r"R of 0: expected \{'R': \[12, 12\]\}, got \{'Q': \[12, 5\]"):
        runs[0][1].load_state_dict(foreign)
    same_state(runs[0][1].state_dict(), before)


@BOTH
def test_a_damaged_state_of_a_weight_without_R_is_refused_and_nothing_changes(make_optimizer):
    model = network()
    optimizer = make_optimizer(model, replace(RULE, filter=lambda name, module: name == "0"))
    train(model, optimizer, 1)
    before, damaged = (copy.deepcopy(optimizer.state_dict()) for _ in range(2))
    other = next(n for n, entry in damaged["state"].items() if entry and "decor_seed" not in entry)
    damaged["state"][other]["decor_seed"] = 3
    damaged["param_groups"][0]["lr"] = 77.0
    with pytest.raises(ValueError, match="R of a layer without R: expected None, got None"):
        optimizer.load_state_dict(damaged)
    same_state(optimizer.state_dict(), before)


@BOTH
def test_a_layer_with_R_that_the_rule_leaves_out_is_refused(make_optimizer):
    few = replace(RULE, filter=lambda name, module: name == "0")
    runs = [(m, make_optimizer(m, rule)) for m, rule in ((network(), few), (network(), RULE))]
    for run in runs:
        train(*run, 1)
    with pytest.raises(ValueError, match="R of a layer without R: expected None"):
        runs[0][1].load_state_dict(runs[1][1].state_dict())
    with pytest.raises(ValueError, match=r"R of 3: expected .* got None"):
        runs[1][1].load_state_dict(runs[0][1].state_dict())


@BOTH
@pytest.mark.parametrize("order", ["model first", "optimizer first"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_of_model_and_optimizer_go_on_like_the_original(make_optimizer, duplicate, order):
    model = network()
    optimizer = make_optimizer(model, RULES["mixed"])
    train(model, optimizer, 3)
    if order == "model first":
        twin, other = duplicate((model, optimizer))
    else:
        other, twin = duplicate((optimizer, model))
    assert other.engine.layers["0"].layer is twin[0]
    assert train(model, optimizer, 5, 3) == train(twin, other, 5, 3)
    same_run((model, optimizer), (twin, other))
    assert torch.equal(other.state[twin[3].weight]["decor_R"], other.engine.layers["3"].dense_R())
    with pytest.raises(ValueError, match="another optimizer holds this layer's R"):
        adamw(twin)
    train(twin, other, 1, 8)
    assert not torch.equal(twin[0].weight, model[0].weight)


def test_a_copy_of_the_model_alone_has_no_R():
    model = network()
    optimizer = adamw(model)
    train(model, optimizer, 2)
    twin = copy.deepcopy(model)
    other = adamw(twin)
    train(twin, other, 1)
    assert not any(site.slot.pending for site in optimizer.engine.sites)


def test_the_copy_of_a_model_alone_has_no_R():
    model = network()
    plain, decorrelated = io.BytesIO(), io.BytesIO()
    torch.save(model, plain)
    optimizer = adamw(model)
    train(model, optimizer, 2)
    torch.save(copy.deepcopy(model), decorrelated)
    assert decorrelated.tell() < plain.tell() + 4 * D * D  # R and that of 24 features would be 8 (D^2 + 24^2)


@pytest.mark.parametrize("kind", [torch.float64, torch.int64])
def test_states_that_count_steps_otherwise_are_loaded(kind):
    model = network()
    optimizer = adamw(model)
    train(model, optimizer, 2)
    state = optimizer.state_dict()
    for entry in state["state"].values():
        entry["step"] = entry["step"].to(kind) if kind.is_floating_point else int(entry["step"])
    optimizer.load_state_dict(state)
    train(model, optimizer, 1, start=2)
    assert all(float(entry["step"]) == 3 for entry in optimizer.state.values())


# torch.distributed.checkpoint, as trainers use it: it steps a new optimizer on zero gradients.


@BOTH
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("rule", ["full", "mixed"])
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_distributed_checkpoints_resume_exactly(make_optimizer, used, rule, flat):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    straight, first = ((m, make_optimizer(m, RULES[rule])) for m in (network(), network()))
    expected = train(*straight, 7)
    train(*first, 3)
    state = copy.deepcopy(get_optimizer_state_dict(*first, options=options))
    weights = copy.deepcopy(first[0].state_dict())
    assert train(*first, 4, 3) == expected[3:]  # asking changes nothing
    model = network()
    optimizer = make_optimizer(model, RULES[rule])
    if used:
        train(model, optimizer, 2, 20)
    model.load_state_dict(weights)
    set_optimizer_state_dict(model, optimizer, state, options=options)
    identical(model.state_dict().values(), weights.values())
    assert optimizer.engine.sampler.step == 3
    assert train(model, optimizer, 4, 3) == expected[3:]
    same_run((model, optimizer), straight)


@BOTH
@pytest.mark.parametrize("flat", [False, True])
def test_asking_for_the_state_before_any_step_moves_nothing(make_optimizer, flat):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    asked, other = ((m, make_optimizer(m)) for m in (network(), network()))
    before, R = parameters(asked[0]), factors(asked[1])
    state = get_optimizer_state_dict(*asked, options=options)
    assert any("decor_R" in str(key) for key in (state if flat else state["state"]["0.weight"]))
    identical(asked[0].parameters(), before)
    identical(factors(asked[1]), R)
    assert asked[1].engine.sampler.step == 0
    set_optimizer_state_dict(*other, copy.deepcopy(state), options=options)
    assert other[1].engine.sampler.step == 0


@pytest.mark.parametrize("flat", [False, True])
def test_distributed_checkpoints_around_any_optimizer(flat):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)

    def start():
        model = network()
        optimizer = torch.optim.AdamW(groups(model), 0.01)
        return (model, optimizer), DecorPreconditioner(model, optimizer, RULES["mixed"])

    (straight, around), (first, _), (second, again) = start(), start(), start()
    expected = train(*straight, 7)
    train(*first, 3)
    state = copy.deepcopy(get_optimizer_state_dict(*first, options=options))
    second[0].load_state_dict(first[0].state_dict())
    set_optimizer_state_dict(*second, state, options=options)
    assert train(*second, 4, 3) == expected[3:]
    identical(again.engine.factors(), around.engine.factors())


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("rule", ["full", "mixed"])
def test_distributed_checkpoints_around_an_optimizer_that_keeps_no_state(rule, flat):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)

    def start():
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        return model, optimizer, DecorPreconditioner(model, optimizer, RULES[rule])

    first, second = start(), start()
    train(*first[:2], 3)
    state = copy.deepcopy(get_optimizer_state_dict(*first[:2], options=options))
    second[0].load_state_dict(first[0].state_dict())
    set_optimizer_state_dict(*second[:2], state, options=options)
    assert train(*first[:2], 4, 3) == train(*second[:2], 4, 3)
    identical(first[2].engine.factors(), second[2].engine.factors())


@BOTH
@pytest.mark.parametrize("flat", [False, True])
def test_distributed_checkpoints_with_a_frozen_weight(make_optimizer, flat):
    """They leave out what does not train."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)

    def start():
        model = network()
        model[0].weight.requires_grad_(False)
        return model, make_optimizer(model)

    first, second = start(), start()
    with pytest.warns(UserWarning, match="1 of 2 layers sampled no input"):
        train(*first, 3)
    state = copy.deepcopy(get_optimizer_state_dict(*first, options=options))
    second[0].load_state_dict(first[0].state_dict())
    set_optimizer_state_dict(*second, state, options=options)
    with pytest.warns(UserWarning, match="1 of 2 layers sampled no input"):
        losses = train(*second, 4, 3)
    assert train(*first, 4, 3) == losses
    same_run(first, second)


@pytest.mark.parametrize("thaws", [False, True])
def test_the_state_of_a_run_with_a_frozen_weight(thaws):
    """Other optimizers take it, and a run in which the weight trains from then on."""
    runs = [(m, adamw(m)) for m in (network(), network())]
    for model, _ in runs[: 1 if thaws else 2]:
        model[0].weight.requires_grad_(False)
    with pytest.warns(UserWarning, match="1 of 2 layers sampled no input"):
        train(*runs[0], 3)
    plain = torch.optim.AdamW(groups(network()), 0.01)
    plain.load_state_dict(saved(runs[0][1])[0])
    runs[1][0].load_state_dict(runs[0][0].state_dict())
    runs[1][1].load_state_dict(saved(runs[0][1])[0])
    identical(factors(runs[0][1]), factors(runs[1][1]))
    if thaws:
        train(*runs[1], 2, 3)
        assert not torch.equal(factors(runs[1][1])[0], torch.eye(D).double())
