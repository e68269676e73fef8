"""`DecorAdamW`: AdamW with decorrelated backpropagation, one pass over each weight."""

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from dbpkern import ops
from dbpkern.config import Decor
from dbpkern.optim.base import DecorOptimizer, gradients_of, local


class DecorAdamW(DecorOptimizer):
    """AdamW (arXiv 1711.05101) in the coordinates of decorrelated inputs (arXiv 2510.14657).

        optimizer = dbpkern.DecorAdamW(model.parameters(), lr=1e-3, weight_decay=0.05, model=model)
        ...
        loss.backward(); optimizer.step()

    The weights of chosen layers are stepped by `ops.adamw_`: their gradient is mapped by R, the moments are
    those of the mapped gradient, and the change is mapped back, but for the decay, which is of V itself. All
    other parameters are stepped by PyTorch's AdamW. Then R makes its step.

    Args:
        params: parameters or groups of them; groups may have an lr, betas, eps and weight_decay of their own.
        lr: learning rate, a number or a 0-d tensor.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled.
        model: whose layers are decorrelated; None for plain AdamW.
        decor: which layers, and how their R move; `Decor()` for None.
        capturable: keep the counts of steps on the device, and let lr be a tensor there, for CUDA graphs.

    Raises:
        TypeError: `model` is no module, or `decor` no `Decor`.
        ValueError: a number out of range; as `decorrelate` for sites, filters and ranks; or `params` lack a
            chosen weight that trains.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        model: nn.Module | None = None,
        decor: Decor | None = None,
        capturable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "capturable": capturable,
        }  # fmt: skip
        super().__init__(params, defaults, model, decor)

    @torch.compiler.disable
    def _step_weights(self) -> None:
        layers = {} if self.engine is None else {id(x.weight): x for x in self.engine.layers.values()}
        for group, trained in self._trained():
            self._step_adamw(group, [p for p in trained if id(p) not in layers])
            served = [p for p in trained if id(p) in layers]
            steps, means, squares = self._adamw_states(group, served)
            if served:
                torch._foreach_add_(steps, 1)
            weights, gradients, exp_avgs, exp_avg_sqs = [
                [local(t) for t in tensors] for tensors in (served, gradients_of(served), means, squares)
            ]
            ops.adamw_(
                weights, gradients, exp_avgs, exp_avg_sqs, steps, [layers[id(p)].factors for p in served],
                lr=group["lr"], beta1=group["betas"][0], beta2=group["betas"][1],
                eps=group["eps"], weight_decay=group["weight_decay"],
            )  # fmt: skip
