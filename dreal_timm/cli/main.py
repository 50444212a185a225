"""The command line: `dreal-timm train | validate | inspect | audit | compare | export | push | recipes | data`"""
import argparse
import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dreal_timm.errors import one_line, was_interrupted
from dreal_timm.utils.terminal import set_up_log, visible_output
from dreal_timm.version import __version__

__all__ = ['main']


def _train(args: argparse.Namespace) -> int:
    from dreal_timm.train import describe, load_config, run
    from dreal_timm.train.launch import fast_kernels
    fast_kernels()
    results = run(load_config(args.recipe, args.settings))
    print(describe(results))
    return 1 if results['pushed'] == '' else 0


def _options(settings: Sequence[str]) -> dict[str, Any]:
    """['num_classes=5', 'block_args={a: 1}'] -> {'num_classes': 5, 'block_args': {'a': 1}}."""
    import yaml
    options = {}
    for setting in settings:
        key, equals, value = setting.partition('=')
        if not equals or not key:
            raise ValueError(f"Expected OPTION=VALUE, got '{setting}'.")
        options[key] = yaml.safe_load(value)
    return options


def _validate(args: argparse.Namespace) -> None:
    from dreal_timm.train.validate import describe, validate
    from dreal_timm.utils.files import write_text
    if args.results and (Path(args.results).exists() or not Path(args.results).parent.is_dir()):
        raise FileExistsError(f"--results: '{args.results}' exists, or its folder does not.")
    results = validate(
        args.model, args.data, dataset=args.dataset, split=args.split, checkpoint=args.checkpoint,
        batch_size=args.batch_size, workers=args.workers, device=args.device, class_map=args.class_map,
        by_order=args.by_order, model_kwargs=_options(args.model_kwargs))
    if args.results:
        write_text(Path(args.results), json.dumps(results, indent=2) + '\n')
    print(json.dumps(results, indent=2) if args.json else describe(results))


def _inspect(args: argparse.Namespace) -> int:
    from dreal_timm.attention.readers import without_sites
    from dreal_timm.audit import describe_sites, format_sites
    from dreal_timm.hub.loading import fetch_network, timm_name
    from dreal_timm.hub.run import exported_folder, open_network
    from dreal_timm.hub.shapes import bounded, build
    options, exported = _options(args.options), exported_folder(args.model)
    if exported is None and Path(args.model).exists():  # a run that has not ended, or one of timm
        model = open_network(args.model, **options)
    else:
        name = timm_name(args.model if exported is None else str(exported))
        fetch_network(name, weights=False)
        with bounded():
            model = build(name, **options)
    rows = describe_sites(model, args.input_size)
    if args.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
    elif rows:
        print(format_sites(rows))
    if not rows:
        print(without_sites(model), file=sys.stderr)
    return 0 if rows else 1


def _audit_options(args: argparse.Namespace) -> dict[str, Any]:
    keys = (
        'dataset', 'split', 'class_map', 'by_order', 'sites', 'input_size', 'num_samples', 'batch_size', 'workers',
        'device', 'seed', 'resamples', 'resume')
    return {**{key: getattr(args, key) for key in keys}, 'command': ['dreal-timm', *args.argv]}


def _needs_audit(error: ModuleNotFoundError) -> ModuleNotFoundError:
    return ModuleNotFoundError(f'This command needs the package {error.name}: pip install "dreal_timm[audit]".')


def _audit(args: argparse.Namespace) -> None:
    try:
        from dreal_timm.audit import audit_model, format_summary
    except ModuleNotFoundError as error:
        raise _needs_audit(error) from error
    output = args.output or Path('output') / 'audit' / Path(args.model).name
    done = audit_model(
        args.model, args.data, output, checkpoint=args.checkpoint, model_kwargs=_options(args.model_kwargs),
        **_audit_options(args))
    if done is not None:
        print(f'{format_summary(done[1])}\nreport {output}/report.html')


def _compare(args: argparse.Namespace) -> None:
    try:
        from dreal_timm.audit import compare_models, format_comparison
    except ModuleNotFoundError as error:
        raise _needs_audit(error) from error
    output = args.output or Path('output') / 'compare' / f'{Path(args.first).name}-{Path(args.second).name}'
    models = (args.first, args.second)
    done = compare_models(models, output, args.data, args.labels, **_audit_options(args))
    if done is not None:
        print(f'{format_comparison(done)}\nreport {output}/report.html')


def _export_format(args: argparse.Namespace) -> None:
    from dreal_timm.hub import export_format, read_network
    from dreal_timm.train.domains import sample_images
    for name in ('half', 'results', 'control', 'class_map', 'by_order'):
        if getattr(args, name):
            raise ValueError(f'--{name} goes with --format timm.')
    network = read_network(args.source, args.weights)
    images = sample_images(network, args.data, args.dataset, args.split) if args.data else None
    folder = export_format(network, args.directory, args.format, images)
    told = json.loads((folder / 'preprocessing.json').read_text(encoding='utf-8'))
    found = [f"{row['logit']:.2g} on {row['count']} of {what}" for what, row in told['largest_difference'].items()]
    print(f"exported {folder}\nlargest difference of a logit: {', '.join(found)}")


def _export(args: argparse.Namespace) -> None:
    if args.format != 'timm':
        _export_format(args)
        return
    from dreal_timm.hub import export_run
    if not args.data and (args.class_map or args.by_order):
        raise ValueError('--class-map and --classes-by-order go with --data.')
    measure = None
    if args.data:
        from dreal_timm.train.domains import measure_export
        measure = partial(
            measure_export, source=args.source, data_dir=args.data, dataset=args.dataset, split=args.split,
            class_map=args.class_map, by_order=args.by_order)
    folder = export_run(
        args.source, args.directory, args.weights, args.half,
        results=args.results, control=args.control, measure=measure)
    architecture = json.loads((folder / 'config.json').read_text(encoding='utf-8'))['architecture']
    imports = 'import timm, dreal_timm' if architecture.startswith('dreal_') else 'import timm'
    print(f"exported {folder}\nload it with   {imports}; "
          f"model = timm.create_model('local-dir:{folder}', pretrained=True)")


def _push(args: argparse.Namespace) -> None:
    from dreal_timm.hub import prepare, push
    if args.dry_run:
        print(f'{prepare(args.directory, args.repo)}\nnothing was sent')
        return
    done = push(args.directory, args.repo, args.private, args.create_pr, args.tag, args.message)
    print(f"{'sent' if done.changed else 'nothing has changed, and nothing was sent'}: {done.url}")


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


_MODEL = "name of a model, hf-hub:USER/NAME, an exported folder, or the folder of a run or of timm's train.py"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='dreal-timm', description='Deep reinforced attention learning (DREAL) for timm models.')
    parser.add_argument('--version', action='version', version=f'dreal_timm {__version__}')
    parser.add_argument('--debug', action='store_true', help='show the traceback of an error')
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')

    train = commands.add_parser('train', help='train a network from a recipe and export it')
    train.add_argument('recipe', metavar='RECIPE', help='file, or name of one of the recipes of the package')
    train.add_argument('settings', metavar='KEY=VALUE', nargs='*', help='settings in place of the recipe\'s')
    train.set_defaults(function=_train)

    validate = commands.add_parser('validate', help='measure the accuracy of a network')
    validate.add_argument('model', metavar='MODEL', help=_MODEL)
    validate.add_argument('--data', metavar='DIR', required=True, help='folder of the data set')
    validate.add_argument('--dataset', metavar='NAME', default='', help='kind/name as in a recipe (image folder)')
    validate.add_argument('--split', default='validation', help='split to validate on (validation)')
    validate.add_argument('--checkpoint', metavar='FILE', default='', help='weights to load')
    validate.add_argument('--batch-size', metavar='N', type=int, default=128, help='images a step (128)')
    validate.add_argument('--workers', metavar='N', type=int, default=2, help='loader processes (2)')
    validate.add_argument('--device', default=None, help='device (an accelerator where there is one)')
    validate.add_argument('--results', metavar='FILE', default='', help='write the results to a JSON file as well')
    validate.add_argument('--json', action='store_true', help='print all of the results as JSON')
    validate.set_defaults(function=_validate)

    inspect = commands.add_parser('inspect', help='list the attention sites of a network')
    inspect.add_argument('model', metavar='MODEL', help=_MODEL)
    inspect.add_argument(
        'options', metavar='OPTION=VALUE', nargs='*',
        help="options of timm.create_model, such as 'block_args={attn_layer: cbam}'")
    inspect.add_argument(
        '--input-size', metavar=('C', 'H', 'W'), nargs=3, type=int, help="size of the images (the model's own)")
    inspect.add_argument('--json', action='store_true', help='print JSON')
    inspect.set_defaults(function=_inspect)

    audit = commands.add_parser('audit', help='measure what each attention module of a trained network is worth')
    audit.add_argument('model', metavar='MODEL', help=_MODEL)
    audit.add_argument('--data', metavar='DIR', required=True, help='folder of the data set')
    audit.add_argument('--checkpoint', metavar='FILE', default='', help='weights to load')
    audit.set_defaults(function=_audit)
    compare = commands.add_parser('compare', help='compare two trained networks on the same images')
    compare.add_argument('first', metavar='A', help='as of audit, or the folder of a finished audit')
    compare.add_argument('second', metavar='B', help='the other')
    compare.add_argument('--data', metavar='DIR', default='', help='folder of the data set; not for finished audits')
    compare.add_argument('--labels', metavar=('A', 'B'), nargs=2, help='names for the two')
    compare.set_defaults(function=_compare)
    for command in (audit, compare):
        command.add_argument('--output', metavar='DIR', default='', help='folder to write (output/COMMAND/MODEL)')
        command.add_argument('--dataset', metavar='NAME', default='', help='kind/name as in a recipe (image folder)')
        command.add_argument('--split', default='validation', help='split to look at (validation)')
        command.add_argument('--sites', metavar='SITE', nargs='+', help='sites, or modules that contain them (all)')
        command.add_argument(
            '--input-size', metavar=('C', 'H', 'W'), nargs=3, type=int, help="size of the images (the model's own)")
        command.add_argument('--num-samples', metavar='N', type=int, help='images, drawn at random (all)')
        command.add_argument('--batch-size', metavar='N', type=int, default=128, help='images a step (128)')
        command.add_argument('--workers', metavar='N', type=int, default=2, help='loader processes (2)')
        command.add_argument('--device', default=None, help='device (an accelerator where there is one)')
        command.add_argument('--seed', type=int, default=0, help='of the draw of images and of the intervals (0)')
        command.add_argument('--resamples', metavar='N', type=int, default=1000, help='bootstrap resamples (1000)')
        command.add_argument('--resume', action='store_true', help='go on with one that was stopped')

    export = commands.add_parser('export', help='export the network of a run, or of a checkpoint, as a folder')
    export.add_argument(
        'source', metavar='RUN_OR_CHECKPOINT',
        help='folder of a run (its best epoch), or a checkpoint; for other formats also an exported folder')
    export.add_argument('directory', metavar='DIR', help='folder to write')
    export.add_argument(
        '--weights', choices=('auto', 'ema', 'raw'), default='auto',
        help='moving average or not (auto: where there is one)')
    export.add_argument(
        '--format', choices=('timm', 'onnx', 'torch-export'), default='timm', help='for which runtime (timm)')
    export.add_argument('--half', action='store_true', help='write float16 weights')
    export.add_argument('--results', metavar='FILE', default='', help='for the card: what validate wrote of it')
    export.add_argument('--control', metavar='FILE', default='', help='the same of the plain network')
    export.add_argument(
        '--data', metavar='DIR', default='',
        help='measure it here, in place of --results; with other formats, compare on images of it')
    export.add_argument('--dataset', metavar='NAME', default='', help='kind/name as in a recipe (image folder)')
    export.add_argument('--split', default='validation', help='split to measure on (validation)')
    export.set_defaults(function=_export)
    for command in (validate, audit):
        command.add_argument(
            '--model-kwargs', metavar='OPTION=VALUE', nargs='+', default=[],
            help="options of timm.create_model, such as num_classes=10, where --checkpoint needs them")
    for command in (validate, audit, compare, export):
        command.add_argument(
            '--class-map', metavar='FILE', default='', help='names of the classes in the order of the outputs')
        command.add_argument(
            '--classes-by-order', dest='by_order', action='store_true',
            help='take the classes of the data set in their order, whatever their names')

    push = commands.add_parser('push', help='send an exported folder to the Hugging Face Hub')
    push.add_argument('directory', metavar='DIR', help='exported folder')
    push.add_argument('repo', metavar='USER/NAME', help='repository, which is created where there is none')
    push.add_argument('--dry-run', action='store_true', help='check everything and list what would be sent; no network')
    push.add_argument('--private', action='store_true', help='create it as a private one')
    push.add_argument('--create-pr', action='store_true', help='open a pull request at one that exists')
    push.add_argument('--tag', metavar='TAG', default='', help='tag to give to the commit')
    push.add_argument('--message', metavar='TEXT', default='', help='message of the commit')
    push.set_defaults(function=_push)

    from dreal_timm.cli.reid import add_commands
    add_commands(commands.add_parser('reid', help='person re-identification'))

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
    """Run the command line; return 0, 1 where nothing was found or sent, or 2 after an error, told in a line.

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


if __name__ == '__main__':
    sys.exit(main())
