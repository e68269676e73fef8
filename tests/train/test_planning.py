"""plan: what it measures and counts, what it chooses, and that it leaves no trace; replan."""

import copy
import itertools
import re
from dataclasses import replace

import launch
import planning_worker
import pytest
import torch
from planning_worker import RHO, N, Net, rows, stepper
from rules import convert, layers_rule
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from vits import HuggingFaceViT, decorrelated, everything, images, mlp, timm_vit

import dbpkern
from dbpkern import Decor, DecorPreconditioner
from train import planning

FREE = planning.Price(ratio=1.0, entry=0.0, each=0.0, group=0.0)


@pytest.fixture
def flops_alone(monkeypatch):
    """Costs are FLOPs, as in models much larger than these."""
    monkeypatch.setattr(planning, "FULL", FREE)
    monkeypatch.setattr(planning, "LOW_RANK", FREE)


def planned(budget: float = 1e9, **options) -> planning.Plan:
    model = Net()
    return planning.plan(model, stepper(model), budget, **{"ranks": ()} | options)


def only(*names: str):
    """A filter for these layers."""
    return lambda name, module: name in names


# What is measured.


def test_the_correlation_is_the_mean_squared_coefficient_and_independent_features_have_none():
    alike, apart = planned(calls=8).groups
    assert alike.correlation == pytest.approx(RHO**2, rel=0.05)
    assert apart.correlation == 0.0
    assert (alike.width, alike.outputs, alike.tokens) == (32, 8, N)


def test_scales_and_more_rows_than_are_measured_do_not_matter():
    model = Net()
    scales = torch.logspace(-2, 2, 48)
    group, _ = planning.plan(model, stepper(model, lambda seed: rows(seed, 4000) * scales), 1e9).groups
    assert group.correlation == pytest.approx(RHO**2, rel=0.05)
    assert group.tokens == 4000


def test_a_rank_is_worth_the_share_of_the_spectrum_that_it_holds():
    model = mlp_of(32, 8)

    def make(seed: int) -> torch.Tensor:
        """Two blocks of 16 features, each with a part of its own in common: two strong directions."""
        g = torch.Generator().manual_seed(seed)
        common = torch.randn(2000, 2, generator=g).repeat_interleave(16, 1)
        return RHO**0.5 * common + (1 - RHO) ** 0.5 * torch.randn(2000, 32, generator=g)

    (group,) = planning.plan(model, stepper(model, make), 1e9, ranks=(1, 2)).groups
    full, one, two = (option.benefit for option in group.options)
    assert one / full == pytest.approx(0.5 * 15 / 16, rel=0.03)
    assert two / full == pytest.approx(15 / 16, rel=0.03)


def mlp_of(*widths: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(d, o) for d, o in itertools.pairwise(widths)))


# What is chosen.


def test_correlated_inputs_are_chosen_and_independent_ones_never():
    plan = planned()
    assert plan.ranks == {"alike": None}
    assert plan.accepts("alike", nn.Linear(1, 1))
    assert not plan.accepts("apart", nn.Linear(1, 1))


def test_no_budget_chooses_nothing_and_says_what_the_least_would_cost():
    plan = planned(0.0)
    assert plan.ranks == {}
    assert plan.cost == 0.0
    least = f"alike with R full, takes {100 * plan.groups[0].options[0].cost:.2f} %"
    assert f"the least, {least}, above the budget of 0 % of a step" in str(plan)


def test_nothing_to_remove_is_said():
    model = Net()
    plan = planning.plan(model, stepper(model), 1e9, decor=Decor(filter=only("apart")))
    assert "none of 1 layers: their inputs show no correlations" in str(plan)


def test_without_a_limit_every_layer_of_a_vit_gets_a_full_R():
    model = timm_vit()
    plan = planning.plan(model, stepper(model, lambda seed: images(16)), 1e9)
    assert set(plan.ranks.values()) == {None}
    names = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    # Noise has no correlations between pixels.
    assert plan.ranks.keys() == names - {"patch_embed.proj"}


def test_the_budget_is_kept_and_more_of_it_never_buys_less(flops_alone):
    model = timm_vit()
    step = stepper(model, lambda seed: images(16))
    previous = -1.0
    for budget in (0.02, 0.05, 0.1, 0.2, 0.5):
        plan = planning.plan(model, step, budget, ranks=(2, 4), calls=1)
        assert plan.cost <= budget
        benefit = sum(group.chosen.benefit for group in plan.groups if group.chosen)
        assert benefit >= previous
        previous = benefit
    assert {len(names) for group in plan.groups for names in group.layers} == {1}


def test_the_most_benefit_for_the_cost_comes_first_and_ranks_fill_what_is_left():
    options = [
        planning.Option(None, 0.08, 8.0),
        planning.Option(4, 0.02, 3.0),
        planning.Option(8, 0.03, 3.1),
    ]
    wide = planning.Group("wide", (("wide",),), 9, 9, 1.0, 0.5, tuple(options))
    small = planning.Group("small", (("small",),), 9, 9, 1.0, 0.5, (planning.Option(None, 0.02, 2.9),))

    def choose(budget: float) -> list[str]:
        return [str(group.chosen or "none") for group in planning._choose([wide, small], budget)]

    assert choose(0.01) == ["none", "none"]
    assert choose(0.02) == ["rank 4", "none"]
    assert choose(0.04) == ["rank 4", "full"]
    assert choose(0.05) == ["rank 8", "full"]
    assert choose(0.11) == ["full", "full"]


def group_of(name: str, *options: tuple[int | None, float, float]) -> planning.Group:
    return planning.Group(name, ((name,),), 64, 64, 1.0, 0.5, tuple(planning.Option(*o) for o in options))


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (1.5, [8, None, None]),  # a full R of "a" would fit, but coverage goes first and nothing is left
        (3.0, [8, 8, None]),
        (4.5, [8, 8, 8]),
        (5.5, ["full", 8, 8]),  # then the rest goes where it is worth most
        (9.0, ["full", 16, "full"]),
    ],
)
def test_all_groups_are_covered_before_any_gets_more(budget, expected):
    groups = [
        group_of("a", (None, 2.5, 9.0), (8, 1.5, 4.0)),
        group_of("b", (8, 1.5, 2.0), (16, 2.5, 2.5)),
        group_of("c", (None, 3.0, 2.5), (8, 1.5, 1.0)),
        group_of("useless", (8, 0.1, 0.0)),
    ]
    chosen = [group.chosen for group in planning._choose(groups, budget)]
    assert [o and (o.rank or "full") for o in chosen] == [*expected, None]


def test_ties_go_by_name():
    option = planning.Option(None, 0.5, 1.0)
    b, a = (planning.Group(name, ((name,),), 9, 9, 1.0, 0.5, (option,)) for name in "ba")
    for groups in ([b, a], [a, b]):
        chosen = [group.name for group in planning._choose(groups, 0.5) if group.chosen]
        assert chosen == ["a"]


def test_equal_layers_of_all_blocks_are_one_group_and_shared_inputs_have_one_R():
    model = HuggingFaceViT()
    plan = planning.plan(model, stepper(model, lambda seed: images(8)), 1e9, ranks=())
    groups = {group.name: group for group in plan.groups}
    projections = groups["encoder.layer.*.attention.attention.{query,key,value}"]
    assert (projections.width, projections.outputs, len(projections.layers)) == (24, 72, 2)
    assert "encoder.layer.*.output.dense" in groups
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    decor = DecorPreconditioner(model, optimizer, plan.decor())
    assert set(decor.layers) == plan.ranks.keys()
    assert len(decor.engine.names) == len(plan.ranks) - 2 * 2


@pytest.mark.parametrize("mode", planning.MODES)
def test_a_plan_serves_both_modes(mode):
    model = timm_vit()
    step = stepper(model, lambda seed: images(8))
    plan = planning.plan(model, step, 0.5, ranks=(3,), mode=mode, calls=1)
    assert plan.rule == (Decor() if mode == "optimizer" else Decor.layers())
    chosen = [replace(g, chosen=g.options[i % len(g.options)]) for i, g in enumerate(plan.groups)]
    plan = replace(plan, groups=tuple(chosen))
    assert set(plan.ranks.values()) == {3, None}
    if mode == "layers":
        dbpkern.decorrelate(model, plan.decor())
        layers, engine = decorrelated(model), dbpkern.DecorSGD(model, plan.decor()).engine
    else:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        engine = DecorPreconditioner(model, optimizer, plan.decor()).engine
        layers = engine.layers
    assert {name: getattr(layer.structure, "rank", None) for name, layer in layers.items()} == plan.ranks
    assert replace(engine.decor, sites="all", filter=None, rank=None) == replace(
        plan.rule, sites="all", rank=None
    )


def test_the_rule_of_a_plan_is_the_one_given():
    rule = layers_rule(eta=0.125, every=3, filter=everything, sites="qkv", rank=2)
    plan = planned(decor=rule)
    assert plan.decor() == replace(rule, sites=None, filter=plan.accepts, rank={"alike": None})


# What it costs.


def test_costs_are_the_operations_that_decorrelation_adds(flops_alone):
    o, d, n, sampled = 8, 32, N, 100
    group, _ = planned(decor=Decor(sample=0.25, every=5), ranks=(2,), calls=1).groups
    plain = 4 * n * o * (32 + 16)  # forward and dW; nobody asks for dX
    full, low = group.options
    assert full.cost * plain == pytest.approx(4 * o * d**2 + (4 * sampled * d**2 + 2 * d**3) / 5)
    update = 4 * sampled * d * 2 + 2 * sampled * 2**2 + 16 * d * 2**2 + 35 * 2**3
    assert low.cost * plain == pytest.approx(8 * o * d * 2 + 4 * o * 2**2 + update / 5)


@pytest.mark.parametrize("rank", [None, 4])
def test_costs_are_those_of_a_real_step(flops_alone, rank):
    model = Net()
    rule = Decor(sites=None, filter=only("alike"), rank=rank, sample=0.25, every=1)
    ranks = () if rank is None else (rank,)
    group = planning.plan(model, stepper(model), 1e9, ranks=ranks, decor=rule).groups[0]
    with FlopCounterMode(display=False) as plain:
        stepper(model)()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    keep = DecorPreconditioner(model, optimizer, rule)
    with FlopCounterMode(display=False) as counter:
        optimizer.zero_grad()
        stepper(model)()
        optimizer.step()
    added = counter.get_total_flops() - plain.get_total_flops()
    assert group.options[-1].cost * plain.get_total_flops() == pytest.approx(added, rel=0.05)
    assert keep.layers


def test_decorrelated_layers_apply_R_where_that_is_cheaper(flops_alone):
    model = mlp_of(32, 64)

    def cost(mode: str) -> float:
        step = stepper(model, lambda seed: rows(seed, 10)[:, :32])
        plan = planning.plan(model, step, 1e9, ranks=(), mode=mode, decor=Decor(every=10**9))
        return plan.groups[0].options[0].cost * 4 * 10 * 32 * 64

    assert cost("optimizer") == pytest.approx(4 * 64 * 32**2, rel=1e-3)
    assert cost("layers") == pytest.approx(4 * 10 * 32**2, rel=1e-3)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_device_s_price_is_added_and_threads_do_not_start_operations_sooner(monkeypatch, threads):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(planning, "FULL", FREE)
    bare = planned(calls=1).groups[0].options[0].cost
    monkeypatch.setattr(planning, "FULL", planning.Price(ratio=2.0, entry=10.0, each=700.0, group=300.0))
    plain = 4 * N * 8 * 48
    expected = 2 * bare + (10 * 32 * 8 + threads * 1000) / plain
    assert planned(calls=1).groups[0].options[0].cost == pytest.approx(expected)


# Determinism, and no trace.


class Noisy(nn.Module):
    """Random numbers, running statistics, a part in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(48, 24), nn.BatchNorm1d(24), nn.Dropout(0.3)
        self.second, self.frozen = nn.Linear(24, 8), nn.Linear(8, 8)
        self.frozen.eval()

    def forward(self, x):
        return self.frozen(self.second(self.drop(self.norm(self.first(x)))))


def test_the_same_seed_gives_the_same_plan_bit_for_bit():
    model = Noisy()
    plans = []
    for seed in (0, 0, 1):
        torch.randn(7)  # what was drawn before does not matter
        plans.append(planning.plan(model, stepper(model), 3.0, ranks=(2, 5), seed=seed))
    assert plans[0] == plans[1]
    assert plans[0] != plans[2]


def test_the_model_its_gradients_and_random_numbers_are_as_before():
    model = Noisy()
    stepper(model)()
    before = copy.deepcopy(model.state_dict())
    gradients = {name: (p.grad, p.grad.clone()) for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    random = torch.random.get_rng_state()

    def step():
        model.train()
        stepper(model)()

    planning.plan(model, step, 1.0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for name, parameter in model.named_parameters():
        assert parameter.grad is gradients[name][0]
        assert torch.equal(parameter.grad, gradients[name][1])
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert torch.equal(random, torch.random.get_rng_state())
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in model.modules())


RULE = Decor(sites=None, filter=everything, rank=None, sample=0.3)


def trained(interrupt=None) -> tuple[nn.Module, DecorPreconditioner]:
    """Six steps; `interrupt(model, decor)` before the fourth."""
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    decor = DecorPreconditioner(model, optimizer, RULE)
    for seed in range(6):
        if seed == 3 and interrupt is not None:
            interrupt(model, decor)
        optimizer.zero_grad()
        (model(rows(seed)) - rows(seed)[:, :8]).square().mean().backward()
        optimizer.step()
    return model, decor


def same(one: tuple[nn.Module, DecorPreconditioner], other: tuple[nn.Module, DecorPreconditioner]) -> bool:
    (a, R), (b, S) = one, other
    pairs = zip([*a.parameters(), *R.engine.factors()], [*b.parameters(), *S.engine.factors()], strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def test_a_preconditioner_at_work_samples_nothing_meanwhile():
    found = []
    asked = trained(lambda model, decor: found.append(planning.plan(model, stepper(model), 1e9)))
    assert same(asked, trained())
    assert found[0].ranks.keys() == {"alike"}  # inputs are what they were without R


def test_a_step_of_an_optimizer_is_refused_before_it_changes_a_weight():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = copy.deepcopy(model.state_dict())

    def step():
        stepper(model)()
        optimizer.step()

    with pytest.raises(ValueError, match=r"forward and backward alone, but it calls SGD\.step\(\)"):
        planning.plan(model, step)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    optimizer.step()  # refused no longer


# What cannot be.


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"budget": -0.1}, "budget: expected a part of the step's time, at least 0, got -0.1"),
        ({"budget": float("nan")}, "budget: .* got nan"),
        ({"calls": 0}, "calls: expected a whole number, at least 1, got 0"),
        ({"ranks": (8, 0)}, r"ranks\[1\]: expected a whole number, at least 1, got 0"),
        ({"mode": "fold"}, r"mode: expected one of \('optimizer', 'layers'\), got 'fold'"),
        ({"decor": Decor(filter=lambda name, module: False)}, "the filter leaves no layer"),
    ],
)
def test_bad_arguments(options, match):
    model = Net()
    with pytest.raises(ValueError, match=match):
        planning.plan(model, stepper(model), **options)


def test_a_step_that_is_no_function():
    with pytest.raises(TypeError, match="step: expected a function, got Tensor"):
        planning.plan(Net(), torch.zeros(3))


@pytest.mark.parametrize(
    "step",
    [lambda model: model(rows(0)), lambda model: None, lambda model: Net()(rows(0)).sum().backward()],
    ids=["no backward", "nothing", "another model"],
)
def test_a_step_without_a_backward_of_the_model(step):
    model = Net()
    with pytest.raises(ValueError, match=r"no layer's weight got a gradient \(alike, \.\.\.\)"):
        planning.plan(model, lambda: step(model))


def test_models_without_candidates():
    with pytest.raises(ValueError, match="none of the known sites"):
        planning.plan(nn.LayerNorm(3), lambda: None)
    with pytest.raises(ValueError, match=r"plan: expected a model with trained nn\.Linear"):
        planning.plan(Net().requires_grad_(False), lambda: None)


def test_decorrelated_models_are_refused():
    model = mlp(4, 3)
    with pytest.raises(ValueError, match="decorrelated already"):
        planning.plan(model, lambda: None)


def test_tied_weights_and_layers_that_do_not_run_are_no_candidates():
    model = nn.ModuleDict({name: nn.Linear(16, 16) for name in ("a", "b", "c", "d")})
    model["b"].weight = model["a"].weight

    def step():
        x = torch.randn(99, 1).expand(99, 16)
        (model["a"](x) + model["b"](x) + model["c"](x)).sum().backward()

    plan = planning.plan(model, step, 1e9)
    assert [group.name for group in plan.groups] == ["c"]


# The table.


def test_the_table_shows_every_group_and_the_running_total():
    model = timm_vit()
    plan = planning.plan(model, stepper(model, lambda seed: images(16)), 1e9, ranks=(4,))
    title, *lines, summary = str(plan).splitlines()
    assert title.split()[:5] == ["layers", "count", "width", "outputs", "tokens"]
    cells = [re.split(r"\s{2,}", line.strip()) for line in lines]
    assert [c[0] for c in cells] == [group.name for group in plan.groups]
    by_name = {c[0]: c[1:] for c in cells}
    assert by_name["blocks.*.attn.qkv"][:4] == ["2", "24", "72", str(16 * 17)]
    assert by_name["patch_embed.proj"][5:7] == ["none", "0.00"]
    assert by_name["blocks.*.mlp.fc2"][5] == "full"
    totals = [float(c[-1]) for c in cells]
    assert totals == sorted(totals)
    assert totals[-1] == pytest.approx(100 * plan.cost, abs=0.01)
    assert summary.startswith(f"{len(plan.ranks)} of 10 layers, ")


# Ranks by layer.


def test_a_layer_s_own_rank_goes_before_its_site_s():
    given = {"fc2": 3, "blocks.1.mlp.fc2": 5, "blocks.0.mlp.fc1": 2}
    model = convert(timm_vit(), sites="all", rank=given)
    ranks = {name: getattr(layer.structure, "rank", None) for name, layer in decorrelated(model).items()}
    assert {name: rank for name, rank in ranks.items() if rank} == {
        "blocks.0.mlp.fc1": 2,
        "blocks.0.mlp.fc2": 3,
        "blocks.1.mlp.fc2": 5,
    }


def test_layers_that_share_an_R_have_one_rank():
    name = "encoder.layer.0.attention.attention"
    with pytest.raises(ValueError, match=rf"one rank for layers that read one input, got {name}.query: 3"):
        convert(HuggingFaceViT(), sites="all", rank={f"{name}.query": 3})


# Other layers in the middle of a run.


def test_the_same_choice_again_changes_nothing():
    again = trained(lambda model, decor: decor.replan(model, RULE))
    assert same(again, trained())


def test_layers_that_stay_keep_R_and_new_ones_start_from_the_identity():
    x, seen = rows(77), {}

    def exchange(model: nn.Module, decor: DecorPreconditioner) -> None:
        seen["R"] = decor.layers["alike"].factors[0].clone()
        seen["y"] = model(x)
        decor.replan(model, replace(RULE, filter=only("alike")))
        assert list(decor.layers) == ["alike"]
        assert not model.apart._forward_hooks
        decor.replan(model, replace(RULE, rank={"apart": 3}))
        assert torch.equal(decor.layers["alike"].factors[0], seen["R"])
        assert torch.equal(decor.layers["apart"].factors[1], torch.zeros(3, 3))
        assert torch.equal(model(x), seen["y"])

    _, decor = trained(exchange)
    assert not torch.equal(seen["R"], torch.eye(32))
    assert not torch.equal(decor.layers["alike"].factors[0], seen["R"])
    assert decor.layers["apart"].factors[1].abs().max() > 0
    assert decor.engine.sampler.step == 6
    assert [len(site.factors) for site in decor.engine.sites] == [1, 2]


def test_shared_R_survive_and_the_optimizer_keeps_its_moments():
    model = HuggingFaceViT()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    name = "encoder.layer.0.attention.attention"
    rule = replace(RULE, filter=only(f"{name}.value"), sample=1.0)
    decor = DecorPreconditioner(model, optimizer, rule)
    model(images()).square().mean().backward()
    optimizer.step()
    R = decor.layers[f"{name}.value"].factors[0].clone()
    moments = [state["exp_avg"].clone() for state in optimizer.state.values()]
    decor.replan(model, replace(rule, sites="qkv", filter=None))
    for part in ("query", "key", "value"):
        assert torch.equal(decor.layers[f"{name}.{part}"].factors[0], R)
    kept = [state["exp_avg"] for state in optimizer.state.values()]
    assert all(torch.equal(a, b) for a, b in zip(moments, kept, strict=True))


def test_a_choice_that_cannot_be_changes_nothing():
    def refuse(model: nn.Module, decor: DecorPreconditioner) -> None:
        for changes, match in (
            ({"filter": only()}, "leaves no layer"),
            ({"rank": 17}, "apart: rank: .* got 17"),
        ):
            with pytest.raises(ValueError, match=match):
                decor.replan(model, replace(RULE, **changes))
        assert all(len(module._forward_hooks) == 1 for module in (model.alike, model.apart))

    assert same(trained(refuse), trained())


# Several processes.


def test_processes_with_different_data_make_one_plan_of_all(tmp_path):
    launch.processes(planning_worker.run, 2, str(tmp_path))
    first, second = ((tmp_path / f"{rank}.txt").read_text() for rank in range(2))
    assert first == second
    model = Net()
    parts = [planning_worker.other_data(model, rank) for rank in range(2)]
    together = planning.plan(model, lambda: [part() for part in parts], 0.5, ranks=(2,)).groups[0]
    assert float(first.splitlines()[-1]) == pytest.approx(together.correlation, rel=1e-5)
    assert f"tokens={together.tokens / 2}" in first
