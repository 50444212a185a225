"""`accelerate launch -m dreal_timm.train RECIPE [key=value ...]`"""
import sys


def _main(arguments: list[str], debug: bool) -> int:
    import torch
    from accelerate import PartialState

    from dreal_timm.errors import one_line, was_interrupted
    from dreal_timm.train import describe, load_config, run
    from dreal_timm.train.launch import fast_kernels
    from dreal_timm.utils.terminal import set_up_log, visible_output
    set_up_log()
    fast_kernels()
    try:
        with visible_output():
            results = run(load_config(arguments[0], arguments[1:]))
            if PartialState().is_main_process:
                print(describe(results))
    except Exception as error:  # one line for whatever goes wrong, as `dreal-timm train`
        if was_interrupted(error):
            raise KeyboardInterrupt from None
        if debug:
            raise
        print(f'{arguments[0]}: error: {one_line(error)}', file=sys.stderr)
        return 2
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == 'nccl':
        torch.distributed.destroy_process_group()  # NCCL asks for it; with gloo it can wait for ever (torch 2.4)
    return 1 if results['pushed'] == '' else 0  # trained, but not sent


if __name__ == '__main__':
    given = [argument for argument in sys.argv[1:] if argument != '--debug']
    if not given:
        sys.exit('usage: python -m dreal_timm.train [--debug] RECIPE [KEY=VALUE ...]')
    try:
        code = _main(given, '--debug' in sys.argv)
    except KeyboardInterrupt:
        print(f'{given[0]}: interrupted', file=sys.stderr)
        code = 130
    if code:
        sys.exit(code)
