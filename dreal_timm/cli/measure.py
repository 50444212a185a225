"""What a network is and how good: `dreal-timm validate | inspect | audit | compare`"""
import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from dreal_timm.cli.flags import MODEL, Commands, add_flags, read_options

__all__ = ['add_commands']


def _validate(args: argparse.Namespace) -> None:
    from dreal_timm.train.validate import describe, validate
    from dreal_timm.utils.files import write_text
    if args.results and (Path(args.results).exists() or not Path(args.results).parent.is_dir()):
        raise FileExistsError(f"--results: '{args.results}' exists, or its folder does not.")
    results = validate(
        args.model, args.data, dataset=args.dataset, split=args.split, checkpoint=args.checkpoint,
        batch_size=args.batch_size, workers=args.workers, device=args.device, class_map=args.class_map,
        by_order=args.by_order, model_kwargs=read_options(args.model_kwargs))
    if args.results:
        write_text(Path(args.results), json.dumps(results, indent=2) + '\n')
    print(json.dumps(results, indent=2) if args.json else describe(results))


def _inspect(args: argparse.Namespace) -> int:
    from dreal_timm.attention.readers import without_sites
    from dreal_timm.audit import describe_sites, format_sites
    from dreal_timm.hub.loading import fetch_network, timm_name
    from dreal_timm.hub.run import exported_folder, open_network
    from dreal_timm.hub.shapes import bounded, build
    options, exported = read_options(args.options), exported_folder(args.model)
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
        args.model, args.data, output, checkpoint=args.checkpoint, model_kwargs=read_options(args.model_kwargs),
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


def _add_audit_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument('--output', metavar='DIR', default='', help='folder to write (output/COMMAND/MODEL)')
    add_flags(command, '--dataset')
    command.add_argument('--split', default='validation', help='split to look at (validation)')
    command.add_argument('--sites', metavar='SITE', nargs='+', help='sites, or modules that contain them (all)')
    add_flags(command, '--input-size')
    command.add_argument('--num-samples', metavar='N', type=int, help='images, drawn at random (all)')
    add_flags(command, '--batch-size', '--workers', '--device')
    command.add_argument('--seed', type=int, default=0, help='of the draw of images and of the intervals (0)')
    command.add_argument('--resamples', metavar='N', type=int, default=1000, help='bootstrap resamples (1000)')
    command.add_argument('--resume', action='store_true', help='go on with one that was stopped')


def add_commands(commands: Commands) -> None:
    """Add `validate`, `inspect`, `audit` and `compare`."""
    validate = commands.add_parser('validate', help='measure the accuracy of a network')
    validate.add_argument('model', metavar='MODEL', help=MODEL)
    validate.add_argument('--data', metavar='DIR', required=True, help='folder of the data set')
    add_flags(validate, '--dataset')
    validate.add_argument('--split', default='validation', help='split to validate on (validation)')
    add_flags(validate, '--checkpoint', '--batch-size', '--workers', '--device', '--results')
    validate.add_argument('--json', action='store_true', help='print all of the results as JSON')
    add_flags(validate, '--model-kwargs', '--class-map', '--classes-by-order')
    validate.set_defaults(function=_validate)

    inspect = commands.add_parser('inspect', help='list the attention sites of a network')
    inspect.add_argument('model', metavar='MODEL', help=MODEL)
    inspect.add_argument(
        'options', metavar='OPTION=VALUE', nargs='*',
        help="options of timm.create_model, such as 'block_args={attn_layer: cbam}'")
    add_flags(inspect, '--input-size', '--json')
    inspect.set_defaults(function=_inspect)

    audit = commands.add_parser('audit', help='measure what each attention module of a trained network is worth')
    audit.add_argument('model', metavar='MODEL', help=MODEL)
    audit.add_argument('--data', metavar='DIR', required=True, help='folder of the data set')
    add_flags(audit, '--checkpoint')
    _add_audit_flags(audit)
    add_flags(audit, '--model-kwargs', '--class-map', '--classes-by-order')
    audit.set_defaults(function=_audit)

    compare = commands.add_parser('compare', help='compare two trained networks on the same images')
    compare.add_argument('first', metavar='A', help='as of audit, or the folder of a finished audit')
    compare.add_argument('second', metavar='B', help='the other')
    compare.add_argument('--data', metavar='DIR', default='', help='folder of the data set; not for finished audits')
    compare.add_argument('--labels', metavar=('A', 'B'), nargs=2, help='names for the two')
    _add_audit_flags(compare)
    add_flags(compare, '--class-map', '--classes-by-order')
    compare.set_defaults(function=_compare)
