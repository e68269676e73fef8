"""The kernels as functions on tensors.

Each function checks its arguments, then calls an operator registered with `torch.library` (namespace
`dbpkern`), so it works in eager mode, under autocast and in `torch.compile(fullgraph=True)`.
`dbpkern.reference` holds the specification of each.
"""

from dbpkern.ops.apply import apply_
from dbpkern.ops.correlation import correlation
from dbpkern.ops.fold import fold
from dbpkern.ops.fused_step import fused_step
from dbpkern.ops.transform import transform
from dbpkern.ops.update import update_

__all__ = ["apply_", "correlation", "fold", "fused_step", "transform", "update_"]
