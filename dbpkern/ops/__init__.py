"""The kernels as functions on tensors.

Each function checks its arguments, then calls an operator registered with `torch.library` (namespace
`dbpkern`), so it works in eager mode, under autocast and in `torch.compile(fullgraph=True)`.
`dbpkern.reference` holds the specification of each. Every function takes `backend=`: None chooses among the
implementations by shape, dtype and device, a name asks for one and raises where it cannot serve.
"""

from dbpkern.ops.adamw import adamw_
from dbpkern.ops.apply import apply_
from dbpkern.ops.correlation import correlation
from dbpkern.ops.fold import fold
from dbpkern.ops.fused_step import fused_step
from dbpkern.ops.lowrank_fold import lowrank_fold
from dbpkern.ops.lowrank_statistics import lowrank_statistics
from dbpkern.ops.lowrank_step import lowrank_step_
from dbpkern.ops.lowrank_transform import lowrank_transform
from dbpkern.ops.maps import map_changes_, map_gradients_, remember
from dbpkern.ops.orthogonalize import orthogonalize
from dbpkern.ops.rates import choose_rates_
from dbpkern.ops.sample_rows import sample_patches_, sample_rows_
from dbpkern.ops.transform import transform
from dbpkern.ops.update import update_

__all__ = [
    "adamw_",
    "apply_",
    "choose_rates_",
    "correlation",
    "fold",
    "fused_step",
    "lowrank_fold",
    "lowrank_statistics",
    "lowrank_step_",
    "lowrank_transform",
    "map_changes_",
    "map_gradients_",
    "orthogonalize",
    "remember",
    "sample_patches_",
    "sample_rows_",
    "transform",
    "update_",
]
