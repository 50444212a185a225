"""Options of the task: which go together, and with which network"""
import math

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dreal_timm.probes.counterfactual import PROBES
from dreal_timm.replay.batch_norms import check_probeable

__all__ = ['ACTORS', 'check_options']

ACTORS = ('critic', 'direct')


def check_options(
        model: nn.Module,
        actor_weight: float,
        probe: str,
        probe_dtype: str | torch.dtype | None,
        taylor_target: str | None,
        taylor_sites: str,
        actor: str,
        actor_start: int,
        standardized: bool,
) -> None:
    """Raise a ValueError if options of `DrealTask` do not go with each other or with the model."""
    if not 0 <= actor_weight < math.inf:
        raise ValueError(f'actor_weight must be 0 or more, got {actor_weight}.')
    if probe not in (*PROBES, 'taylor'):
        raise ValueError(f"Unknown probe '{probe}', expected one of {sorted([*PROBES, 'taylor'])}.")
    if probe == 'taylor' and probe_dtype is not None:
        raise ValueError("probe_dtype is for counterfactual passes; probe='taylor' makes none.")
    if probe != 'taylor':
        for name, asked in (
            ('taylor_target', taylor_target is not None), ('taylor_sites', taylor_sites != 'all'),
            ("actor='direct'", actor == 'direct'),
        ):
            if asked:
                raise ValueError(f"{name} is for probe='taylor', not for probe='{probe}'.")
    if actor not in ACTORS:
        raise ValueError(f"actor must be one of {', '.join(ACTORS)}, got '{actor}'.")
    if actor == 'direct' and standardized:
        raise ValueError("actor='direct' raises rewards themselves, whose sum standardized ones would not change.")
    if not isinstance(actor_start, int) or actor_start < 0:
        raise ValueError(f'actor_start must be a number of epochs, 0 or more, got {actor_start!r}.')
    if probe_dtype not in (None, 'float32', torch.float32):
        raise ValueError(f"probe_dtype must be None or 'float32', got {probe_dtype!r}.")
    if probe_dtype is not None and any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters()):
        raise ValueError("probe_dtype='float32' needs a network with float32 weights, under autocast.")
    if isinstance(model, DistributedDataParallel) or hasattr(model, '_orig_mod'):
        raise ValueError('Pass the plain network; compile() and prepare_distributed() are methods of the task.')
    check_probeable(model)
