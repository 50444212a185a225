"""`dreal-timm reid ...`"""
import argparse
import json
from typing import Any

from dreal_timm.reid.checking import check_reid
from dreal_timm.reid.layouts import LAYOUTS, open_reid
from dreal_timm.reid.metrics import CAMERA_RULES

__all__ = ['add_commands']


def _check(args: argparse.Namespace) -> int:
    found = check_reid(
        open_reid(args.directory, args.layout), args.images, args.camera_rule, not args.no_images, args.workers)
    if args.json:
        told = {
            'directory': str(found.data.root), 'layout': found.data.layout, 'counts': found.counts,
            'junk': found.data.junk, 'notes': found.data.notes, 'problems': list(found.problems)}
        print(json.dumps(told, indent=2))
    else:
        print(found)
    return 1 if found.problems else 0


def add_commands(reid: argparse.ArgumentParser) -> None:
    """Add the commands of re-identification to their parser."""
    commands: Any = reid.add_subparsers(dest='reid_command', required=True, metavar='COMMAND')
    check = commands.add_parser('check', help='look for what is wrong with a data set')
    check.add_argument('directory', metavar='DIR', help='folder of the data set, or a table')
    check.add_argument('--layout', choices=tuple(LAYOUTS), default='', help='what it is (looks what it is)')
    check.add_argument('--images', metavar='K', type=int, default=8, help='images of an identity in a batch (8)')
    check.add_argument(
        '--camera-rule', choices=CAMERA_RULES, default='exclude', help='rule of the evaluation (exclude)')
    check.add_argument('--no-images', action='store_true', help='do not read the images')
    check.add_argument('--workers', metavar='N', type=int, default=4, help='threads that read them (4)')
    check.add_argument('--json', action='store_true', help='print JSON')
    check.set_defaults(function=_check)
