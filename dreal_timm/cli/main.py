"""The command line: `dreal-timm train | validate | inspect | audit | compare | export | push | ...`"""
import argparse
import os
import sys
from collections.abc import Sequence

from dreal_timm.cli import measure, share, train
from dreal_timm.errors import one_line, was_interrupted
from dreal_timm.utils.terminal import set_up_log, visible_output
from dreal_timm.version import __version__

__all__ = ['main']


def _parser() -> argparse.ArgumentParser:
    from dreal_timm.cli import reid  # here, since it takes a second, and Ctrl-C may come in it
    parser = argparse.ArgumentParser(
        prog='dreal-timm', description='Deep reinforced attention learning (DREAL) for timm models.')
    parser.add_argument('--version', action='version', version=f'dreal_timm {__version__}')
    parser.add_argument('--debug', action='store_true', help='show the traceback of an error')
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')
    for add in (
            train.add_train, measure.add_commands, share.add_commands, reid.add_commands, train.add_sources):
        add(commands)
    return parser


def _as_setting(unknown: Sequence[str]) -> str:
    """['--epochs', '1'] -> 'epochs=1'."""
    name, equals, value = unknown[0].lstrip('-').partition('=')
    given = value if equals else next((text for text in unknown[1:2] if not text.startswith('-')), 'VALUE')
    return f"{name.replace('-', '_')}={given}"


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        hint = f'; settings of a recipe are written {_as_setting(unknown)}' if args.command == 'train' else ''
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    args.argv = list(sys.argv[1:] if argv is None else argv)
    return args


def _answer(args: argparse.Namespace) -> int:
    """Run a command, and tell an error in a line."""
    try:
        with visible_output():
            return args.function(args) or 0
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # one line for whatever goes wrong; --debug shows the rest
        if was_interrupted(error):
            raise KeyboardInterrupt from None
        if args.debug:
            raise
        print(f'dreal-timm {args.command}: error: {one_line(error)}', file=sys.stderr)
        return 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, 1 where nothing was found or sent, or 2 after an error.

    After Ctrl-C it returns 130.
    """
    command = ''
    try:
        args = _arguments(argv)
        command = f' {args.command}'
        set_up_log()
        return _answer(args)
    except KeyboardInterrupt:
        print(f'dreal-timm{command}: interrupted', file=sys.stderr)
        return 130
