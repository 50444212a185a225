"""`accelerate launch -m dreal_timm.train RECIPE [key=value ...]`"""
import logging
import sys

from dreal_timm.train import load_config, run

if __name__ == '__main__':
    if len(sys.argv) < 2:
        sys.exit('usage: python -m dreal_timm.train RECIPE [KEY=VALUE ...]')
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    run(load_config(sys.argv[1], sys.argv[2:]))
