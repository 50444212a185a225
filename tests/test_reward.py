import math

import pytest
import torch

from dreal_timm.reward import is_correct, reward, target_class


def log(*rows):
    return torch.tensor(rows, dtype=torch.float64).log()


def measured(log_probs, bypassed, target, **kwargs):
    """The reward of what a probe answers."""
    change = bypassed - log_probs.gather(1, target[:, None])
    return reward(change, is_correct(log_probs, target), **kwargs)


def test_exact_numbers():
    """R = 1 - p'/p for a sample that is right, -gamma for one that is wrong (Eq. 1)."""
    log_probs = log([0.5, 0.3, 0.2], [0.2, 0.7, 0.1])
    bypassed = log([0.25, 0.6], [0.1, 0.1])
    result = measured(log_probs, bypassed, torch.tensor([0, 0]), gamma=0.75)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, torch.tensor([[0.5, -0.2], [-0.75, -0.75]]))


def test_a_tie_is_right():
    """p_c >= p_i for all i: a sample whose class ties with another is not punished."""
    log_probs = log([0.4, 0.4, 0.2])
    assert is_correct(log_probs, torch.tensor([1])).tolist() == [True]
    assert is_correct(log_probs, torch.tensor([2])).tolist() == [False]
    torch.testing.assert_close(measured(log_probs, log([0.2]), torch.tensor([1])), torch.tensor([[0.5]]))


def test_clip():
    """Without the map the class may be much more probable: the literal R has no lower bound, the clipped one has."""
    log_probs, bypassed = log([0.1, 0.05]), log([0.9])
    target = torch.tensor([0])
    torch.testing.assert_close(measured(log_probs, bypassed, target, clip=None), torch.tensor([[-8.0]]))
    assert measured(log_probs, bypassed, target, clip=1.0).item() == -1.0
    assert measured(log_probs, bypassed, target, clip=0.5, gamma=0.5).item() == -0.5


def test_small_differences_survive():
    """Differences of 1e-9 in log p are not lost, as they would be in a ratio of float32 probabilities."""
    log_probs = torch.tensor([[math.log(0.9), math.log(0.1)]], dtype=torch.float64)
    result = measured(log_probs, log_probs[:, :1] - 1e-9, torch.tensor([0]))
    torch.testing.assert_close(result, torch.tensor([[1e-9]]), rtol=1e-4, atol=0)


def test_not_probed_stays_nan():
    """NaN marks a sample that was not probed, right or wrong."""
    log_probs = log([0.6, 0.4], [0.6, 0.4])
    result = measured(log_probs, torch.full((2, 1), math.nan), torch.tensor([0, 1]))
    assert result.isnan().all()


def test_no_probability_left():
    """A class that loses all probability without the map gives the largest reward, 1."""
    assert measured(log([0.6, 0.4]), torch.tensor([[-math.inf]]), torch.tensor([0])).item() == 1.0


def test_target_class():
    """Soft targets count as their arg max; other shapes are refused."""
    assert target_class(torch.tensor([2, 0])).tolist() == [2, 0]
    assert target_class(torch.tensor([[0.1, 0.7, 0.2], [0.6, 0.3, 0.1]])).tolist() == [1, 0]
    with pytest.raises(ValueError, match='shape'):
        target_class(torch.zeros(2, 3, 4))


def test_monotone():
    """The less probable the class without the map, the larger the reward."""
    log_probs = log([0.9, 0.1]).expand(9, 2)
    bypassed = torch.linspace(0.05, 0.85, 9, dtype=torch.float64).log()[:, None]
    result = measured(log_probs, bypassed, torch.zeros(9, dtype=torch.long))[:, 0]
    assert (result.diff() < 0).all()
