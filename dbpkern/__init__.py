"""Fast decorrelated backpropagation for vision transformers.

optimizer = dbpkern.DecorAdamW(model.parameters(), lr=1e-3, weight_decay=0.05, model=model)

or around any optimizer:

decor = dbpkern.DecorPreconditioner(model, optimizer)     # nothing else changes

or with layers that compute W R x, as the papers have it:

dbpkern.decorrelate(model)                  # in place: layers that whiten their inputs with a learned R
decor = dbpkern.DecorSGD(model)             # updates every R
...
loss.backward(); optimizer.step(); decor.step()
dbpkern.fuse(model)                         # stock layers again, R folded into the weights

`dbpkern.Decor` says which layers, and how their R move.
"""

from dbpkern import ops
from dbpkern.config import Decor
from dbpkern.layers import DecorConv2d, DecorLinear, DecorMultiheadAttention, DecorSGD, decorrelate, fuse
from dbpkern.optim import DecorAdamW, DecorMuon, DecorPreconditioner

__version__ = "0.1.0"

__all__ = [
    "Decor",
    "DecorAdamW",
    "DecorConv2d",
    "DecorLinear",
    "DecorMultiheadAttention",
    "DecorMuon",
    "DecorPreconditioner",
    "DecorSGD",
    "decorrelate",
    "fuse",
    "ops",
]
