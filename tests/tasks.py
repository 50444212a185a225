"""What tests of the task share: how one is made, the gradients of a step, and a port for two processes"""
import socket

import torch
from torch import nn

from dreal_timm import DrealTask


def make_task(model: nn.Module, **options) -> DrealTask:
    """A task for images of 64 x 64 pixels, if `input_size` names no others."""
    return DrealTask(model, verbose=False, **{'input_size': (3, 64, 64), **options})


def gradients(module: nn.Module, prefix: str = '') -> dict[str, torch.Tensor | None]:
    """Copies of the gradients by the names of their parameters, less a prefix; None where there is no gradient."""
    return {
        name.removeprefix(prefix): None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(('127.0.0.1', 0))
        return sock.getsockname()[1]
