"""Which parts there are, most important first: their share of the time, what they need, and what they must report

Nothing but the standard library is imported here: the command reads this on a machine that may lack everything else.
"""
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ['ATTENTION', 'PARTS', 'PROBES', 'REQUIRED', 'Part', 'choose', 'compiled_pairs', 'costs']

ATTENTION = ('se', 'cbam', 'srm')
PROBES = ('exact', 'split', 'taylor')

# oldest versions, as in pyproject.toml, and scipy, which comes with scikit-learn; None is any
REQUIRED: dict[str, str | None] = {
    'torch': '2.4', 'torchvision': '0.19', 'timm': '1.0.31', 'accelerate': '1.0', 'huggingface_hub': None,
    'safetensors': None, 'numpy': None, 'pillow': None, 'pyyaml': None, 'tqdm': None, 'scikit-learn': None,
    'scipy': None,
}
_DIGITS = ('scikit-learn', 'scipy')  # needed by `runs` alone


@dataclass(frozen=True)
class Part:
    """A process of its own, which writes NAME.json.

    Attributes:
        name: Name, FAMILY or FAMILY.NAME.
        weight: Seconds that it takes on an H200: its share of the time among the parts still to come.
        rows: Names of what it must report, on a type of device and in small mode.
        needs: Packages that it needs beside those that all need.
        alone: Whether it measures time, so that nothing else may run beside it.
    """
    name: str
    weight: int
    rows: Callable[[str, bool], list[str]]
    needs: tuple[str, ...] = ()
    alone: bool = True


def _float32(device: str, small: bool) -> list[str]:
    checks = (
        'reward.exact', 'reward.split', 'reward.taylor', 'reward.taylor.float64', 'gradient.backbone',
        'gradient.attention', 'gradient.critic', 'null', 'trace', 'dropout.exact', 'dropout.split')
    return [f'{attention}.{check}' for attention in ATTENTION for check in checks]


def _bfloat16(device: str, small: bool) -> list[str]:
    checks = ('reward.exact', 'reward.split', 'reward.taylor', 'reward.float32', 'gradient.backbone', 'critic', 'null')
    return [f'{attention}.{check}' for attention in (ATTENTION[:1] if small else ATTENTION) for check in checks]


def _float16(device: str, small: bool) -> list[str]:
    some = ATTENTION[:1] if small else ATTENTION
    return _bfloat16(device, small) + [f'{attention}.scaler.{what}' for attention in some for what in ('step', 'skip')]


def compiled_pairs(small: bool) -> list[tuple[str, str]]:
    """Return attention and probe of the tasks that are compiled."""
    pairs = [('se', 'taylor')]
    return pairs if small else [*pairs, ('se', 'exact'), ('se', 'split'), ('cbam', 'split'), ('srm', 'split')]


def _compiled(device: str, small: bool) -> list[str]:
    return [f'{attention}.{probe}.{what}' for attention, probe in compiled_pairs(small)
            for what in ('reward', 'gradient')]


def _distributed(device: str, small: bool) -> list[str]:
    rows = [f'{kind}.{what}' for kind in ('one', 'two') for what in ('gradient', 'reward')]
    return rows + [f'sync_bn.{what}' for what in ('gradient', 'reward', 'statistics')] * (device == 'cuda')


def costs(small: bool) -> list[tuple[str, float]]:
    """Return attention, and share of the samples that count as right, in the order of measurement."""
    order = [('se', 1.0), ('se', 0.75), ('cbam', 1.0), ('srm', 1.0)]
    return order if small else [*order, ('cbam', 0.75), ('srm', 0.75)]


def _eager(device: str, small: bool) -> list[str]:
    return [f'{attention}.{share:.0%}.{probe}' for attention, share in costs(small) for probe in ('plain', *PROBES)]


def _compiled_cost(device: str, small: bool) -> list[str]:
    return [] if small else [f'se.100%.{probe}' for probe in ('plain', 'taylor', 'split')]


def _loop(device: str, small: bool) -> list[str]:
    tasks = ('plain', 'taylor', 'split', 'exact')
    rows = ['timm.images', *(f'{task}.images' for task in tasks)]
    return rows + [f'{task}.{what}' for task in tasks for what in ('syncs', 'idle')] * (device == 'cuda')


def _runs(device: str, small: bool) -> list[str]:
    return ['quickstart', 'loads', 'audit', 'resume']


def _rest(device: str, small: bool) -> list[str]:
    return ['audit.images', 'reid.evaluation', 'reid.reranking']


PARTS = (
    Part('right.float32', 60, _float32, alone=False),
    Part('right.bfloat16', 60, _bfloat16, alone=False),
    Part('right.float16', 70, _float16, alone=False),
    Part('right.compiled', 100, _compiled, alone=False),
    Part('right.distributed', 60, _distributed, alone=False),
    Part('loop', 60, _loop),
    Part('cost.eager', 140, _eager),
    Part('runs', 55, _runs, _DIGITS),
    Part('rest', 25, _rest),
    Part('cost.compiled', 250, _compiled_cost),
)


def choose(names: list[str] | None) -> list[Part]:
    """Return the parts of these names, or of these families ('right'); None are all.

    Raises:
        ValueError: There is none of such a name.
    """
    if names is None:
        return list(PARTS)
    known = {part.name for part in PARTS} | {part.name.split('.')[0] for part in PARTS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"no part '{unknown[0]}': one or more of {' '.join(sorted(known))}, with spaces between them")
    return [part for part in PARTS if {part.name, part.name.split('.')[0]} & set(names)]
