import copy

import pytest
import timm
import torch
from equal import assert_equal
from networks import make_batch, make_model
from tasks import make_task
from timm.task import ClassificationTask
from timm_loop import train


def batches(epoch):
    return [make_batch(batch_size=4, size=48, seed=10 * epoch + i) for i in range(3)]


def cbam_task(seed=0, **options):
    model = make_model('cbam', seed=seed, drop_path_rate=0.1)
    return make_task(model, **{'input_size': (3, 48, 48), 'probe': 'exact', **options})


def test_resume_is_bit_equal(tmp_path, probe):
    """EMA, accumulation, clipping and a loss scaler; two epochs, a resume and two more equal four in one run."""
    whole, first, second = cbam_task(probe=probe), cbam_task(probe=probe), cbam_task(seed=5, probe=probe)
    options = dict(accum_steps=2, clip_grad=1.0)
    _, optimizer = train(whole, batches, 4, tmp_path / 'whole', **options)
    train(first, batches, 2, tmp_path / 'parts', **options)
    last = str(tmp_path / 'parts' / 'last.pth.tar')
    _, resumed = train(second, batches, 4, tmp_path / 'parts', resume=last, **options)
    assert_equal(whole.get_checkpoint_state(), second.get_checkpoint_state())
    assert_equal(whole.get_checkpoint_state(ema=True), second.get_checkpoint_state(ema=True))
    assert_equal(optimizer.state_dict(), resumed.state_dict())
    assert whole.get_trainable_module().rotation.epoch == 3


def test_checkpoints_of_the_loop(tmp_path):
    """timm's saver writes the plain network and its EMA; a plain network of timm loads the file."""
    task = cbam_task()
    train(task, batches, 1, tmp_path)
    state = torch.load(tmp_path / 'last.pth.tar', weights_only=True)
    names = set(make_model('cbam').state_dict())
    assert set(state['state_dict']) == set(state['state_dict_ema']) == names
    assert set(state['task_state']) == set(state['task_state_ema']) == {'critic', 'rotation'}
    assert not torch.equal(state['state_dict']['fc.weight'], state['state_dict_ema']['fc.weight'])
    model = make_model('cbam', seed=3)
    timm.models.load_checkpoint(model, str(tmp_path / 'last.pth.tar'), use_ema=False)
    input, _ = make_batch(size=48)
    assert torch.equal(model.eval()(input), task.get_eval_model().eval()(input))
    timm.models.load_checkpoint(model, str(tmp_path / 'last.pth.tar'), use_ema=True)
    assert torch.equal(model.eval()(input), task.get_eval_model(ema=True).eval()(input))


def test_weight_zero_is_the_plain_run(tmp_path, probe):
    """The whole loop with actor_weight=0 leaves the network of the plain run, bit for bit, EMA included."""
    reinforced = cbam_task(actor_weight=0.0, probe=probe)
    plain = ClassificationTask(copy.deepcopy(reinforced.get_eval_model()), verbose=False)
    train(reinforced, batches, 2, tmp_path / 'reinforced', accum_steps=2)
    train(plain, batches, 2, tmp_path / 'plain', accum_steps=2)
    for ema in (False, True):
        key = 'state_dict_ema' if ema else 'state_dict'
        assert_equal(
            reinforced.get_checkpoint_state(ema=ema)[key], plain.get_checkpoint_state(ema=ema)[key])


@pytest.mark.parametrize('accum_steps', [1, 3])
def test_it_learns(tmp_path, accum_steps, probe):
    """On a few fixed images the loss goes down, and the critic comes to predict the rewards."""
    task = cbam_task(probe=probe)
    fixed = [make_batch(batch_size=4, size=48, seed=i) for i in range(3)]
    losses, _ = train(task, lambda _: fixed, 25, tmp_path, lr=0.05, sched_epochs=25, accum_steps=accum_steps, ema=False)
    assert losses[-1] < 0.5 * losses[0]
    results = []
    for batch in fixed:
        results.append(task(*batch))
        results[-1]['loss'].backward()
    assert results[-1]['critic_loss'] < 2.0


def test_bfloat16_autocast(tmp_path, probe):
    """The loop under bf16 autocast trains with finite losses."""
    losses, _ = train(cbam_task(probe=probe), batches, 1, tmp_path, amp_dtype=torch.bfloat16)
    assert all(torch.tensor(losses).isfinite())
