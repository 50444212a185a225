"""Flags that several commands share, and what is read of them"""
import argparse
from collections.abc import Sequence
from typing import Any

__all__ = ['MODEL', 'Commands', 'add_flags', 'read_options']

Commands = Any  # what `ArgumentParser.add_subparsers` returns: argparse has no public name for it

MODEL = "name of a model, hf-hub:USER/NAME, an exported folder, or the folder of a run or of timm's train.py"

_FLAGS: dict[str, dict[str, Any]] = {
    '--dataset': dict(metavar='NAME', default='', help='kind/name as in a recipe (image folder)'),
    '--checkpoint': dict(metavar='FILE', default='', help='weights to load'),
    '--input-size': dict(metavar=('C', 'H', 'W'), nargs=3, type=int, help="size of the images (the model's own)"),
    '--model-kwargs': dict(
        metavar='OPTION=VALUE', nargs='+', default=[],
        help='options of timm.create_model, such as num_classes=10, where --checkpoint needs them'),
    '--batch-size': dict(metavar='N', type=int, default=128, help='images a step (128)'),
    '--workers': dict(metavar='N', type=int, default=2, help='loader processes (2)'),
    '--device': dict(default=None, help='device (an accelerator where there is one)'),
    '--results': dict(metavar='FILE', default='', help='write the results to a JSON file as well'),
    '--json': dict(action='store_true', help='print JSON'),
    '--class-map': dict(metavar='FILE', default='', help='names of the classes in the order of the outputs'),
    '--classes-by-order': dict(
        dest='by_order', action='store_true',
        help='take the classes of the data set in their order, whatever their names'),
}


def add_flags(command: argparse.ArgumentParser, *names: str) -> None:
    """Add flags of the table above, in this order."""
    for name in names:
        command.add_argument(name, **_FLAGS[name])


def read_options(settings: Sequence[str]) -> dict[str, Any]:
    """['num_classes=5', 'block_args={a: 1}'] -> {'num_classes': 5, 'block_args': {'a': 1}}."""
    import yaml
    options = {}
    for setting in settings:
        key, equals, value = setting.partition('=')
        if not equals or not key:
            raise ValueError(f"Expected OPTION=VALUE, got '{setting}'.")
        options[key] = yaml.safe_load(value)
    return options
