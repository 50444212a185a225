"""Which parts there are, in the order of their worth: the share of the time, what they need, what they must report

Nothing but the standard library is imported here: the command reads this on a machine that may lack everything else.
"""
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ['ATTENTION', 'PARTS', 'PROBES', 'REQUIRED', 'SHARES', 'Part', 'choose']

ATTENTION = ('se', 'cbam', 'srm')
PROBES = ('exact', 'split', 'taylor')
SHARES = (1.0, 0.75)  # of the samples that count as right

# oldest versions, as in pyproject.toml; None is any
REQUIRED: dict[str, str | None] = {
    'torch': '2.4', 'torchvision': '0.19', 'timm': '1.0.31', 'accelerate': '1.0', 'huggingface_hub': None,
    'safetensors': None, 'numpy': None, 'pillow': None, 'pyyaml': None, 'tqdm': None, 'scikit-learn': None,
    'scipy': None,
}
_DIGITS = ('scikit-learn', 'scipy')  # alone needed by some parts


@dataclass(frozen=True)
class Part:
    """A process of its own.

    Attributes:
        name: Name; what is before the stop names the file that it writes.
        seconds: Share of the time, out of those of the parts that are still to come.
        rows: Names of what it must report, on a type of device and in small mode.
        needs: Packages that it needs beside those that all need.
    """
    name: str
    seconds: int
    rows: Callable[[str, bool], list[str]]
    needs: tuple[str, ...] = ()

    @property
    def file(self) -> str:
        """Name of the JSON file."""
        return f"{self.name.split('.')[0]}.json"


def _float32(device: str, small: bool) -> list[str]:
    checks = (
        'reward.exact', 'reward.split', 'reward.taylor', 'reward.taylor.float64', 'gradient.backbone',
        'gradient.attention', 'gradient.critic', 'null', 'trace', 'dropout.exact', 'dropout.split')
    return [f'{attention}.{check}' for attention in ATTENTION for check in checks]


def _low_precision(device: str, small: bool) -> list[str]:
    checks = ('reward.exact', 'reward.split', 'reward.taylor', 'reward.float32', 'gradient.backbone', 'critic', 'null')
    half = ATTENTION[:1] if small else ATTENTION
    rows = [f'{attention}.bfloat16.{check}' for attention in ATTENTION for check in checks]
    return rows + [
        f'{attention}.float16.{check}' for attention in half for check in (*checks, 'scaler.step', 'scaler.skip')]


def _compiled(device: str, small: bool) -> list[str]:
    pairs = [('se', 'taylor')]
    if not small:
        pairs += [('se', 'exact'), ('se', 'split'), ('cbam', 'split'), ('srm', 'split')]
    return [f'{attention}.{probe}.{what}' for attention, probe in pairs for what in ('reward', 'gradient')]


def _distributed(device: str, small: bool) -> list[str]:
    rows = [f'one.{what}' for what in ('gradient', 'reward')] + [f'two.{what}' for what in ('gradient', 'reward')]
    return rows + [f'sync_bn.{what}' for what in ('gradient', 'reward', 'statistics')] * (device == 'cuda')


def _cost(device: str, small: bool) -> list[str]:
    pairs = [(attention, share) for attention in ATTENTION for share in SHARES]
    if small:
        pairs = [(attention, share) for attention, share in pairs if attention == 'se' or share == 1]
    rows = [f'{attention}.eager.{share:.0%}.{probe}' for attention, share in pairs for probe in ('plain', *PROBES)]
    return rows + [f'se.compiled.100%.{probe}' for probe in ('plain', 'taylor', 'split') if not small]


def _loop(device: str, small: bool) -> list[str]:
    tasks = ('plain', 'taylor', 'split', 'exact')
    rows = ['timm.images', *(f'{task}.images' for task in tasks)]
    if device == 'cuda':
        rows += [f'{task}.{what}' for what in ('syncs', 'idle') for task in tasks]
    return rows


def _runs(device: str, small: bool) -> list[str]:
    return ['quickstart', 'loads', 'resume', 'audit']


def _rest(device: str, small: bool) -> list[str]:
    return ['reid.evaluation', 'reid.reranking', 'audit.images']


PARTS = (
    Part('right.float32', 45, _float32),
    Part('right.low_precision', 40, _low_precision),
    Part('right.compiled', 80, _compiled),
    Part('right.distributed', 40, _distributed),
    Part('cost', 190, _cost),
    Part('loop', 40, _loop),
    Part('runs', 45, _runs, _DIGITS),
    Part('rest', 15, _rest),
)


def choose(names: list[str] | None) -> list[Part]:
    """Return the parts of these names, or of files of these names ('right'); None are all.

    Raises:
        ValueError: There is none of such a name.
    """
    if names is None:
        return list(PARTS)
    known = {part.name for part in PARTS} | {part.name.split('.')[0] for part in PARTS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"no part '{unknown[0]}': one of {', '.join(sorted(known))}")
    return [part for part in PARTS if {part.name, part.name.split('.')[0]} & set(names)]
