"""Muon for the matrices of the blocks: momentum whose singular values are all brought near one before the step.

The orthogonalisation costs a fifth of a batch's time here. All matrices of one shape are done at once, so that it is a
few large products.

Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer


def orthogonalized(matrices: Tensor, n_steps: int = 5) -> Tensor:
    """[n, a, b] with a <= b to matrices of nearly the same singular vectors and singular values of about 0.7 to 1.2."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(n_steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def orthogonalized_together(matrices: Tensor) -> Tensor:
    """`orthogonalized`, shared out over the processes, whose number must divide that of the matrices."""
    n_workers = dist.get_world_size()
    own = orthogonalized(matrices.chunk(n_workers)[dist.get_rank()])
    parts = [torch.empty_like(own) for _ in range(n_workers)]
    dist.all_gather(parts, own)
    return torch.cat(parts)


class Muon(Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay.

    Args:
        matrices: Weights in GPT-2's layout, [in, out]. Those three times as wide as long are query, key and value
            beside each other and are treated as three.
        lr: As for AdamW: an update has the root mean square of 0.2 lr per element.
        momentum: Of the gradient's running mean.
        weight_decay: Per step, times lr.
    """

    def __init__(self, matrices: list[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.1) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
            for weight in group["params"]:
                mean = self.state[weight].setdefault("mean", torch.zeros_like(weight))
                mean.lerp_(weight.grad, 1 - group["momentum"])
                ahead = weight.grad.lerp(mean, group["momentum"])
                n_parts = 3 if weight.shape[1] == 3 * weight.shape[0] else 1
                for part, direction in zip(weight.chunk(n_parts, 1), ahead.chunk(n_parts, 1)):
                    if part.shape[0] > part.shape[1]:
                        part, direction = part.mT, direction.mT
                    by_shape.setdefault(tuple(part.shape), []).append((part, direction))
            for (_, longest), parts in by_shape.items():
                steps = orthogonalized_together(torch.stack([direction for _, direction in parts]))
                for (weight, _), update in zip(parts, steps):
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.add_(update, alpha=-0.2 * longest**0.5 * group["lr"])
