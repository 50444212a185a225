"""The probes, by the names that `DrealConfig.probe` has for them"""
from dreal_timm.probes.base import Probe
from dreal_timm.probes.exact import ExactProbe
from dreal_timm.probes.split import SplitProbe
from dreal_timm.probes.taylor import TaylorProbe

__all__ = ['PROBES']

PROBES: dict[str, type[Probe]] = {'exact': ExactProbe, 'split': SplitProbe, 'taylor': TaylorProbe}
