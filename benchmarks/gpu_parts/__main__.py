"""One part, in a process that ends in time: `python -m gpu_parts PART --device cuda --output FILE --ends SECONDS`"""
import argparse
import faulthandler
import importlib
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from gpu_parts.record import Record


def end_with(parent: int) -> None:
    """End this process and all that it started when its parent has ended."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('part')
    parser.add_argument('--device', required=True)
    parser.add_argument('--output', type=Path, required=True, help='JSON file, which is there')
    parser.add_argument('--ends', type=float, required=True, help='time.monotonic() at which it is killed')
    parser.add_argument('--small', action='store_true')
    args = parser.parse_args()
    left = args.ends - time.monotonic()
    faulthandler.dump_traceback_later(max(left - 2, 1), exit=True)  # says where it hangs
    if os.getpgrp() == os.getpid():  # started by the command, with a group of its own
        threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    logging.basicConfig(level=logging.WARNING, format='%(message)s')
    device = torch.device(args.device)
    if device.type == 'cuda':
        # errors are those of float32, and the same kernels are taken each time
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    else:
        torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', '2')))
    record = Record(args.output, args.ends - min(8.0, left / 5))
    family, _, name = args.part.partition('.')
    options: dict[str, Any] = {}
    file = name or family
    if family == 'cost':
        file, options = 'cost', {'compiled': name == 'compiled'}
    elif name in ('bfloat16', 'float16'):
        file, options = 'low_precision', {'dtype': getattr(torch, name)}
    importlib.import_module(f'gpu_parts.{file}').main(record, device, args.small, **options)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # pools of compilers and of CUDA have nothing left to say


if __name__ == '__main__':
    main()
