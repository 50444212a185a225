"""`accelerate launch -m dreal_timm.train RECIPE [key=value ...]`"""
import logging
import sys

import torch
from accelerate import PartialState

from dreal_timm.errors import one_line
from dreal_timm.train import describe, load_config, run
from dreal_timm.train.launch import fast_kernels

if __name__ == '__main__':
    debug = '--debug' in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != '--debug']
    if not arguments:
        sys.exit('usage: python -m dreal_timm.train [--debug] RECIPE [KEY=VALUE ...]')
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    for name in ('timm', 'accelerate'):
        logging.getLogger(name).setLevel(logging.WARNING)
    fast_kernels()
    try:
        results = run(load_config(arguments[0], arguments[1:]))
        if PartialState().is_main_process:
            print(describe(results))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:  # one line for whatever goes wrong, as `dreal-timm train`
        if debug:
            raise
        print(f'{arguments[0]}: error: {one_line(error)}', file=sys.stderr)
        sys.exit(2)
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == 'nccl':
        torch.distributed.destroy_process_group()  # NCCL asks for it; with gloo it can wait for ever (torch 2.4)
    if results['pushed'] == '':  # trained, but not sent
        sys.exit(1)
