"""Peak memory of a training step, reinforced against plain, each in a process of its own

On a GPU the most that PyTorch had allocated, on a CPU the most resident memory beyond that of the process before its
first step.
"""
import argparse
import platform
import resource
import shlex
import subprocess
import sys

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask

import dreal_timm
from dreal_timm import DrealTask


def peak(args: argparse.Namespace, device: torch.device) -> float:
    """Return the peak memory, MiB, of a few steps of the task `args.only`."""
    torch.manual_seed(0)
    size = (3, args.size, args.size)
    model = timm.create_model(args.model, num_classes=100, zero_init_last=False).to(device)
    if args.only == 'plain':
        task = ClassificationTask(model, device=device, verbose=False)
    else:
        task = DrealTask(model, device=device, verbose=False, input_size=size)
    module = task.get_trainable_module()
    optimizer = create_optimizer_v2(module, 'sgd', lr=0.01)
    batch = (
        torch.randn(args.batch_size, *size, device=device), torch.randint(100, (args.batch_size,), device=device))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    for _ in range(args.steps):
        module.train()
        task(*batch)['loss'].backward()
        optimizer.step()
        optimizer.zero_grad()
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--model', default='dreal_se_resnet50')
    parser.add_argument('--size', type=int, default=96, help='side of the images, pixels')
    parser.add_argument('--batch-size', type=int, default=16)
    parser.add_argument('--steps', type=int, default=3)
    parser.add_argument('--only', choices=('plain', 'reinforced'), help='measure one of them, in this process')
    args = parser.parse_args()
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    if args.only:
        print(peak(args, device))
        return
    where = torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'
    print(f'command: {shlex.join(["python", *sys.argv])}')
    print(f'machine: {platform.machine()}, {where}')
    print(f'versions: torch {torch.__version__}, timm {timm.__version__}, dreal_timm {dreal_timm.__version__}')
    peaks = {}
    for name in ('plain', 'reinforced'):
        command = [sys.executable, *sys.argv, '--only', name]
        peaks[name] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f'{name:10} {peaks[name]:8.0f} MiB')
    print(f"ratio      {peaks['reinforced'] / peaks['plain']:.2f}")


if __name__ == '__main__':
    main()
