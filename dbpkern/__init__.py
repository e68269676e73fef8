"""Fast decorrelated backpropagation for vision transformers.

decor = dbpkern.DecorPreconditioner(model, optimizer)     # around any optimizer; nothing else changes

or with layers that compute W R x:

dbpkern.decorrelate(model)                  # in place: layers that whiten their inputs with a learned R
decor = dbpkern.DecorSGD(model)             # updates every R
...
loss.backward(); optimizer.step(); decor.step()
dbpkern.fuse(model)                         # stock layers again, R folded into the weights
"""

from dbpkern import ops
from dbpkern.convert import decorrelate, fuse
from dbpkern.nn import DecorConv2d, DecorLinear, DecorMultiheadAttention
from dbpkern.optim import DecorSGD
from dbpkern.planning import Plan, plan
from dbpkern.precondition import DecorPreconditioner

__version__ = "0.1.0"

__all__ = [
    "DecorConv2d",
    "DecorLinear",
    "DecorMultiheadAttention",
    "DecorPreconditioner",
    "DecorSGD",
    "Plan",
    "decorrelate",
    "fuse",
    "ops",
    "plan",
]
