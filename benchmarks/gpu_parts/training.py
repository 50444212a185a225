"""A training under deterministic algorithms, in a process of its own: `python -m gpu_parts.training RECIPE OUTPUT`

OUTPUT is a JSON file that says how it ended, and which kernels have no deterministic form.
"""
import json
import re
import sys
import warnings
from pathlib import Path

import torch

from dreal_timm.train import run


def main() -> None:
    recipe, output = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    names: set[str] = set()

    def show(message: object, *args: object, **kwargs: object) -> None:
        found = re.search(r'(\S+) does not have a deterministic implementation', str(message))
        if found:
            names.add(found.group(1))

    with warnings.catch_warnings():
        warnings.simplefilter('always')
        warnings.showwarning = show
        results = run(recipe)
    output.write_text(json.dumps({'metrics': results['metrics'], 'not_deterministic': sorted(names)}))


if __name__ == '__main__':
    main()
