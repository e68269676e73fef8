"""`DecorMuon`: Muon with decorrelated backpropagation."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from dbpkern import ops
from dbpkern.config import Decor
from dbpkern.optim.base import DecorOptimizer, gradients_of, local

SCALES: dict[str, Callable[[int, int], float]] = {
    "original": lambda o, d: math.sqrt(max(1.0, o / d)),
    "match_rms_adamw": lambda o, d: 0.2 * math.sqrt(max(o, d)),
}
"""Factors on the learning rate of a matrix `[o, d]`: those of Muon's author, and of arXiv 2502.16982."""


class DecorMuon(DecorOptimizer):
    """Muon in the coordinates of decorrelated inputs (arXiv 2510.14657).

        optimizer = dbpkern.DecorMuon(model.parameters(), lr=2e-3, weight_decay=0.05, model=model)
        ...
        loss.backward(); optimizer.step()

    Muon (K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024) orthogonalises
    the momentum of matrices; other parameters are stepped by AdamW. A matrix is a parameter of two or more
    dimensions, none of the first two of length 1, taken as `[o, d]`; a group with `use_muon` says so itself.
    Matrices of equal shape are orthogonalised together, in bf16 on GPUs and in their own dtype elsewhere: on
    a CPU without bf16 units bf16 takes ten times as long. The gradients of chosen layers are mapped by R
    before, the changes after, but for the decay, which is of V itself. Then R makes its step.

    Args:
        params: parameters or groups of them; groups may have options of their own.
        lr: learning rate, a number or a 0-d tensor.
        weight_decay: decoupled.
        momentum: of the matrices.
        nesterov: whether the gradient is ahead of its momentum.
        scale: "match_rms_adamw", for learning rates like AdamW's, or "original"; see `SCALES`.
        ns_steps: of the Newton-Schulz iteration.
        betas: of AdamW.
        eps: of AdamW.
        model: whose layers are decorrelated; None for plain Muon.
        decor: which layers, and how their R move; `Decor()` for None.
        capturable: as for `DecorAdamW`.

    Raises:
        TypeError: `model` is no module, or `decor` no `Decor`.
        ValueError: a number out of range; as `decorrelate` for sites, filters and ranks; or `params` lack a
            chosen weight that trains.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        scale: str = "match_rms_adamw",
        ns_steps: int = 5,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        *,
        model: nn.Module | None = None,
        decor: Decor | None = None,
        capturable: bool = False,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum: expected a number in [0, 1), got {momentum}")
        if scale not in SCALES:
            raise ValueError(f"scale: expected one of {tuple(SCALES)}, got {scale!r}")
        defaults = {
            "lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov,
            "scale": scale, "ns_steps": ns_steps, "betas": betas, "eps": eps, "capturable": capturable,
        }  # fmt: skip
        super().__init__(params, defaults, model, decor)

    @torch.compiler.disable
    def _step_weights(self) -> None:
        groups = self._trained()
        for group, trained in groups:
            if trained and group["weight_decay"]:  # of V itself, before its change is mapped
                torch._foreach_mul_([local(p) for p in trained], 1 - group["lr"] * group["weight_decay"])
        maps = None if self.engine is None else self._maps
        if maps is not None:
            maps.enter(self)
        for group, trained in groups:
            matrices: dict[tuple[int, int, torch.dtype, torch.device], list[Tensor]] = {}
            others = []
            for parameter in trained:
                if group.get("use_muon", _is_matrix(parameter)):
                    key = (parameter.shape[0], parameter.shape[1:].numel(), parameter.dtype, parameter.device)
                    matrices.setdefault(key, []).append(parameter)
                else:
                    others.append(parameter)
            for equal in matrices.values():
                self._step_matrices(group, equal)
            self._step_adamw(group | {"weight_decay": 0.0}, others)
        if maps is not None:
            maps.leave()

    def _step_matrices(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        """Step matrices of equal shape and dtype."""
        for parameter in parameters:
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        weights = [local(p) for p in parameters]
        gradients = [local(gradient) for gradient in gradients_of(parameters)]
        buffers = [local(self.state[p]["momentum_buffer"]) for p in parameters]
        momentum = group["momentum"]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        updates = torch._foreach_lerp(gradients, buffers, momentum) if group["nesterov"] else buffers
        o, d = parameters[0].shape[0], parameters[0].shape[1:].numel()
        dtype = torch.bfloat16 if weights[0].is_cuda else weights[0].dtype
        whole = [_gathered(u, p).reshape(o, d) for u, p in zip(updates, parameters, strict=True)]
        stack = ops.orthogonalize(torch.stack(whole).to(dtype), group["ns_steps"])
        changes = stack.to(weights[0].dtype) * (-group["lr"] * SCALES[group["scale"]](o, d))
        parts = [_own(c.view(p.shape), p) for c, p in zip(changes.unbind(), parameters, strict=True)]
        torch._foreach_add_(weights, parts)


def _is_matrix(parameter: Tensor) -> bool:
    """Whether Muon steps the parameter: no vector, token or table of positions."""
    return parameter.dim() > 1 and 1 not in parameter.shape[:2]


def _gathered(tensor: Tensor, like: Tensor) -> Tensor:
    """The whole of a tensor that is sharded as the parameter `like` is."""
    if not (hasattr(like, "placements") and hasattr(like, "device_mesh")):
        return tensor
    from torch.distributed.tensor import DTensor  # slow to import, and rarely needed

    return DTensor.from_local(
        tensor, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    ).full_tensor()


def _own(tensor: Tensor, like: Tensor) -> Tensor:
    """The part of a whole tensor that lies in this process, as that of the parameter `like` does."""
    if not (hasattr(like, "placements") and hasattr(like, "device_mesh")):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None).to_local()
