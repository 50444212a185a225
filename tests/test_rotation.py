import pytest

from dreal_timm.rotation import Rotation


def epochs(rotation, count):
    draws = []
    for _ in range(count):
        rotation.begin_epoch()
        draws.append(rotation.draw())
        rotation.advance()
    return draws


def test_without_replacement():
    """In as many epochs as a group has sites each is drawn once; then in another order, again each once."""
    draws = epochs(Rotation([('layer1', 3), ('layer2', 6)], seed=0), 60)
    for column, length in ((0, 3), (1, 6)):
        drawn = [draw[column] for draw in draws]
        cycles = [drawn[i:i + length] for i in range(0, 60, length)]
        assert all(sorted(cycle) == list(range(length)) for cycle in cycles)
        assert len({tuple(cycle) for cycle in cycles}) > 1


def test_a_draw_is_a_function_of_seed_and_epoch():
    """Another process, or a resumed run, draws the same; another seed does not."""
    groups = [('layer1', 5), ('layer2', 9)]
    draws = epochs(Rotation(groups, seed=7), 20)
    resumed = Rotation(groups, seed=7)
    resumed.load_state_dict({'epoch': 11, 'step': 12, 'steps_in_epoch': 1})
    assert epochs(resumed, 8) == draws[12:]
    assert epochs(Rotation(groups, seed=8), 20) != draws


def test_groups_of_a_stage_draw_the_same_block():
    """Channel and spatial maps of a stage are probed at the same block."""
    draws = epochs(Rotation([('layer1', 6), ('layer1', 6), ('layer2', 6)], seed=0), 30)
    assert all(draw[0] == draw[1] for draw in draws)
    assert any(draw[0] != draw[2] for draw in draws)


def test_an_epoch_begins_after_at_least_one_step():
    """Calling train() again before a step does not begin an epoch; set_epoch() overrides the count."""
    rotation = Rotation([('layer1', 3)])
    rotation.begin_epoch()
    rotation.begin_epoch()
    assert rotation.epoch == 0
    rotation.advance()
    rotation.begin_epoch()
    rotation.begin_epoch()
    assert rotation.epoch == 1
    rotation.begin_epoch(5)
    rotation.begin_epoch()
    assert rotation.epoch == 5


@pytest.mark.parametrize(('rotate', 'every'), [('step', 1), (3, 3)])
def test_rotation_by_steps(rotate, every):
    """'step' draws anew each step, a number each so many steps, whatever the epochs do."""
    rotation = Rotation([('layer1', 4)], rotate=rotate)
    draws = []
    for _ in range(4 * every):
        draws.append(rotation.draw()[0])
        rotation.advance()
        rotation.begin_epoch()
    assert sorted(draws[::every]) == [0, 1, 2, 3]
    assert all(len(set(draws[i:i + every])) == 1 for i in range(0, len(draws), every))


@pytest.mark.parametrize('rotate', ['never', 0, -2, True, 1.5, None])
def test_unknown_rotation(rotate):
    """Anything but 'epoch', 'step' or a number of steps is refused."""
    with pytest.raises(ValueError, match='rotate'):
        Rotation([('layer1', 4)], rotate=rotate)


def test_a_long_epoch_warns_once(caplog):
    """10,000 steps without a new epoch is most likely a loop without epochs: a warning names `rotate`."""
    rotation = Rotation([('layer1', 4)])
    for _ in range(20_001):
        rotation.advance()
    assert [r.levelname for r in caplog.records if 'rotate' in r.message] == ['WARNING']


def test_state():
    """The state is plain numbers that survive a round trip."""
    rotation = Rotation([('layer1', 4)])
    epochs(rotation, 3)
    state = rotation.state_dict()
    assert state == {'epoch': 2, 'step': 3, 'steps_in_epoch': 1}
    other = Rotation([('layer1', 4)])
    other.load_state_dict(state)
    assert other.state_dict() == state
