"""The weight of L_q by its gradient: a set share of that of L_c at the attention parameters"""
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

__all__ = ['ActorShare']

_MOMENTUM = 0.9


class ActorShare:
    """Weigh L_q so that its gradient at the attention parameters is so many times as long as that of L_c.

    L_c's gradient is known only after the backward pass: its length is the moving average over the steps before, of
    which the first one has none, so that L_q begins with the second step. L_q's own is computed ahead, which is cheap:
    its graph reaches the gates alone. Lengths are over all attention parameters together, and in several processes
    those of a process's own samples.

    Args:
        share: The share.

    Raises:
        ValueError: It is no number above 0.
    """

    def __init__(self, share: float):
        if not 0 < share < float('inf'):
            raise ValueError(f'actor_share must be above 0, got {share}.')
        self.share = share
        self.class_length: torch.Tensor | None = None
        self._squares: dict[int, torch.Tensor] = {}
        self._scale: torch.Tensor | None = None
        self._handles: list[Any] = []

    def weigh(self, l_q: torch.Tensor, parameters: Sequence[nn.Parameter]) -> torch.Tensor:
        """Return L_q times its weight; the gradients of the next backward pass are looked at.

        Args:
            l_q: L_q, a number.
            parameters: The attention parameters that are trained.
        """
        self.settle()
        actor = torch.autograd.grad(l_q, parameters, retain_graph=True, allow_unused=True)
        length = torch.stack([g.float().square().sum() for g in actor if g is not None]).sum().sqrt()
        weight = length.new_zeros(())
        if self.class_length is not None:
            weight = self.share * self.class_length.to(length.device) / length.clamp(min=1e-12)
        for index, (parameter, gradient) in enumerate(zip(parameters, actor, strict=True)):
            own = 0.0 if gradient is None else weight * gradient
            self._handles.append(parameter.register_hook(self._look(index, own)))
        return weight * l_q

    def _look(self, index: int, own: Any) -> Any:
        def hook(gradient: torch.Tensor) -> None:
            if self._scale is not None:  # a backward pass of this loss
                self._squares[index] = (gradient.detach() / self._scale - own).float().square().sum()
        return hook

    def watch(self, loss: torch.Tensor) -> None:
        """Learn by which factor (of a gradient scaler, of accumulation) `backward()` will multiply the loss."""
        def hook(gradient: torch.Tensor) -> None:
            self._scale = gradient.detach()

        loss.register_hook(hook)

    def settle(self) -> None:
        """Take the gradients of the last backward pass into the average, and look at no further ones."""
        for handle in self._handles:
            handle.remove()
        if self._squares:
            length = torch.stack(list(self._squares.values())).sum().sqrt()
            before = length if self.class_length is None else self.class_length.to(length.device)
            # a step that a loss scaler skips has gradients that are not finite
            self.class_length = torch.where(
                length.isfinite(), _MOMENTUM * before + (1 - _MOMENTUM) * length, before).nan_to_num(posinf=0.0)
        self._handles, self._squares, self._scale = [], {}, None

    def state_dict(self) -> dict[str, torch.Tensor | None]:
        """Return the average."""
        self.settle()
        return {'class_length': self.class_length}

    def load_state_dict(self, state: dict[str, torch.Tensor | None]) -> None:
        """Load what `state_dict` returned."""
        self.settle()
        self.class_length = state['class_length']
