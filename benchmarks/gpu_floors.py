"""FLOPs of a step of each probe over those of a plain one, of SE-, CBAM- and SRM-ResNet-50 at 224 pixels

They depend neither on the device nor on the batch, and counting takes minutes: `gpu.py` reads them from the JSON that
this writes. All samples are right, and a round of six steps visits the sites as that of `gpu.py` does.
"""
import argparse
import copy
import json
from pathlib import Path
from typing import Any

import profile_step
import report
import step_time
import torch

from dreal_timm import DrealTask

FLOORS = report.RESULTS / 'gpu_floors.json'
STEPS = 6


def floors(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Return the ratios of a network."""
    device, found = torch.device('cpu'), {}
    model, batch = step_time.make_model(name), step_time.make_batch(args, device)
    for probe in ('plain', *step_time.PROBES):
        stepper = step_time.Stepper(probe, copy.deepcopy(model), args, device)
        if isinstance(stepper.task, DrealTask):
            step_time.visit_every_site(stepper.task, STEPS)
            for _ in range(STEPS):  # where a pass begins is found out when a site is met first
                stepper.step(batch)
        found[probe] = profile_step.flops(stepper, batch, 1 if probe == 'plain' else STEPS)
    return {probe: value / found['plain'] for probe, value in found.items()}


def read(attention: str, probe: str, share: float) -> float:
    """Return the floor on an accelerator, where so many of the samples are right.

    `exact` sends those that are right, `split` and `taylor` ask all of them.
    """
    ratio = next(row[probe] for row in json.loads(FLOORS.read_text())['rows'] if row['attention'] == attention)
    return 1 + (share if probe == 'exact' else 1) * (ratio - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--size', type=int, default=224, help='side of the images, pixels')
    parser.add_argument('--batch-size', type=int, default=8)
    parser.add_argument('--output', type=Path, default=FLOORS, help='JSON to write')
    args = parser.parse_args()
    header = report.begin(args, torch.device('cpu'))
    vars(args).update(amp='none', channels_last=False, compile=False, probe_every=1)
    step_time.count_as_right(1.0)
    rows: list[dict[str, Any]] = []
    for attention in ('se', 'cbam', 'srm'):
        rows.append({'attention': attention, **floors(f'dreal_{attention}_resnet50', args)})
        print(attention, '  '.join(f'{probe} {rows[-1][probe]:.3f}' for probe in step_time.PROBES), flush=True)
    report.write(args.output, header, rows)


if __name__ == '__main__':
    main()
