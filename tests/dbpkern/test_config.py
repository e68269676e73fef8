"""Decor: its defaults, what it refuses, and that every entry point takes one."""

from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch
from torch import nn
from vits import everything, make, mlp

import dbpkern
from dbpkern import Decor, DecorAdamW, DecorMuon, DecorPreconditioner, DecorSGD

NAN, INF = float("nan"), float("inf")


def test_the_papers_rule_and_that_of_layers():
    published = Decor.published()
    assert (published.rank, published.every, published.scale_free, published.limit) == (None, 1, False, None)
    assert (published.sites, published.eta, published.kappa, published.follow) == ("all", 5e-4, 0.0, False)
    assert Decor.layers() == replace(published, sites="sublayers", limit=0.5)
    assert Decor() != published


def test_fields_are_changed_in_a_copy_and_checked_there():
    decor = Decor()
    assert replace(decor, rank=8).rank == 8
    assert decor.rank == "mixed"
    with pytest.raises(FrozenInstanceError):
        decor.rank = 8
    with pytest.raises(ValueError, match="every"):
        replace(decor, every=0)


@pytest.mark.parametrize("field", fields(Decor), ids=lambda field: field.name)
def test_the_default_of_every_field_may_be_given(field):
    assert Decor(**{field.name: field.default}) == Decor()


REFUSALS = [
    ({"sites": "heads"}, ValueError, r"sites: expected a preset .* got 'heads'$"),
    ({"sites": ("qkv", "heads")}, ValueError, r"sites: expected .* got \('qkv', 'heads'\)"),
    ({"sites": ()}, ValueError, r"sites: expected"),
    ({"sites": "auto"}, ValueError, r"sites: .* got 'auto'"),
    ({"sites": None}, ValueError, r"sites=None: expected a filter\(name, module\)"),
    ({"rank": "high"}, ValueError, r"rank: expected .* one of \('mixed', 'low'\), got 'high'"),
    ({"rank": 1.5}, ValueError, r"rank: expected an integer, or a part of the width in \(0, 1\), got 1.5"),
    ({"rank": {"fc1": 0.0}}, ValueError, "rank: .* got 0.0"),
    ({"rank": True}, TypeError, "rank: expected an integer, .* or None, got bool"),
    ({"rank": {"fc1": [3]}}, TypeError, "rank: .* got list"),
    *(
        ({"eta": eta}, ValueError, f"eta: expected a finite number >= 0, got {eta}")
        for eta in (-1.0, NAN, INF)
    ),
    ({"eta": torch.zeros(1)}, ValueError, r"eta: expected a number or a 0-d tensor, got shape \[1\]"),
    *(({"sample": s}, ValueError, r"sample: expected a fraction in \(0, 1\]") for s in (0.0, -0.1, 1.5, NAN)),
    *(
        ({"every": e}, ValueError, "every: expected a whole number of steps, at least 1")
        for e in (0, -1, 1.5)
    ),
    *(({"limit": x}, ValueError, r"limit: expected a number in \(0, 2\)") for x in (0.0, -1.0, 2.0, NAN)),
    *(({"kappa": k}, ValueError, r"kappa: expected a number in \[0, 1\]") for k in (-0.1, 1.01, NAN, INF)),
]


@pytest.mark.parametrize(("changes", "error", "match"), REFUSALS, ids=lambda value: str(value)[:40])
def test_what_is_out_of_range_is_refused(changes, error, match):
    with pytest.raises(error, match=match):
        Decor(**changes)


@pytest.mark.parametrize(
    "enter",
    [
        lambda model, decor: dbpkern.decorrelate(model, decor),
        lambda model, decor: DecorAdamW(model.parameters(), model=model, decor=decor),
        lambda model, decor: DecorMuon(model.parameters(), model=model, decor=decor),
        lambda model, decor: DecorPreconditioner(model, torch.optim.SGD(model.parameters(), 0.1), decor),
    ],
    ids=["decorrelate", "DecorAdamW", "DecorMuon", "DecorPreconditioner"],
)
def test_what_a_model_cannot_serve_is_refused_and_leaves_it_alone(enter):
    for decor, match in (
        (Decor(filter=lambda name, module: False), "the filter leaves no layer"),
        (Decor(rank=25, sites=("qkv", "fc2")), "rank: expected an integer in .* got 25"),
        (Decor(rank={"proj": 2}, sites="fc1"), "rank: expected some of the chosen sites"),
    ):
        model = make("timm")
        with pytest.raises(ValueError, match=match):
            enter(model, decor)
        assert not any(module._forward_hooks for module in model.modules())
        assert {type(m) for m in model.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    with pytest.raises(ValueError, match="site 'patch_embed' matches no layer"):
        enter(nn.Sequential(nn.Linear(3, 3)), Decor())
    with pytest.raises(ValueError, match="decorrelated already"):
        enter(mlp(3, 3), Decor(sites=None, filter=everything))


def test_what_is_no_rule_is_refused():
    model = make("timm")
    for enter in (DecorAdamW, DecorMuon):
        with pytest.raises(TypeError, match="decor: expected a Decor, got dict"):
            enter(model.parameters(), model=model, decor={"rank": 3})
        with pytest.raises(TypeError, match="model: expected a module, got list"):
            enter(model.parameters(), model=list(model.parameters()))
    with pytest.raises(TypeError, match="decor: expected a Decor, got float"):
        DecorSGD(mlp(3, 3), 0.1)
    with pytest.raises(TypeError, match="optimizer: expected an optimizer, got int"):
        DecorSGD(mlp(3, 3), Decor(follow=True), 3)
    for follow, optimizer in ((True, None), (False, torch.optim.SGD(model.parameters(), 0.1))):
        with pytest.raises(
            ValueError, match=r"expected the optimizer that eta follows with Decor\(follow=True\)"
        ):
            DecorSGD(mlp(3, 3), Decor(follow=follow), optimizer)
