"""`python -m dreal_timm.cli`: the command line"""
import sys

from dreal_timm.cli import main

if __name__ == '__main__':
    sys.exit(main())
