"""`python -m dreal_timm`: the command line, for launchers that start a module"""
import sys

from dreal_timm.cli import main

if __name__ == '__main__':
    sys.exit(main())
