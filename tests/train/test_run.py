import copy
import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from PIL import Image
from small_run import recipe

import dreal_timm
from dreal_timm.train import datasets, load_config, loaders, run
from dreal_timm.train import launch as launching
from dreal_timm.train.validate import validate


@pytest.fixture(scope='module')
def finished(images, tmp_path_factory):
    """A finished run of a few epochs."""
    path = tmp_path_factory.mktemp('output')
    return run(recipe(images, path, epochs=8)), path / 'run'


def test_results(finished):
    """run() returns where everything is, and the metrics of each epoch; the network has learned."""
    results, directory = finished
    assert results['directory'] == str(directory)
    assert len(results['epochs']) == 8
    assert results['metrics']['top1'] == max(epoch['validation']['top1'] for epoch in results['epochs'])
    assert results['metrics'] == results['epochs'][results['best_epoch']]['validation']
    assert results['metrics']['top1'] > 60
    train = results['epochs'][-1]['train']
    assert {'loss', 'class_loss', 'actor_loss', 'critic_loss', 'top1', 'reward', 'quality'} <= set(train)
    pushed = train['class_loss'] + 0.1 * train['actor_loss'] + train['critic_loss']  # actor_weight
    assert train['loss'] == pytest.approx(pushed, abs=1e-5)


def test_files(finished, images):
    """The folder holds the recipe, the summary, both checkpoints and the exported model."""
    _, directory = finished
    assert {path.name for path in directory.iterdir()} == {
        '.lock', 'args.yaml', 'network.json', 'run.json', 'summary.csv', 'last.pth.tar', 'model_best.pth.tar', 'model',
        *(f'checkpoint-{epoch}.pth.tar' for epoch in range(8)),
    }
    assert yaml.safe_load((directory / 'args.yaml').read_text())['data_dir'] == str(images)
    rows = list(csv.DictReader((directory / 'summary.csv').open()))
    assert [int(row['epoch']) for row in rows] == list(range(8))
    assert {'train_reward', 'train_quality', 'eval_top1', 'lr'} <= set(rows[0])


def test_record(finished):
    """run.json names the versions and the commit, and has the time and the device of each epoch."""
    _, directory = finished
    record = json.loads((directory / 'run.json').read_text())
    assert record['versions']['torch'] == torch.__version__
    assert record['commit'] is None or re.fullmatch('[0-9a-f]{40}(-dirty)?', record['commit'])
    assert [row['epoch'] for row in record['epochs']] == list(range(8))
    assert all(0 < row['seconds'] < 600 and row['device'].startswith('cpu, ') for row in record['epochs'])
    assert (directory / 'model' / 'training' / 'run.json').read_bytes() == (directory / 'run.json').read_bytes()


def test_record_of_a_resumed_run(images, tmp_path):
    """A resumed run keeps the times of the epochs before, and goes on where its record was lost or broken."""
    run(recipe(images, tmp_path, epochs=3, stop_epoch=2))
    path = tmp_path / 'run' / 'run.json'
    before = json.loads(path.read_text())['epochs']
    run(recipe(images, tmp_path, epochs=3, resume='auto'))
    after = json.loads(path.read_text())['epochs']
    assert (after[:2], len(after)) == (before, 3)
    path.write_text('{"epochs": [{}')
    (tmp_path / 'run' / 'summary.csv').unlink()  # as if killed between the last checkpoint and these
    run(recipe(images, tmp_path, epochs=3, resume='auto'))
    assert json.loads(path.read_text())['epochs'] == []
    assert len((tmp_path / 'run' / 'summary.csv').read_text().splitlines()) == 4


def test_checkpoints(finished):
    """Checkpoints are timm's, load with weights_only, and have the critic outside of the state_dict."""
    results, directory = finished
    last = torch.load(directory / 'last.pth.tar', weights_only=True)
    best = torch.load(directory / 'model_best.pth.tar', weights_only=True)
    assert (last['epoch'], best['epoch']) == (7, results['best_epoch'])
    assert last['arch'] == 'test_resnet'
    assert not any('critic' in name for name in last['state_dict'])
    assert set(last['task_state']) == {'critic', 'rotation'}
    assert last['task_state']['rotation']['epoch'] == 7
    assert not list(directory.glob('*.tmp'))


def test_exported_model_is_the_best_epoch(finished, images):
    """The exported folder loads by timm, holds the best epoch, and validates to the same accuracy."""
    results, directory = finished
    model = timm.create_model(f'local-dir:{directory}/model', pretrained=True)
    best = torch.load(directory / 'model_best.pth.tar', weights_only=True)['state_dict']
    assert all(torch.equal(value, best[name]) for name, value in model.state_dict().items())
    assert list(model.pretrained_cfg['label_names']) == ['class0', 'class1', 'class2']
    measured = validate(str(directory / 'model'), images, workers=0, device='cpu', batch_size=5)
    assert measured['samples'] == 12
    for name in ('loss', 'top1', 'top5'):
        assert measured[name] == pytest.approx(results['metrics'][name], abs=1e-4)


def test_validate_by_hand(finished, images):
    """The evaluator's top-1 is that of counting images one by one."""
    results, directory = finished
    model = timm.create_model(f'local-dir:{directory}/model', pretrained=True).eval()
    right = 0
    for label in range(3):
        for path in sorted((images / 'validation' / f'class{label}').iterdir()):
            pixels = torch.frombuffer(bytearray(Image.open(path).tobytes()), dtype=torch.uint8).view(1, 1, 32, 32)
            with torch.no_grad():
                right += model((pixels / 255 - 0.4) / 0.3).argmax().item() == label
    assert results['metrics']['top1'] == pytest.approx(100 * right / 12)


@pytest.mark.parametrize('workers', [0, 1])
def test_a_run_is_repeatable(images, tmp_path, workers):
    """The same recipe gives the same weights, bit for bit, with and without loader processes."""
    states = []
    for name in 'ab':
        run(recipe(images, tmp_path, experiment=name, workers=workers))
        states.append(torch.load(tmp_path / name / 'last.pth.tar', weights_only=True)['state_dict'])
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_disabled_is_plain_training(images, tmp_path):
    """dreal.enabled=false trains the plain network on the same batches: equal to actor_weight=0, bit for bit."""
    run(recipe(images, tmp_path, experiment='plain', dreal={'enabled': False}))
    run(recipe(images, tmp_path, experiment='zero', dreal={'actor_weight': 0.0}))
    run(recipe(images, tmp_path, experiment='one'))
    plain, zero, one = (
        torch.load(tmp_path / name / 'last.pth.tar', weights_only=True) for name in ('plain', 'zero', 'one'))
    assert 'task_state' not in plain
    assert all(torch.equal(value, zero['state_dict'][name]) for name, value in plain['state_dict'].items())
    assert any(not torch.equal(value, one['state_dict'][name]) for name, value in plain['state_dict'].items())
    rows = list(csv.DictReader((tmp_path / 'plain' / 'summary.csv').open()))
    assert 'train_reward' not in rows[0]


def test_nothing_is_overwritten(images, tmp_path):
    """A folder that holds something is not written to."""
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'precious').write_text('x')
    with pytest.raises(FileExistsError, match='experiment'):
        run(recipe(images, tmp_path))
    assert [path.name for path in (tmp_path / 'run').iterdir()] == ['precious']


@pytest.mark.parametrize(('values', 'error', 'message'), [
    ({'model': 'dreal_se_resnet51'}, ValueError, r"Unknown model 'dreal_se_resnet51' \(did you mean 'dreal_se_resnet"),
    ({'model_kwargs': {}}, ValueError, 'no attention site'),
    ({'data_dir': '/nowhere'}, FileNotFoundError, "no folder '/nowhere'"),
    ({'data_dir': None}, ValueError, 'data_dir'),
    ({'train_split': 'training_set'}, FileNotFoundError, "no folder 'training_set': it holds train, validation"),
    ({'dataset': 'torch/nothing'}, FileNotFoundError, 'nothing'),
    ({'num_classes': 2}, ValueError, 'num_classes: 2, but the data set has 3'),
    ({'mean': [0.1, 0.2]}, ValueError, 'mean: 2 values for images of 1 channels'),
    ({'opt': 'sdg'}, ValueError, r"Unknown optimizer 'sdg' \(did you mean 'sgd"),
    ({'eval_metric': 'top3'}, ValueError, 'top3'),
    ({'eval_metric': 'mAP'}, ValueError, 'dreal.task=classification one of top1, top5, loss, epoch'),
    ({'device': 'banana'}, ValueError, "device: 'banana'"),
    ({'dataset': 'foo'}, ValueError, 'kind/name'),
    ({'model': ''}, ValueError, 'Unknown model'),
    ({'batch_size': 64}, ValueError, 'batch_size: 64'),
    ({'initial_checkpoint': '/nowhere.pth'}, FileNotFoundError, '/nowhere.pth'),
    ({'dreal': {'gamma': 2.0}}, ValueError, 'reward_clip'),
])
def test_wrong_settings(images, tmp_path, values, error, message):
    """A wrong setting is an error of one line that says what to do, before anything is written."""
    with pytest.raises(error, match=message):
        run(recipe(images, tmp_path, **values))
    assert not list(tmp_path.iterdir())


def test_splits_with_different_classes(images, tmp_path):
    """An empty class folder would shift the labels of one split: the class is named."""
    shutil.copytree(images, tmp_path / 'images')
    for path in (tmp_path / 'images' / 'validation' / 'class1').iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r'no image of class1'):
        run(recipe(tmp_path / 'images', tmp_path / 'output'))


def test_divergence_stops_the_run(images, tmp_path):
    """A loss that is not finite ends the run with the epoch and the folder, not with a model of NaN."""
    with pytest.raises(FloatingPointError, match=r'epoch 1, step [12] of 4.*class_loss is (nan|inf).*lr'):
        run(recipe(images, tmp_path, lr=1e20, eval_metric='loss'))
    assert {path.name for path in (tmp_path / 'run').iterdir()} == {'.lock', 'args.yaml', 'network.json'}


def test_checkpoint_that_does_not_fit(finished, images):
    """A checkpoint of another network is refused in a line."""
    with pytest.raises(ValueError, match=r'Cannot load .*model_best'):
        validate('resnet18', images, checkpoint=finished[1] / 'model_best.pth.tar', workers=0, device='cpu')


def test_two_processes(images, tmp_path):
    """Two processes train one network on one folder, and the exported model has the metrics that were reported."""
    path = tmp_path / 'recipe.yaml'
    path.write_text(yaml.safe_dump(recipe(images, tmp_path, batch_size=4)))
    process = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', '-m',
         'dreal_timm.train', str(path)],
        check=True, env=os.environ | {'OMP_NUM_THREADS': '1'}, cwd=Path(dreal_timm.__file__).parent.parent,
        capture_output=True, text=True,
    )
    assert '2 x cpu' in process.stdout + process.stderr
    rows = list(csv.DictReader((tmp_path / 'run' / 'summary.csv').open()))
    best = max(float(row['eval_top1']) for row in rows)
    measured = validate(str(tmp_path / 'run' / 'model'), images, workers=0, device='cpu')
    assert measured['top1'] == pytest.approx(best, abs=1e-4)


def test_module_reports_errors_in_a_line(tmp_path):
    """python -m dreal_timm.train says what is wrong in one line, with exit code 2."""
    process = subprocess.run(
        [sys.executable, '-m', 'dreal_timm.train', 'nothing'], capture_output=True, text=True,
        cwd=Path(dreal_timm.__file__).parent.parent,
    )
    assert process.returncode == 2
    assert 'Traceback' not in process.stderr


def test_device_modules(images, tmp_path):
    """Modules that the recipe names are imported first; a missing one is named."""
    with pytest.raises(ModuleNotFoundError, match='not_there'):
        run(recipe(images, tmp_path, device_modules=['not_there']))


def test_learning_rate_scales_with_the_batch(images, tmp_path):
    """Without lr, lr_base is scaled by the batch size as in timm."""
    run(recipe(images, tmp_path, lr=None, lr_base=0.32, batch_size=8, epochs=1))
    rows = list(csv.DictReader((tmp_path / 'run' / 'summary.csv').open()))
    assert float(rows[0]['lr']) == pytest.approx(0.32 * 8 / 256)


def test_validate_errors(images, tmp_path):
    """What cannot be validated is said."""
    for model, error, message in (
        ('dreal_se_resnet18', ValueError, 'no published weights'),
        ('resnet180', ValueError, 'did you mean'),
        ('some/where', FileNotFoundError, 'hf-hub'),
        (str(images), FileNotFoundError, 'config.json'),
    ):
        with pytest.raises(error, match=message):
            validate(model, images, workers=0, device='cpu')


def test_crop_mode_of_the_model(images):
    """Validation crops as the model's configuration says: 'squash' sees the borders that 'center' cuts off."""
    config = load_config(dict(data_dir=str(images), workers=0, batch_size=1))
    data = dict(input_size=(1, 8, 8), interpolation='bilinear', mean=(0.0,), std=(1.0,), crop_pct=1.0)
    image = Image.new('L', (64, 16))
    image.paste(255, (0, 0, 8, 16))  # white at the left border
    seen = {}
    for mode in ('center', 'squash'):
        dataset = datasets.build_dataset(config, 'validation', 1, is_training=False)
        loaders.build_loader(config, dataset, data | {'crop_mode': mode}, torch.device('cpu'))
        seen[mode] = torch.as_tensor(dataset.transform(image)).max().item()
    assert seen['center'] == 0
    assert seen['squash'] > 128


def test_labels_out_of_range(finished, images, tmp_path):
    """A data set with more classes than the model has is refused, by its names or at the first label without one."""
    root = tmp_path / 'more'
    for label in range(5):
        (root / 'validation' / f'class{label}').mkdir(parents=True)
        Image.new('L', (32, 32)).save(root / 'validation' / f'class{label}' / '0.png')
    with pytest.raises(ValueError, match='2 of the 5 classes'):
        validate(str(finished[1] / 'model'), root, workers=0, device='cpu')
    (tmp_path / 'map.txt').write_text('\n'.join(f'class{label}' for label in range(5)))
    with pytest.raises(ValueError, match='Label 3 is outside of the 3 classes'):
        validate(str(finished[1] / 'model'), root, workers=0, device='cpu', class_map=str(tmp_path / 'map.txt'))


def test_config_is_not_changed_for_the_caller(images, tmp_path):
    """run() takes a configuration object as well."""
    config = load_config(recipe(images, tmp_path, epochs=1, lr=None))
    before = copy.deepcopy(vars(config))
    run(config)
    assert vars(config) == before


def test_flags_of_the_backends_are_the_callers(monkeypatch):
    """On a GPU, `launch` leaves TF32 and cudnn.benchmark as the caller has set them; the commands set both."""

    class OnCuda:
        device, num_processes = torch.device('cuda'), 1

        def __init__(self, **kwargs):
            pass

        def wait_for_everyone(self):
            pass

    monkeypatch.setattr(launching, 'Accelerator', OnCuda)
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, matmul.allow_tf32
    try:
        cudnn.benchmark, matmul.allow_tf32 = False, False
        assert launching.launch(load_config({'device': None})).device.type == 'cuda'
        assert not cudnn.benchmark and not matmul.allow_tf32
        launching.fast_kernels()
        assert cudnn.benchmark and matmul.allow_tf32
    finally:
        cudnn.benchmark, matmul.allow_tf32 = before
