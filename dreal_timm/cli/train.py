"""`dreal-timm train`, and what it starts from: `recipes` and `data`"""
import argparse
import shutil
from pathlib import Path

from dreal_timm.cli.flags import Commands

__all__ = ['add_sources', 'add_train']


def _train(args: argparse.Namespace) -> int:
    from dreal_timm.train import describe, load_config, run
    from dreal_timm.train.launch import fast_kernels
    fast_kernels()
    results = run(load_config(args.recipe, args.settings))
    print(describe(results))
    return 1 if results['pushed'] == '' else 0


def add_train(commands: Commands) -> None:
    """Add `train`."""
    train = commands.add_parser('train', help='train a network from a recipe and export it')
    train.add_argument('recipe', metavar='RECIPE', help='file, or name of one of the recipes of the package')
    train.add_argument('settings', metavar='KEY=VALUE', nargs='*', help='settings in place of the recipe\'s')
    train.set_defaults(function=_train)


def _recipes(args: argparse.Namespace) -> None:
    from dreal_timm.train import find_recipe, list_recipes
    from dreal_timm.train.settings import list_keys
    if args.keys:
        print('\n'.join(list_keys()))
        return
    if args.copy:
        source, target = find_recipe(args.copy), Path(args.to)
        target = target / source.name if target.is_dir() else target
        if target.exists():
            raise FileExistsError(f'{target} exists: choose another place with --to.')
        shutil.copyfile(source, target)
        print(target)
        return
    for name, path in list_recipes().items():
        title = path.read_text(encoding='utf-8').splitlines()[0].lstrip('# ')
        print(f'{name:20} {title}')


def _data(args: argparse.Namespace) -> None:
    from dreal_timm.data import prepare_digits, prepare_fashion_mnist, prepare_glyphs
    if args.name == 'glyphs':
        counts = prepare_glyphs(args.directory, args.source)
        parts = f"{counts['query']:,} queries, {counts['gallery']:,} in the gallery"
    elif args.name == 'digits':
        counts = prepare_digits(args.directory)
        parts = f"{counts['validation']:,} to validate on"
    else:
        counts = prepare_fashion_mnist(args.directory, args.source)
        parts = f"{counts['validation']:,} to validate on"
    print(f"{args.directory}: {counts['train']:,} images to train on, {parts}")


def add_sources(commands: Commands) -> None:
    """Add `recipes` and `data`."""
    recipes = commands.add_parser('recipes', help='list the recipes of the package, or copy one')
    recipes.add_argument('--copy', metavar='NAME', default='', help='recipe to copy')
    recipes.add_argument('--keys', action='store_true', help='list the keys of a recipe with their defaults')
    recipes.add_argument('--to', metavar='PATH', default='.', help='where to copy it to (this folder)')
    recipes.set_defaults(function=_recipes)

    data = commands.add_parser('data', help='prepare a small real data set')
    data.add_argument('name', choices=('digits', 'fashion-mnist', 'glyphs'), help='data set')
    data.add_argument('directory', metavar='DIR', help='folder to write')
    data.add_argument('--source', metavar='DIR', default=None, help='gz files of Fashion-MNIST, or fonts of the glyphs')
    data.set_defaults(function=_data)
