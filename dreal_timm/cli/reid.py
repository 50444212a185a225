"""`dreal-timm reid ...`"""
import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dreal_timm.cli.flags import Commands, add_flags
from dreal_timm.hub import read_network
from dreal_timm.reid.checking import check_reid
from dreal_timm.reid.evaluation import check_reranked, evaluate_network, open_checked, record_of
from dreal_timm.reid.layouts import LAYOUTS, open_reid
from dreal_timm.reid.metrics import CAMERA_RULES, METRICS
from dreal_timm.reid.pictures import check_kind, draw_rankings, rank_queries
from dreal_timm.reid.searching import search
from dreal_timm.utils.files import write_text

__all__ = ['add_commands']


def _check(args: argparse.Namespace) -> int:
    _at_least(args, images=1, workers=1)
    check = check_reid(
        open_reid(args.directory, args.layout), args.images, args.camera_rule, not args.no_images, args.workers)
    if args.json:
        data = check.data
        print(json.dumps({
            'directory': str(data.root), 'layout': data.layout, 'counts': check.counts, 'junk': data.junk,
            'notes': data.notes, 'problems': list(check.problems), 'details': check.details}, indent=2))
    else:
        print(check)
        for name, lines in check.details.items() if args.all else ():
            print(f"{name}:{''.join(f'{chr(10)}  {line}' for line in lines) or ' none'}")
    return 1 if check.problems else 0


def _at_least(args: argparse.Namespace, **least: int) -> None:
    for name, value in least.items():
        if getattr(args, name) < value:
            raise ValueError(f"--{name.replace('_', '-')}: expected {value} or more, got {getattr(args, name)}.")


def _check_new(path: str) -> None:
    if path and (Path(path).exists() or not Path(path).parent.is_dir()):
        raise FileExistsError(f"'{path}' exists, or its folder does not.")


def _check_picture(path: str) -> None:
    """Raise an error about a picture that could not be written, before the work."""
    _check_new(path)
    if path:
        check_kind(path)


def _eval(args: argparse.Namespace) -> None:
    _check_new(args.results)
    _check_picture(args.picture)
    _at_least(args, lists=1, batch_size=1, workers=0)
    if args.picture and len(args.data) > 1:
        raise ValueError('--picture: draws the lists of one data set.')
    if args.picture and args.multi_query:
        raise ValueError('--picture: a query that is pooled from several images is no image, leave out --multi-query.')
    if args.picture and args.picture == args.results:
        raise ValueError('--picture and --results: two files need two names.')
    given = {name: getattr(args, name) for name in ('k1', 'k2', 'weight') if getattr(args, name) is not None}
    if given and not args.rerank:
        raise ValueError('--k1, --k2 and --lambda go with --rerank.')
    data_sets = [open_checked(place, args.layout, args.camera_rule) for place in args.data]  # before any work
    for data in data_sets if args.rerank else ():
        check_reranked(data, args.multi_query, **given)
    ranking = {'metric': args.metric, 'camera_rule': args.camera_rule, 'reranked': args.rerank, **given}
    network = read_network(args.model)
    records: list[dict[str, Any]] = []
    for place, data in zip(args.data, data_sets, strict=True):
        results, query, gallery = evaluate_network(
            network, data, flip=not args.no_flip, multi_query=args.multi_query, batch_size=args.batch_size,
            workers=args.workers, device=args.device, **ranking)
        records.append(record_of(args.model, place, results))
        if not args.json:
            width = max(len('data'), *(len(str(other)) for other in args.data))
            print('\n'.join(_table(str(place), results, width, head=len(records) == 1)), flush=True)
    text = json.dumps(records[0] if len(records) == 1 else records, indent=2)
    if args.json:
        print(text)
    if args.results:
        write_text(Path(args.results), text + '\n')
    if args.picture:
        count = min(args.lists, len(data.query))
        numbers = [i * len(data.query) // count for i in range(count)]
        draw_rankings(rank_queries(query, gallery, data, numbers, **ranking), args.picture)


def _table(name: str, results: Mapping[str, Any], width: int, head: bool) -> list[str]:
    """The row of a data set, below the head of the table if it is the first."""
    title = (
        f"{'data':{width}} {'mAP':>7} {'rank-1':>7} {'rank-5':>7} {'rank-10':>8} {'rank-20':>8} {'mINP':>7} "
        f"{'queries':>8} {'skipped':>8}")
    row = (
        f"{name:{width}} {results['mAP']:7.2f} {results['rank1']:7.2f} {results['rank5']:7.2f} "
        f"{results['rank10']:8.2f} {results['rank20']:8.2f} {results['mINP']:7.2f} {results['queries']:8,} "
        f"{results['skipped']:8,}")
    return [title, row] if head else [row]


def _search(args: argparse.Namespace) -> None:
    _check_picture(args.picture)
    _at_least(args, top=1, batch_size=1, workers=0)
    rankings = search(
        args.model, args.query, args.gallery, args.top, args.metric, not args.no_flip, args.batch_size, args.workers,
        args.device)
    if args.json:
        print(json.dumps([
            {'query': str(ranking.query), 'found': [
                {'path': str(path), 'distance': distance}
                for path, distance in zip(ranking.found, ranking.distances, strict=True)]}
            for ranking in rankings], indent=2))
    else:
        for ranking in rankings:
            print(ranking.query)
            for rank, (path, distance) in enumerate(zip(ranking.found, ranking.distances, strict=True), 1):
                print(f'{rank:4} {distance:9.4f}  {path}')
    if args.picture:
        draw_rankings(rankings, args.picture)


def _add_ranking_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument('--metric', choices=METRICS, default='cosine', help='distance (cosine)')
    command.add_argument('--no-flip', action='store_true', help='do not average features with the mirror image\'s')
    add_flags(command, '--batch-size', '--workers', '--device')
    command.add_argument('--picture', metavar='FILE', default='', help='draw ranked lists')
    add_flags(command, '--json')


def add_commands(commands: Commands) -> None:
    """Add `reid check`, `reid eval` and `reid search`."""
    reid = commands.add_parser('reid', help='person re-identification')
    own = reid.add_subparsers(dest='reid_command', required=True, metavar='COMMAND')

    check = own.add_parser('check', help='look for what is wrong with a data set')
    check.add_argument('directory', metavar='DIR', help='folder of the data set, or a table')
    check.add_argument('--layout', choices=tuple(LAYOUTS), default='', help='what it is (looks what it is)')
    check.add_argument('--images', metavar='K', type=int, default=8, help='images of an identity in a batch (8)')
    check.add_argument(
        '--camera-rule', choices=CAMERA_RULES, default='exclude', help='rule of the evaluation (exclude)')
    check.add_argument('--no-images', action='store_true', help='do not read the images')
    check.add_argument('--workers', metavar='N', type=int, default=4, help='threads that read them (4)')
    check.add_argument('--all', action='store_true', help='name all that was found, not the first three')
    add_flags(check, '--json')
    check.set_defaults(function=_check)

    evaluate = own.add_parser('eval', help='measure how well a network finds identities')
    evaluate.add_argument(
        'model', metavar='MODEL_OR_DIR', help='folder of a run, exported folder, hf-hub:USER/NAME, or name of a model')
    evaluate.add_argument(
        '--data', metavar='DIR', nargs='+', required=True, help='data sets; others than its own are cross-domain')
    evaluate.add_argument('--layout', choices=tuple(LAYOUTS), default='', help='what they are (looks what they are)')
    evaluate.add_argument(
        '--camera-rule', choices=CAMERA_RULES, default='exclude', help="answers of the query's own camera (exclude)")
    evaluate.add_argument('--rerank', action='store_true', help='k-reciprocal re-ranking')
    evaluate.add_argument('--k1', metavar='N', type=int, help='neighbours that re-ranking compares (20)')
    evaluate.add_argument('--k2', metavar='N', type=int, help='neighbours that it averages over (6)')
    evaluate.add_argument(
        '--lambda', dest='weight', metavar='WEIGHT', type=float, help='weight of the first distance in it (0.3)')
    evaluate.add_argument('--multi-query', action='store_true', help='pool the queries of an identity and a camera')
    add_flags(evaluate, '--results')
    evaluate.add_argument('--lists', metavar='N', type=int, default=8, help='ranked lists of the picture (8)')
    _add_ranking_flags(evaluate)
    evaluate.set_defaults(function=_eval)

    find = own.add_parser('search', help='find the images of a folder that are most like a query')
    find.add_argument('model', metavar='MODEL_OR_DIR', help='as of eval')
    find.add_argument('--query', metavar='FILE', nargs='+', required=True, help='images, or folders of them')
    find.add_argument('--gallery', metavar='DIR', required=True, help='folder that is searched')
    find.add_argument('--top', metavar='N', type=int, default=10, help='length of a list (10)')
    _add_ranking_flags(find)
    find.set_defaults(function=_search)
