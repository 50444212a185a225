"""The sweep over timm's networks: a quick part of it always, all of it by `pytest -m sweep`"""
import pytest
import sweep
import torch
from networks import ghost_net

QUICK = (
    'test_byobnet', 'test_efficientnet', 'mobilenetv3_small_050', 'regnety_002', 'test_nfnet', 'test_coatnet',
    'resnest14d', 'skresnet18', 'legacy_seresnet18', 'ese_vovnet19b_slim_dw', 'efficientvim_m1', 'fastvit_t8',
)


@pytest.mark.parametrize('name', QUICK)
def test_reinforced_steps(name):
    """Sites are found, maps are read as used, bypass changes the output, gradients are isolated, keys stay."""
    row = sweep.check(*sweep.fitting(name))
    line = next(line for line in sweep.DOCUMENT.read_text(encoding='utf-8').splitlines() if f'| {name} |' in line)
    assert line.endswith(f"| {row['sites']} | {row['groups']} | {row['begin']} | yes |")


def test_reinforced_steps_of_a_small_ghost_net():
    """The same of the attention of a GhostNetV3, whose smallest network takes a minute: passes begin at its blocks."""
    torch.manual_seed(0)
    row = sweep.check(ghost_net('v3'), 64)
    assert row == {'sites': 3, 'groups': 3, 'size': 64, 'begin': 'blocks'}


def test_smallest_of_each_kind():
    """One network of each kind is chosen, the smallest; networks without attention are none."""
    found = [sweep.look(name) for name in ('seresnet50', 'seresnet18', 'ecaresnet26t', 'resnet18')]
    assert [network.name for network in sweep.smallest(found)] == ['ecaresnet26t', 'seresnet18']


@pytest.mark.sweep
def test_all_networks_of_timm():
    """docs/supported.md is what the sweep finds with this version of timm, and every kind works."""
    text = sweep.sweep()
    assert text == sweep.DOCUMENT.read_text(encoding='utf-8')
    kinds = [line for line in text.splitlines() if line.count('|') == 9][2:]
    assert len(kinds) > 30
    assert all(line.endswith('| yes |') for line in kinds)
