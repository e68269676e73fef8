"""Short ways to say a rule in tests: fields of `Decor` as keywords."""

from dataclasses import replace

import dbpkern
from dbpkern import Decor


def layers_rule(**changes):
    """`Decor.layers()` with changes."""
    return replace(Decor.layers(), **changes)


def decor_sgd(model, optimizer=None, **changes):
    """`DecorSGD` with changes to `Decor.layers()`."""
    return dbpkern.DecorSGD(model, layers_rule(**changes), optimizer)


def convert(model, sites="sublayers", filter=None, form="auto", rank=None):
    """`decorrelate` with the fields of `Decor` that concern it."""
    return dbpkern.decorrelate(model, Decor(sites=sites, filter=filter, rank=rank), form)


def preconditioner(model, optimizer, **changes):
    """`DecorPreconditioner` with changes to `Decor()`."""
    return dbpkern.DecorPreconditioner(model, optimizer, Decor(**changes))
