"""Time and memory of the evaluation of person re-identification at the size of Market-1501

3,368 queries, 19,732 images of the gallery of which 3,819 are junk, 2,048 features, six cameras: identities are those
of random clusters, so that images have neighbours as real ones do. Each row runs in a process of its own; memory is its
peak, features and torch included. The last row is the time to the first P x K batch of a million images of 100,000
identities.
"""
import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import report
import torch

from dreal_timm.reid import PKSampler, rerank, retrieve, score

QUERIES, GALLERY, JUNK, IDENTITIES, CAMERAS = 3368, 19732, 3819, 750, 6


def draw(features: int, noise: float) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Features, identities and cameras of queries and gallery."""
    generator = torch.Generator().manual_seed(0)
    pids = [torch.randint(1, IDENTITIES + 1, (count,), generator=generator) for count in (QUERIES, GALLERY)]
    pids[1][:JUNK] = -1
    pids[1][JUNK:JUNK + 2798] = 0  # distractors
    centers = torch.randn(IDENTITIES + 1, features, generator=generator)
    found = []
    for part in pids:
        values = torch.randn(len(part), features, generator=generator).mul_(noise)
        values += torch.where((part > 0)[:, None], centers[part.clamp(min=0)], 0.0)
        found.append(values)
    camids = [torch.randint(0, CAMERAS, (len(part),), generator=generator) for part in pids]
    return found, pids, camids


def peak_mib() -> float:
    """Return the peak of this process's memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def one(args: argparse.Namespace) -> dict[str, Any]:
    """Measure one way of ranking, or the begin of an epoch."""
    if args.way == 'sampler':
        labels = torch.arange(1_000_000) // 10
        start = time.perf_counter()
        next(iter(PKSampler(labels, 16, 8)))
        seconds = time.perf_counter() - start
        return {'way': 'sampler', 'seconds': seconds, 'peak_mib': peak_mib()}
    (query, gallery), pids, camids = draw(args.features, args.noise)
    start = time.perf_counter()
    if not args.with_junk:
        valid = pids[1] >= 0
        gallery, pids[1], camids[1] = gallery[valid], pids[1][valid], camids[1][valid]
    else:
        pids[1] = pids[1].clamp(min=0)
    if args.way == 'rerank':
        found = score(rerank(query, gallery), pids[0], pids[1], camids[0], camids[1])
    else:
        found = retrieve(query, gallery, pids[0], pids[1], camids[0], camids[1], args.way)
    seconds = time.perf_counter() - start
    return {
        'way': args.way, 'gallery': len(gallery), 'seconds': seconds, 'peak_mib': peak_mib(), **found.summary((1,))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=5, help='processes of each row, but one of re-ranking')
    parser.add_argument('--features', type=int, default=2048, help='features of an image')
    parser.add_argument('--noise', type=float, default=2.5, help='standard deviation within an identity')
    parser.add_argument('--way', choices=('cosine', 'euclidean', 'rerank', 'sampler'), help='measure one here')
    parser.add_argument('--with-junk', action='store_true', help='rank junk too, as distractors')
    parser.add_argument('--output', type=Path, default=report.RESULTS / 'reid_evaluation.json', help='JSON to write')
    args = parser.parse_args()
    if args.way:
        print(json.dumps(one(args)))
        return
    header = report.begin(args, torch.device('cpu'))
    rows = []
    for way, junk in (('cosine', False), ('cosine', True), ('euclidean', False), ('rerank', False), ('sampler', False)):
        command = [sys.executable, __file__, '--way', way, '--features', str(args.features), '--noise', str(args.noise)]
        rounds = [
            json.loads(subprocess.run(
                command + ['--with-junk'] * junk, capture_output=True, text=True, check=True).stdout)
            for _ in range(1 if way == 'rerank' else args.rounds)]
        seconds, peak = (report.spread([each[key] for each in rounds]) for key in ('seconds', 'peak_mib'))
        row = {**rounds[0], 'seconds': seconds, 'peak_mib': peak}
        rows.append(row)
        if way == 'sampler':
            print(f'{way:10} 100,000 identities  {report.tell(seconds, 2)} s')
            continue
        print(f"{way:10} {QUERIES:,} x {row['gallery']:,}  {report.tell(seconds, 2)} s  peak {peak['max']:,.0f} MiB  "
              f"rank-1 {row['rank1']:.2f}  mAP {row['mAP']:.2f}")
    report.write(args.output, header, rows)


if __name__ == '__main__':
    main()
