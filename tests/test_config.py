"""The options of the task: each once, checked, and told by name where one is wrong"""
import dataclasses

import pytest
import torch
from networks import make_model

from dreal_timm import DrealTask
from dreal_timm.config import DrealConfig
from dreal_timm.critic import CELLS
from dreal_timm.options import convert, option, options_of
from dreal_timm.probes.table import PROBES

OPTIONS = {each.name: each for each in options_of(DrealConfig)}


def test_the_set_of_options():
    """What is public is frozen: another option is a decision, and stands in the documents."""
    assert list(OPTIONS) == [
        'gamma', 'actor_weight', 'probe', 'probe_every', 'taylor_target', 'rotate', 'reward_clip', 'probe_dtype',
        'seed', 'critic_cell', 'critic_hidden_size', 'critic_depth']
    documented = DrealConfig.__doc__
    assert all(f'        {name}: ' in documented for name in OPTIONS)


def test_choices_are_those_that_there_are():
    """The options name what the tables of probes and cells hold."""
    assert set(OPTIONS['probe'].choices) == set(PROBES)
    assert set(OPTIONS['critic_cell'].choices) == set(CELLS)


def test_a_config_or_its_fields():
    """Both ways make the same task; both together, and an option that there is not, are a TypeError."""
    kwargs = dict(verbose=False, input_size=(3, 64, 64))
    config = DrealConfig(probe='exact', seed=3, critic_hidden_size=2)
    one = DrealTask(make_model(), config=config, **kwargs)
    other = DrealTask(make_model(), probe='exact', seed=3, critic_hidden_size=2, **kwargs)
    assert one.config == other.config == config
    weights = [task.get_trainable_module().critic.state_dict() for task in (one, other)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    with pytest.raises(TypeError, match='probe'):
        DrealTask(make_model(), config=config, probe='split', **kwargs)
    with pytest.raises(TypeError, match='reward_form'):
        DrealTask(make_model(), reward_form='log', **kwargs)


def test_no_seed_is_zero():
    """A task without a seed draws what one with seed 0 draws."""
    first, second = (
        DrealTask(make_model(), verbose=False, input_size=(3, 64, 64), **options).get_trainable_module()
        for options in ({}, {'seed': 0}))
    assert first.rotation.seed == second.rotation.seed == 0
    weights = second.critic.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in first.critic.state_dict().items())


@pytest.mark.parametrize(('kwargs', 'expected'), [
    (dict(gamma='5e-1'), 0.5), (dict(rotate='7'), 7), (dict(probe_dtype=torch.float32), 'float32'),
    (dict(reward_clip=None), None), (dict(critic_depth=2.0), 2)])
def test_values_get_the_type_of_their_option(kwargs, expected):
    """Texts that are numbers, as YAML has them, and torch's dtype."""
    (name,) = kwargs
    value = getattr(DrealConfig(**kwargs), name)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(('kwargs', 'message'), [
    (dict(probe='both'), "probe: expected one of 'exact', 'split', 'taylor', got 'both'"),
    (dict(gamma=0), r'gamma must lie in \(0, reward_clip\]'), (dict(gamma=2), r'gamma must lie in \(0, reward_clip\]'),
    (dict(actor_weight=-1), 'actor_weight: must be 0 or more'), (dict(actor_weight=float('inf')), 'actor_weight'),
    (dict(actor_weight=float('nan')), 'actor_weight'), (dict(actor_weight=True), 'actor_weight: expected a number'),
    (dict(probe_every=0), 'probe_every: must be 1 or more'), (dict(probe_every=1.5), 'probe_every'),
    (dict(probe_every=None), 'probe_every: expected a whole number'), (dict(rotate='sometimes'), 'rotate'),
    (dict(rotate=0), 'rotate: must be 1 or more'), (dict(seed=-1), 'seed'), (dict(critic_cell='rnn'), 'critic_cell'),
    (dict(probe_dtype='float64'), "probe_dtype: expected one of 'float32', None"),
    (dict(probe='taylor', probe_dtype='float32'), 'probe_dtype'), (dict(taylor_target='loss'), 'taylor_target')])
def test_wrong_values(kwargs, message):
    """One line that names the option and what it accepts."""
    with pytest.raises(ValueError, match=message) as error:
        DrealConfig(**kwargs)
    assert '\n' not in str(error.value)


def test_options_of_a_dataclass_of_ones_own():
    """Types come from the annotations; fields that are no options are left out, and lists are not shared."""
    @dataclasses.dataclass
    class Settings:
        sizes: list[int] = option([1, 2], 'sizes', length=2)
        name: str | None = option(None, 'a name')
        other: int = 3

    found = {each.name: each for each in options_of(Settings)}
    assert [(each.name, each.type, each.nullable) for each in found.values()] == [
        ('sizes', 'ints', False), ('name', 'str', True)]
    assert Settings().sizes is not Settings().sizes
    assert convert(found['sizes'], ['3', 4]) == [3, 4]
    with pytest.raises(ValueError, match=r'block\.sizes: expected 2 values'):
        convert(found['sizes'], 3, 'block.')
