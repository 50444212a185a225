import math

import torch

from dreal_timm.losses import actor_loss, critic_loss, reduce_critic_loss

NAN = math.nan


def slow_critic_loss(quality, reward, groups):
    """L_r in Python numbers: per group the mean over its probed (sample, site) pairs, summed over groups."""
    total = 0.0
    for group in set(groups):
        errors = [
            (quality[b][p] - reward[b][p]) ** 2
            for b in range(len(quality)) for p in range(len(groups))
            if groups[p] == group and not math.isnan(reward[b][p])
        ]
        total += sum(errors) / len(errors) if errors else 0.0
    return total


def test_actor_loss_by_hand():
    """L_q of a sample is minus the summed quality of its maps."""
    torch.testing.assert_close(actor_loss(torch.tensor([[0.1, 0.2], [-0.5, 0.25]])), torch.tensor([-0.3, 0.25]))


def test_critic_loss_by_hand():
    """The error is squared, NaN where a sample was not probed."""
    error = critic_loss(torch.tensor([[0.5, 0.2]]), torch.tensor([[0.1, NAN]]))
    torch.testing.assert_close(error, torch.tensor([[0.16, NAN]]), equal_nan=True)


def test_reduction_equals_slow_version():
    """Groups of several columns, and samples that were not probed, are averaged as the slow version does."""
    torch.manual_seed(0)
    quality, reward = torch.rand(6, 4), torch.rand(6, 4)
    reward[torch.rand(6, 4) < 0.3] = NAN
    groups = [0, 0, 1, 2]
    expected = slow_critic_loss(quality.tolist(), reward.tolist(), groups)
    torch.testing.assert_close(reduce_critic_loss(critic_loss(quality, reward), groups), torch.tensor(expected))


def test_a_group_without_a_probed_sample_adds_nothing():
    """No NaN reaches the loss or the gradient, and the gradient is there (zero)."""
    quality = torch.rand(3, 2, requires_grad=True)
    reward = torch.tensor([[0.5, NAN]] * 3)
    loss = reduce_critic_loss(critic_loss(quality, reward), [0, 1])
    loss.backward()
    torch.testing.assert_close(loss.detach(), (quality.detach()[:, 0] - 0.5).square().mean())
    assert torch.equal(quality.grad[:, 1], torch.zeros(3))
    assert quality.grad[:, 0].abs().sum() > 0


def test_nothing_probed_at_all():
    """A batch without any reward gives a loss of 0 that can be differentiated."""
    quality = torch.rand(3, 2, requires_grad=True)
    loss = reduce_critic_loss(critic_loss(quality, torch.full((3, 2), NAN)), [0, 1])
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(quality.grad, torch.zeros(3, 2))


def test_no_gradient_to_the_reward():
    """The reward is a number to be learned, not a path for gradients."""
    reward = torch.rand(3, 2)
    quality = torch.rand(3, 2, requires_grad=True)
    reduce_critic_loss(critic_loss(quality, reward), [0, 1]).backward()
    torch.testing.assert_close(quality.grad, 2 * (quality.detach() - reward) / 3)
