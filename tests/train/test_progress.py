import pytest
import torch

from dreal_timm.train.progress import Meter, Progress


def test_meter_by_hand():
    """Means are over samples; rewards and qualities over what was probed."""
    meter = Meter({'a': 'first', 'b': 'second'})
    nan = float('nan')
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
    meter.update({
        'loss': torch.tensor(1.0), 'output': logits, 'reward': torch.tensor([[0.5, nan], [-1.0, -1.0]]),
        'quality': torch.tensor([[0.1, nan], [0.3, 0.2]]), 'probed': ['a', 'b'], 'right': torch.tensor([True, False]),
    }, torch.tensor([0, 0]))
    meter.update({
        'loss': torch.tensor(4.0), 'output': logits[:1], 'reward': torch.tensor([[0.1, 0.2]]),
        'quality': torch.tensor([[0.0, 0.0]]), 'probed': ['b', 'a'], 'right': torch.tensor([True]),
    }, torch.tensor([0]))
    means = meter.means()
    assert means['loss'] == pytest.approx(2.0)
    assert means['top1'] == pytest.approx(200 / 3)
    assert means['reward'] == pytest.approx((0.5 - 1 - 1 + 0.1 + 0.2) / 5)
    assert means['quality'] == pytest.approx(0.6 / 5)
    assert means['reward_correct'] == pytest.approx(0.8 / 3)
    assert means['critic_error'] == pytest.approx((0.4**2 + 1.3**2 + 1.2**2 + 0.1**2 + 0.2**2) / 5)
    assert means['judged'] == pytest.approx(5 / 6)
    assert means['reward/first'] == pytest.approx((0.5 - 1 + 0.2) / 3)
    assert means['reward/second'] == pytest.approx((-1 + 0.1) / 2)
    assert means['reward_correct/second'] == pytest.approx(0.1)
    assert means['quality/first'] == pytest.approx(0.4 / 3)
    assert means['critic_error/second'] == pytest.approx((1.2**2 + 0.1**2) / 2)
    assert (means['judged/first'], means['judged/second']) == (1.0, pytest.approx(2 / 3))


@pytest.mark.parametrize('terminal', [True, False])
def test_progress(terminal, monkeypatch, capsys, caplog):
    """On a terminal a bar shows the numbers, elsewhere plain lines do; a silent process shows none."""
    monkeypatch.setattr('sys.stderr.isatty', lambda: terminal)
    means = {'loss': 1.0, 'top1': 100.0, 'reward': 0.5, 'quality': 0.25}
    with caplog.at_level('INFO'):
        for enabled in (False, True):
            progress = Progress(0, 2, 4, interval=2, enabled=enabled)
            for index in range(4):
                progress.step(index, *((means, 8 * index, 0.1) if progress.due(index) else ()))
            progress.close()
            lines = [r.message for r in caplog.records]
            shown = capsys.readouterr().err if terminal else ''.join(lines)
            assert ('reward +0.5000' in shown) == enabled
            assert ('quality +0.2500' in shown) == enabled
            assert ('img/s' in shown) == enabled
            assert ('lr 0.1' in shown) == enabled
    assert len(lines) == (0 if terminal else 2)
