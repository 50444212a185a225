"""Networks for others: `dreal-timm export | push`"""
import argparse
import json
from functools import partial

from dreal_timm.cli.flags import Commands, add_flags

__all__ = ['add_commands']


def _export_format(args: argparse.Namespace) -> None:
    from dreal_timm.hub import export_format, read_network
    from dreal_timm.train.domains import sample_images
    for name in ('half', 'results', 'control', 'class_map', 'by_order'):
        if getattr(args, name):
            raise ValueError(f'--{name} goes with --format timm.')
    network = read_network(args.source, args.weights)
    images = sample_images(network, args.data, args.dataset, args.split) if args.data else None
    folder = export_format(network, args.directory, args.format, images)
    record = json.loads((folder / 'preprocessing.json').read_text(encoding='utf-8'))
    largest = ', '.join(
        f"{row['logit']:.2g} on {row['count']} of {what}" for what, row in record['largest_difference'].items())
    print(f'exported {folder}\nlargest difference of a logit: {largest}')


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


def add_commands(commands: Commands) -> None:
    """Add `export` and `push`."""
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
    add_flags(export, '--dataset')
    export.add_argument('--split', default='validation', help='split to measure on (validation)')
    add_flags(export, '--class-map', '--classes-by-order')
    export.set_defaults(function=_export)

    push = commands.add_parser('push', help='send an exported folder to the Hugging Face Hub')
    push.add_argument('directory', metavar='DIR', help='exported folder')
    push.add_argument('repo', metavar='USER/NAME', help='repository, which is created where there is none')
    push.add_argument('--dry-run', action='store_true', help='check everything and list what would be sent; no network')
    push.add_argument('--private', action='store_true', help='create it as a private one')
    push.add_argument('--create-pr', action='store_true', help='open a pull request at one that exists')
    push.add_argument('--tag', metavar='TAG', default='', help='tag to give to the commit')
    push.add_argument('--message', metavar='TEXT', default='', help='message of the commit')
    push.set_defaults(function=_push)
