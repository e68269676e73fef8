"""Optimizers with decorrelated backpropagation, and the preconditioner that brings it to any other."""

from dbpkern.optim.adamw import DecorAdamW
from dbpkern.optim.muon import DecorMuon
from dbpkern.optim.precondition import DecorPreconditioner

__all__ = ["DecorAdamW", "DecorMuon", "DecorPreconditioner"]
