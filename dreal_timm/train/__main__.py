"""`accelerate launch -m dreal_timm.train RECIPE [key=value ...]`"""
import logging
import sys

from dreal_timm.train import load_config, run

if __name__ == '__main__':
    if len(sys.argv) < 2:
        sys.exit('usage: python -m dreal_timm.train RECIPE [KEY=VALUE ...]')
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    try:
        run(load_config(sys.argv[1], sys.argv[2:]))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f'{sys.argv[1]}: error: {" ".join(str(error).split())}', file=sys.stderr)
        sys.exit(2)
