"""Devices: which one, and copies to it that do not make the host wait"""
import torch

__all__ = ['pick_device', 'to_device']


def pick_device(device: torch.device | str | None = None) -> torch.device:
    """Return the device of this name; None is a GPU where there is one, else the CPU."""
    return torch.device(device or ('cuda' if torch.cuda.is_available() else 'cpu'))


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a CPU tensor on a device; the host goes on at once.

    A CUDA device reads from pinned memory: a copy from pageable memory waits for all work that was queued before it.
    """
    if device.type == 'cuda':
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
