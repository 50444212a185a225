"""Batch norms in a counterfactual pass: the statistics of the judged pass, and no trace of having used them"""
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from timm.layers import FrozenBatchNormAct2d, SplitBatchNorm2d
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torchvision.ops.misc import FrozenBatchNorm2d

__all__ = ['Stats', 'check_probeable', 'record_norms', 'replay_norms']

Stats = tuple[torch.Tensor, torch.Tensor]

# nodes of autograd that keep the batch's mean and inverse standard deviation as results 1 and 2
_NODES = ('NativeBatchNormBackward0', 'CudnnBatchNormBackward0', 'MiopenBatchNormBackward0')


def check_probeable(model: nn.Module) -> None:
    """Raise a ValueError if a layer normalises with batch statistics that a probe cannot replay."""
    replayed = (_BatchNorm, _InstanceNorm, FrozenBatchNorm2d, FrozenBatchNormAct2d)
    for name, module in model.named_modules():
        batch_stats = 'running_var' in module._buffers and not isinstance(module, replayed)
        if batch_stats or isinstance(module, SplitBatchNorm2d):
            raise ValueError(
                f'{name} ({type(module).__name__}) normalises with batch statistics that a counterfactual pass cannot '
                'replay. Use a torch batch norm, timm BatchNormAct2d, group norm or layer norm.'
            )


def _saved_stats(output: torch.Tensor) -> Stats | None:
    """Mean and inverse standard deviation, saved for the backward pass; None where they are not, or not for free."""
    if torch.compiler.is_compiling():
        return None
    # reading what checkpointing keeps would run the forward pass again; older versions cannot tell
    hooks = getattr(torch._C._autograd, '_top_saved_tensors_default_hooks', None)
    if hooks is None or hooks(True) is not None:
        return None
    node: Any = output.grad_fn
    for _ in range(3):  # norm, dropout and activation may be one module
        if node is None:
            return None
        if node.name() in _NODES:
            return node._saved_result1, node._saved_result2
        node = node.next_functions[0][0] if node.next_functions else None
    return None


def _batch_stats(module: nn.Module, x: torch.Tensor) -> Stats:
    """Mean and biased variance over all but the channels, those of all processes for a synchronised batch norm."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    dims = [d for d in range(x.ndim) if d != 1]
    mean = x.mean(dims, keepdim=True)
    variance = (x - mean).square().mean(dims)
    mean = mean.flatten()
    if isinstance(module, nn.SyncBatchNorm) and dist.is_initialized() and dist.get_world_size() > 1:
        mean, variance = _join_stats(mean, variance, x.numel() // x.shape[1], module.process_group)
    return mean, variance


def _join_stats(mean: torch.Tensor, variance: torch.Tensor, count: int, process_group: Any) -> Stats:
    # in float64: the variance is a difference of large sums
    wide, counts = mean.double(), torch.full_like(mean, count, dtype=torch.float64)
    sums = torch.stack([counts, counts * wide, counts * (variance.double() + wide.square())])
    dist.all_reduce(sums, group=process_group)
    joint = sums[1] / sums[0]
    return joint.to(mean.dtype), (sums[2] / sums[0] - joint.square()).clamp(min=0).to(mean.dtype)


@contextmanager
def record_norms(model: nn.Module) -> Iterator[dict[str, list[Stats]]]:
    """Record, for the passes inside the context, the statistics of each batch norm that uses the batch's.

    Yields:
        Mean and biased variance, in the dtype of the norm's weights, one pair a call, by the name of the norm.
    """
    stats: dict[str, list[Stats]] = {}
    saved: dict[float, list[tuple[list[Stats], int, torch.Tensor, torch.dtype]]] = {}  # by eps

    def on_output(name: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            with torch.no_grad():
                calls = stats.setdefault(name, [])
                own = _saved_stats(output)
                mean, spread = _batch_stats(module, args[0]) if own is None else own
                weight = getattr(module, 'weight', None)
                dtype = mean.dtype if weight is None else weight.dtype
                if own is not None:  # the variance follows with those of all other norms
                    saved.setdefault(module.eps, []).append((calls, len(calls), spread, dtype))
                calls.append((mean.to(dtype), spread.to(dtype)))
        return hook

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
                stack.callback(module.register_forward_hook(on_output(name)).remove)
        yield stats
    for eps, norms in saved.items():
        _fill_variances(norms, eps)


@torch.no_grad()
def _fill_variances(norms: Sequence[tuple[list[Stats], int, torch.Tensor, torch.dtype]], eps: float) -> None:
    """Replace inverse standard deviations by variances, of all norms at once: each launch costs a GPU time."""
    inverse = torch.cat([each for _, _, each, _ in norms])
    variance = (inverse.double().pow(-2) - eps).clamp(min=0).to(inverse.dtype)
    variances = variance.split([len(each) for _, _, each, _ in norms])
    for (calls, index, _, dtype), own in zip(norms, variances, strict=True):
        calls[index] = calls[index][0], own.to(dtype)


@contextmanager
def replay_norms(model: nn.Module, norms: Mapping[str, Sequence[Stats]]) -> Iterator[None]:
    """Let batch norms use recorded statistics, as in evaluation mode; flags and buffers are given back."""
    saved = []

    def on_input(pairs: Iterator[Stats]) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            module._buffers['running_mean'], module._buffers['running_var'] = next(pairs)
        return hook

    with ExitStack() as stack:
        try:
            for name, pairs in norms.items():
                module = model.get_submodule(name)
                saved.append((module, module.training, dict(module._buffers)))
                if len(pairs) == 1:
                    module._buffers['running_mean'], module._buffers['running_var'] = pairs[0]
                else:
                    stack.callback(module.register_forward_pre_hook(on_input(iter(pairs))).remove)
                module.training = False
            yield
        finally:
            for module, training, buffers in saved:
                module.training = training
                module._buffers.update(buffers)
