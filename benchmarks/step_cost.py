"""Time of a training step, reinforced against plain, measured in alternation on the same images

Prints the median seconds of a step and their ratio. Each step is forward, backward and optimizer step on random images
of a fixed size; both tasks train a network of their own from the same weights.
"""
import argparse
import copy
import platform
import shlex
import statistics
import sys
import time

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask, TrainingTask

import dreal_timm
from dreal_timm import DrealTask


def step(task: TrainingTask, optimizer: torch.optim.Optimizer, batch: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Run one step and return its seconds."""
    start = time.perf_counter()
    task(*batch)['loss'].backward()
    optimizer.step()
    optimizer.zero_grad()
    if batch[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--model', default='dreal_se_resnet50')
    parser.add_argument('--size', type=int, default=96, help='side of the images, pixels')
    parser.add_argument('--batch-size', type=int, default=16)
    parser.add_argument('--steps', type=int, default=10)
    args = parser.parse_args()
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    print(f'command: {shlex.join(["python", *sys.argv])}')
    where = torch.cuda.get_device_name() if device.type == 'cuda' else f'{torch.get_num_threads()} CPU threads'
    print(f'machine: {platform.machine()}, {where}')
    print(f'versions: torch {torch.__version__}, timm {timm.__version__}, dreal_timm {dreal_timm.__version__}')

    torch.manual_seed(0)
    model = timm.create_model(args.model, num_classes=100, zero_init_last=False).to(device)
    size = (3, args.size, args.size)
    tasks: dict[str, TrainingTask] = {
        'plain': ClassificationTask(copy.deepcopy(model), device=device, verbose=False),
        'reinforced': DrealTask(model, device=device, verbose=False, input_size=size),
    }
    optimizers = {
        name: create_optimizer_v2(task.get_trainable_module(), 'sgd', lr=0.01) for name, task in tasks.items()
    }
    batch = (
        torch.randn(args.batch_size, *size, device=device),
        torch.randint(100, (args.batch_size,), device=device),
    )
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for task in tasks.values():
        task.get_trainable_module().train()
    for index in range(args.steps + 2):
        for name, task in tasks.items():
            elapsed = step(task, optimizers[name], batch)
            if index >= 2:  # the first two warm up
                seconds[name].append(elapsed)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        spread = f'median of {len(values)}, {min(values):.4f} to {max(values):.4f}'
        print(f'{name:10} {medians[name]:.4f} s a step ({spread})')
    print(f"ratio      {medians['reinforced'] / medians['plain']:.2f}")


if __name__ == '__main__':
    main()
