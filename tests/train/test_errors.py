import logging
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from small_run import recipe, write_images

from dreal_timm.cli import main
from dreal_timm.errors import one_line
from dreal_timm.train import classification, load_config, loop, run
from dreal_timm.train.finite import FiniteWatch
from dreal_timm.train.setup import set_up


def train(tmp_path, capsys, settings):
    """Run the command line on a recipe; return its code and what it says on the error stream."""
    path = tmp_path / 'recipe.yaml'
    path.write_text(yaml.safe_dump(settings))
    code = main(['train', str(path)])
    return code, capsys.readouterr().err


def test_processes_that_do_not_know_each_other(tmp_path, capsys, monkeypatch):
    """Two processes of a launcher that found no device for each would train two networks into one folder."""
    monkeypatch.setenv('WORLD_SIZE', '2')
    images = write_images(tmp_path / 'images')
    code, said = train(tmp_path, capsys, recipe(images, tmp_path / 'output', device=None))
    assert code == 2
    assert 'The launcher started 2 processes' in said and 'add device=cpu' in said
    assert not (tmp_path / 'output').exists()


def damage(path):
    """Cut an image file off."""
    path.write_bytes(path.read_bytes()[:60])


@pytest.mark.parametrize('workers', [0, 2])
def test_an_unreadable_image_is_named(tmp_path, workers):
    """A broken image is skipped, as timm does, and its file is named, in a loader process as well."""
    images = write_images(tmp_path / 'images')
    broken = images / 'train' / 'class1' / '3.png'
    damage(broken)
    handler = logging.FileHandler(tmp_path / 'log')
    logging.getLogger('dreal_timm').addHandler(handler)
    try:
        run(recipe(images, tmp_path, workers=workers, epochs=1, batch_size=12))
    finally:
        logging.getLogger('dreal_timm').removeHandler(handler)
        handler.close()
    said = [line for line in (tmp_path / 'log').read_text().splitlines() if 'cannot be read' in line]
    assert len(said) == 1
    assert str(broken) in said[0]


def test_images_that_are_all_broken(tmp_path, capsys):
    """Where image after image is broken, the run stops with one line and code 2."""
    images = write_images(tmp_path / 'images')
    for path in (images / 'train').rglob('*.png'):
        damage(path)
    code, said = train(tmp_path, capsys, recipe(images, tmp_path))
    assert code == 2
    assert 'Failed to load 10 consecutive samples' in said.splitlines()[-1]


@pytest.mark.parametrize('workers', [0, 2])
def test_a_label_out_of_range(tmp_path, capsys, workers):
    """A label that the network has no class for is named in a line, from a loader process as well."""
    images = write_images(tmp_path / 'images')
    class_map = tmp_path / 'map.txt'
    class_map.write_text('class0\nunused\nclass1\nclass2\n')
    settings = recipe(images, tmp_path, class_map=str(class_map), workers=workers, num_classes=4)
    assert train(tmp_path, capsys, settings)[0] == 0
    settings = recipe(images, tmp_path, class_map=str(class_map), workers=workers, experiment='few')
    code, said = train(tmp_path, capsys, settings)
    assert code == 2
    assert 'num_classes: 3, but the data set has 4 classes' in said.splitlines()[-1]


def test_a_label_that_only_the_images_show(images, tmp_path, capsys, monkeypatch):
    """Where the data set tells no class names, the first wrong label stops the run in a line."""
    monkeypatch.setattr('dreal_timm.train.classification.class_names', lambda dataset: None)
    for workers in (0, 2):
        settings = recipe(images, tmp_path, num_classes=2, workers=workers, experiment=f'run{workers}')
        code, said = train(tmp_path, capsys, settings)
        assert code == 2
        assert said.splitlines()[-1].endswith('Label 2 is outside of the 2 classes of the model: set num_classes.')


def test_a_checkpoint_with_more_than_tensors(images, tmp_path, capsys):
    """A number of numpy among the tensors is named, without the page that PyTorch prints, by every way to load it."""
    path = tmp_path / 'other.pth'
    torch.save({'state_dict': {}, 'optimizer': {}, 'epoch': np.float64(3.0)}, path)
    start = {'dreal': {'start': {'backbone': str(path)}}}
    for values in ({'initial_checkpoint': str(path)}, {'resume': str(path)}, start):
        code, said = train(tmp_path, capsys, recipe(images, tmp_path, **values))
        last = said.splitlines()[-1]
        assert code == 2
        assert 'numpy' in last and '\x1b' not in said and len(last) < 400, last


@pytest.mark.parametrize(('values', 'message'), [
    ({'model_kwargs': {'no_such_option': 3}}, 'model_kwargs: test_resnet does not take no_such_option'),
    ({'resume': 'nowhere'}, "resume: no file 'nowhere'"),
    ({'model': 'hf-hub:user/name', 'pretrained_path': 'FILE'}, "pretrained_path: 'hf-hub:user/name' names weights"),
    ({'mean': [0.1, 0.2]}, 'mean: 2 values for images of 1 channels'),
    ({'std': [0.1, 0.2, 0.3, 0.4]}, 'std: 4 values'),
    ({'log_with': 'tensorbord'}, "unknown tracker 'tensorbord' (did you mean 'tensorboard'?)"),
    ({'log_kwargs': {'wandb': {}}}, 'log_kwargs'),
    ({'task': 'multilabel'}, 'one true class'),
    ({'amp': True}, 'float16 needs a GPU'),
    ({'mixup': 0.2, 'batch_size': 7}, 'odd 7'),
    ({'aug_repeats': 3}, 'aug_repeats'),
    ({'recovery_interval': 3}, 'resume=auto'),
    ({'epohcs': 3}, "did you mean 'epochs'?"),
    ({'dataset': 'tensorflow/x'}, 'Kinds are torch, hfds, hfids, wds, tfds'),
    ({'dataset': 'wds/x', 'data_dir': '/nowhere'}, "no folder '/nowhere'"),
    ({'initial_checkpoint': 'FILE'}, 'Cannot load'),
    ({'pretrained_path': 'FILE'}, 'Cannot load'),
    ({'resume': 'FILE'}, 'is broken or no checkpoint'),
    ({'sched': 'wsd', 'decay_epochs': 90}, 'decay_epochs'),
    ({'model_kwargs': {'nonsense': 1}}, 'nonsense'),
])
def test_one_clear_line(images, tmp_path, capsys, values, message):
    """A wrong setting is one line that names it, with code 2, and nothing is written."""
    path = tmp_path / 'truncated.pth.tar'
    torch.save({'state_dict': {'a': torch.zeros(5000)}}, path)
    path.write_bytes(path.read_bytes()[:2000])
    values = {key: str(path) if value == 'FILE' else value for key, value in values.items()}
    code, said = train(tmp_path, capsys, recipe(images, tmp_path / 'output', **values))
    assert code == 2
    last = said.splitlines()[-1]
    assert last.startswith('dreal-timm train: error: ')
    assert message in last
    assert 'Traceback' not in said
    assert not (tmp_path / 'output').exists()


@pytest.mark.parametrize('term', ['class_loss', 'critic_loss'])
def test_a_loss_that_is_not_finite(images, tmp_path, monkeypatch, term):
    """The run stops with epoch, step and term, and keeps the last good checkpoint; it can go on from there."""
    values = dict(epochs=3, log_interval=2, model_ema=True)
    run(recipe(images, tmp_path, stop_epoch=1, **values))
    good = {path.name: path.read_bytes() for path in (tmp_path / 'run').iterdir() if path.is_file()}
    original, calls = loop._step, []

    def step(state, input, target, accum_steps, update):
        calls.append(1)
        result = original(state, input, target, accum_steps, update)
        if len(calls) == 3:
            nan = torch.tensor(float('nan'))
            result = result | {term: nan, 'loss': nan}
        return result

    monkeypatch.setattr(loop, '_step', step)
    message = rf'epoch 2, step 3 of 4: the batch has .*\({term} is nan; loss is nan\)'
    with pytest.raises(FloatingPointError, match=message):
        run(recipe(images, tmp_path, resume='auto', **values))
    assert len(calls) == 4  # found when the numbers are due
    after = {path.name: path.read_bytes() for path in (tmp_path / 'run').iterdir() if path.is_file()}
    assert {name: after[name] for name in good if name != 'args.yaml'} == {
        name: content for name, content in good.items() if name != 'args.yaml'}
    monkeypatch.undo()
    assert len(run(recipe(images, tmp_path, resume='auto', **values))['epochs']) == 3


def test_the_loss_scaler_may_skip():
    """With patience, a few bad steps in a row are let be, as float16's scaler skips them; too many are told."""
    accelerator = SimpleNamespace(gather=lambda seen: seen, num_processes=1)
    watch = FiniteWatch(patience=3)
    for index, loss in enumerate([1.0, math.nan, math.inf, 1.0, math.nan, math.nan]):
        watch.update(index, {'loss': torch.tensor(loss)})
    watch.check(accelerator, 0, 9)
    watch.update(6, {'loss': torch.tensor(math.inf)})
    watch.update(7, {'loss': torch.tensor(1.0)})
    with pytest.raises(FloatingPointError, match=r'step 5 of 9: .*\(loss is nan\)'):
        watch.check(accelerator, 0, 9)


@pytest.mark.parametrize('backend', ['DEEPSPEED', 'FSDP'])
def test_a_launcher_that_is_not_supported(images, tmp_path, monkeypatch, backend):
    """Another way of distribution than DDP is refused in a line."""
    monkeypatch.setenv(f'ACCELERATE_USE_{backend}', 'true')
    with pytest.raises(ValueError, match=f'set to {backend}; DDP is all'):
        run(recipe(images, tmp_path))


def test_settings_of_the_launcher_are_told(images, tmp_path, monkeypatch, caplog):
    """Precision and accumulation are the recipe's; where the launcher has others, the log says so."""
    monkeypatch.setenv('ACCELERATE_MIXED_PRECISION', 'bf16')
    monkeypatch.setenv('ACCELERATE_GRADIENT_ACCUMULATION_STEPS', '4')
    state = set_up(load_config(recipe(images, tmp_path)))
    assert 'ACCELERATE_MIXED_PRECISION=bf16 of the launcher is not used' in caplog.text
    assert 'ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4 of the launcher is not used' in caplog.text
    assert (state.accelerator.mixed_precision, state.accelerator.gradient_accumulation_steps) == ('no', 1)


@pytest.mark.parametrize('values', [{}, {'model_ema': True, 'model_ema_decay': 0.5}, {'mixup': 0.2}])
def test_weights_that_the_last_step_broke(images, tmp_path, values):
    """Without validation too: weights that are finite and useless after an epoch's last step are not saved."""
    settings = {'val_split': '', 'epochs': 1, 'batch_size': 36, **values}
    run(recipe(images, tmp_path, **settings, experiment='good'))
    with pytest.raises(FloatingPointError, match='epoch 1: with the weights after its last step'):
        run(recipe(images, tmp_path, **settings, lr=1e30))
    assert not list((tmp_path / 'run').glob('*.pth.tar'))


def test_a_validation_that_is_not_finite(images, tmp_path, monkeypatch):
    """Weights that break in the last step of an epoch are found by the validation, and not saved."""
    monkeypatch.setattr(classification, 'evaluate',
        lambda *args, **kwargs: {'loss': float('nan'), 'top1': 0.0, 'top5': 0.0, 'samples': 12})
    with pytest.raises(FloatingPointError, match='epoch 1: the loss of the validation is nan'):
        run(recipe(images, tmp_path))
    assert not (tmp_path / 'run' / 'last.pth.tar').exists()


def test_an_empty_class(tmp_path):
    """A class without an image in both splits is named; a class map that names all classes allows it."""
    images = write_images(tmp_path / 'images')
    for split in ('train', 'validation'):
        shutil.rmtree(images / split / 'class1')
        (images / split / 'class1').mkdir()
    with pytest.raises(ValueError, match=r'train: no image of class1.*class_map'):
        run(recipe(images, tmp_path))
    (tmp_path / 'map.txt').write_text('class0\nclass1\nclass2\n')
    run(recipe(images, tmp_path, class_map=str(tmp_path / 'map.txt'), epochs=1))


def test_error_of_a_loader_process():
    """What a loader process raised is told by its own words."""
    text = 'Caught ValueError in DataLoader worker process 0.\nOriginal Traceback ...\n  File "x"\nValueError: No.\n'
    assert one_line(ValueError(text)) == 'No.'
    assert one_line(RuntimeError('a\n  b')) == 'RuntimeError: a b'
