"""Runs on webdataset shards and on Hugging Face data sets, of local files

The file is also the program of the two processes that share a stream.
"""
import faulthandler
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import pytest
import timm
import torch
import yaml
from PIL import Image
from small_run import recipe

from dreal_timm.train import build, load_config, loop, run

_ROOT = Path(__file__).parent.parent.parent
_TRAIN, _VALIDATION = 36, 13
_NAMES = ['dark', 'grey', 'light']
_KINDS = ('wds', 'hfids', 'hfds')


def pictures(split):
    """The images of a split, (pixels, label): three classes that differ in brightness."""
    generator = torch.Generator().manual_seed(len(split))
    for i in range({'train': _TRAIN, 'validation': _VALIDATION}[split]):
        noise = torch.randint(0, 40, (32, 32), generator=generator)
        yield (noise + 90 * (i % 3)).to(torch.uint8), i % 3


def _png(pixels):
    data = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(data, 'PNG')
    return data.getvalue()


def write_shards(root, shards=4, image_key='png', target_key='cls', info=True):
    """Write webdataset shards, with the `_info.json` that timm reads."""
    root.mkdir(parents=True)
    splits = {}
    for split, parts in (('train', shards), ('validation', 2)):
        images = list(enumerate(pictures(split)))
        names = [f'{split}-{part:04}.tar' for part in range(parts)]
        for part, name in enumerate(names):
            with tarfile.open(root / name, 'w') as tar:
                for i, (pixels, label) in images[part::parts]:
                    target = ('cls', str(label)) if target_key == 'cls' else ('json', json.dumps({target_key: label}))
                    for key, data in ((image_key, _png(pixels)), (target[0], target[1].encode())):
                        entry = tarfile.TarInfo(f'{i:05}.{key}')
                        entry.size = len(data)
                        tar.addfile(entry, io.BytesIO(data))
        lengths = [len(images[part::parts]) for part in range(parts)]
        splits[split] = {'name': split, 'num_samples': len(images), 'filenames': names, 'shard_lengths': lengths}
    if info:
        (root / '_info.json').write_text(json.dumps({'splits': splits}))
    return root


def write_parquet(root, shards=4, image_key='image', target_key='label', names=True, card=True):
    """Write parquet files, with the card that tells their fields and lengths as on the Hub."""
    import datasets
    import pyarrow
    import pyarrow.parquet
    (root / 'data').mkdir(parents=True)
    label_type = datasets.ClassLabel(names=_NAMES) if names else datasets.Value('int64')
    features = datasets.Features({image_key: datasets.Image(), target_key: label_type})
    splits = []
    for split, parts in (('train', shards), ('validation', 2)):
        images = list(pictures(split))
        splits.append({'name': split, 'num_examples': len(images), 'num_bytes': 0})
        for part in range(parts):
            rows = [
                {image_key: {'bytes': _png(pixels), 'path': None}, target_key: label}
                for pixels, label in images[part::parts]]
            table = pyarrow.Table.from_pylist(rows, schema=features.arrow_schema)
            pyarrow.parquet.write_table(table, root / 'data' / f'{split}-{part:05}-of-{parts:05}.parquet')
    if card:
        label = {'class_label': {'names': dict(enumerate(_NAMES))}} if names else 'int64'
        fields = [{'name': image_key, 'dtype': 'image'}, {'name': target_key, 'dtype': label}]
        text = yaml.safe_dump({'dataset_info': {'features': fields, 'splits': splits}})
        (root / 'README.md').write_text(f'---\n{text}---\n')
    return root


def joined(steps):
    """The images of some steps, one after the other."""
    return list(chain.from_iterable(steps))


@contextmanager
def watched():
    """Yield a list that fills with the numbers of the images of each training step."""
    numbers = {pixels.numpy().tobytes(): i for i, (pixels, _) in enumerate(pictures('train'))}
    steps, step = [], loop._step

    def watch(state, input, *args):
        pixels = ((input * 0.3 + 0.4) * 255).round().to(torch.uint8)
        steps.append([numbers[image.numpy().tobytes()] for image in pixels])
        return step(state, input, *args)

    loop._step = watch
    try:
        yield steps
    finally:
        loop._step = step


def by_hand(state_dict, values, order=(0, 1, 2)):
    """Loss and top-1 of the validation images, each once; `order` are the indices of the classes."""
    images = list(pictures('validation'))
    model = build.build_model(load_config(values)).eval()
    model.load_state_dict(state_dict)
    with torch.no_grad():
        output = model((torch.stack([pixels for pixels, _ in images])[:, None] / 255 - 0.4) / 0.3)
    target = torch.tensor([order[label] for _, label in images])
    loss = torch.nn.functional.cross_entropy(output, target).item()
    return {'loss': loss, 'top1': 100 * (output.argmax(1) == target).double().mean().item()}


@pytest.fixture(scope='module', autouse=True)
def offline(tmp_path_factory):
    """Ask nothing of the Hub, write nothing to the home folder, and wait for no process that has failed."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (
            ('HF_HUB_OFFLINE', '1'), ('HF_DATASETS_OFFLINE', '1'), ('HF_HOME', str(tmp_path_factory.mktemp('home'))),
        ):
            patch.setenv(name, value)
        patch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
        # how long a loader that is left behind by an error waits for each of its processes
        patch.setattr('torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL', 0.5)
        yield


@pytest.fixture(scope='module')
def stream(tmp_path_factory, offline):
    """Write a stream of a kind, once, and return the recipe's keys and values that open it."""
    written = {}

    def make(kind, **options):
        package = pytest.importorskip('webdataset' if kind == 'wds' else 'datasets')
        name = json.dumps([kind == 'wds', options])
        if name not in written:
            path = tmp_path_factory.mktemp('stream') / 'data'
            written[name] = write_shards(path, **options) if kind == 'wds' else write_parquet(path, **options)
        if kind == 'wds':
            return {'dataset': 'wds/', 'data_dir': str(written[name])}
        package.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0  # it waits 5 s after each pass over parquet files
        package.disable_progress_bars()
        return {'dataset': f'{kind}/{written[name]}', 'data_dir': str(written[name].parent / 'cache')}

    return make


def settings(output, stream, **values):
    """A recipe for a stream; 6 images a batch divide the images of two workers, each of them is seen once."""
    return recipe('', output, no_aug=True, batch_size=6, **stream | {'lr': 0.02} | values)


# what a run sees


@pytest.fixture(scope='module', params=[f'{kind}-{workers}' for kind in _KINDS for workers in (0, 2)])
def finished(request, stream, tmp_path_factory):
    """A run of two epochs, and the images of its steps."""
    kind, workers = request.param.split('-')
    values = settings(tmp_path_factory.mktemp(kind), stream(kind), workers=int(workers), drop=0.1)
    with watched() as steps:
        results = run(values)
    return kind, values, results, steps


def test_every_image_is_learned_from(finished):
    """An epoch learns from every image once, in another order than the epoch before."""
    _, _, _, steps = finished
    epochs = [joined(steps[:6]), joined(steps[6:])]
    assert [sorted(epoch) for epoch in epochs] == [list(range(_TRAIN))] * 2
    assert epochs[0] != epochs[1]
    assert epochs[0] != sorted(epochs[0])


@pytest.mark.parametrize('kind', ['wds', 'hfids'])
def test_order_of_a_single_shard(stream, tmp_path, kind):
    """A stream that has no shards to shuffle gives its images in another order with each epoch too."""
    with watched() as steps:
        run(settings(tmp_path, stream(kind, shards=1)))
    assert sorted(joined(steps[:6])) == sorted(joined(steps[6:])) == list(range(_TRAIN))
    assert steps[:6] != steps[6:]


def test_every_image_is_validated_once(finished):
    """The metrics of an epoch are those of its weights on every image of the split, once."""
    _, values, results, _ = finished
    for entry in results['epochs']:
        weights = torch.load(
            Path(results['directory']) / f"checkpoint-{entry['epoch']}.pth.tar", weights_only=True)['state_dict']
        for name, value in by_hand(weights, values).items():
            assert entry['validation'][name] == pytest.approx(value, rel=1e-5, abs=1e-5)


def test_class_names(finished):
    """An exported model knows the names of the classes where the data set does."""
    kind, _, results, _ = finished
    model = timm.create_model(f"local-dir:{results['model']}", pretrained=True)
    names = model.pretrained_cfg.get('label_names')
    assert names is None if kind == 'wds' else list(names) == _NAMES


def test_resumed_run(finished, tmp_path):
    """A run that stops and resumes ends with the weights of one that does not, bit for bit."""
    _, values, results, steps = finished
    part = values | {'output': str(tmp_path)}
    with watched() as parts:
        run(part | {'stop_epoch': 1})
        resumed = run(part | {'resume': 'auto'})
    assert parts == steps
    one, two = (
        torch.load(Path(end['directory']) / 'last.pth.tar', weights_only=True)['state_dict']
        for end in (results, resumed))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    assert resumed['epochs'] == results['epochs']


# lengths, fields, labels


@pytest.mark.parametrize(('batch_size', 'workers', 'count'), [(8, 0, 40), (8, 2, 48)])
@pytest.mark.parametrize('kind', ['wds', 'hfids'])
def test_epoch_is_filled_with_repeats(stream, tmp_path, kind, batch_size, workers, count):
    """Where the images do not fill the batches of every worker, some are seen again, and none is left out."""
    with watched() as steps:
        run(settings(tmp_path, stream(kind), epochs=1, workers=workers) | {'batch_size': batch_size})
    assert [len(step) for step in steps] == [batch_size] * (count // batch_size)
    assert set(joined(steps)) == set(range(_TRAIN))


@pytest.mark.parametrize('workers', [0, 2])
def test_download(stream, tmp_path, workers):
    """With dataset_download a stream is read from files that were prepared before, each image once."""
    with watched() as steps:
        run(settings(tmp_path, stream('hfids', shards=1), epochs=1, workers=workers, dataset_download=True))
    assert sorted(joined(steps)) == list(range(_TRAIN))


@pytest.mark.parametrize('kind', ['wds', 'hfids'])
def test_number_of_samples(stream, tmp_path, kind):
    """train_num_samples is the length of an epoch, also of a stream that tells its own."""
    with watched() as steps:
        results = run(settings(tmp_path, stream(kind), train_num_samples=12))
    assert [len(step) for step in steps] == [6] * 4
    assert len(results['epochs']) == 2


def _without_length(kind, stream):
    """A stream that does not tell its length, and the splits of it."""
    if kind == 'wds':
        splits = {'train_split': 'train-{0000..0003}.tar', 'val_split': 'validation-{0000..0001}.tar'}
        return stream('wds', info=False) | splits
    return stream('hfids', card=False)


@pytest.mark.parametrize('kind', ['wds', 'hfids'])
def test_length_that_only_the_recipe_knows(stream, tmp_path, kind):
    """train_num_samples and val_num_samples are used where a stream does not know its length; without it asks."""
    values = settings(tmp_path / 'output', _without_length(kind, stream), epochs=1, experiment='one')
    with pytest.raises((ValueError, FileNotFoundError), match='num_samples'):
        run(values)
    results = run(values | {'train_num_samples': 36, 'val_num_samples': 13})
    assert results['metrics']['top1'] >= 0
    if kind == 'wds':  # shards in the place of a split, with their number of samples
        run(values | {'train_split': 'train-{0000..0003}.tar|36', 'experiment': 'two'})


@pytest.mark.parametrize('kind', _KINDS)
def test_fields(stream, tmp_path, kind):
    """input_key and target_key name the fields of image and label."""
    keys = {'input_key': 'picture.png' if kind == 'wds' else 'picture', 'target_key': 'brightness'}
    options = {'image_key': keys['input_key'], 'target_key': 'brightness'}
    with watched() as steps:
        results = run(settings(tmp_path, stream(kind, **options), epochs=1, **keys))
    assert sorted(joined(steps)) == list(range(_TRAIN))
    assert results['epochs'][0]['train']['top1'] > 40


@pytest.mark.parametrize('kind', ['hfids', 'hfds'])
def test_class_map(stream, tmp_path, kind):
    """A class_map by names gives the classes another order, also in the exported model."""
    path = tmp_path / 'classes.txt'
    path.write_text('light\ndark\ngrey\n')
    values = settings(tmp_path, stream(kind), epochs=1, class_map=str(path))
    results = run(values)
    weights = torch.load(tmp_path / 'run' / 'last.pth.tar', weights_only=True)['state_dict']
    measured = by_hand(weights, values, order=[1, 2, 0])
    assert {name: results['metrics'][name] for name in measured} == pytest.approx(measured, rel=1e-5)
    model = timm.create_model(f"local-dir:{results['model']}", pretrained=True)
    assert list(model.pretrained_cfg['label_names']) == ['light', 'dark', 'grey']


def test_class_map_of_shards(stream, tmp_path):
    """A class map is refused for shards, whose labels are numbers."""
    with pytest.raises(ValueError, match=r'class_map.*numbers'):
        run(settings(tmp_path, stream('wds'), class_map='classes.txt'))


@pytest.mark.parametrize('key', ['input_key', 'target_key'])
@pytest.mark.parametrize('kind', _KINDS)
def test_fields_that_are_not_there(stream, tmp_path, kind, key):
    """A field that no sample has is named, or its key, and nothing is trained."""
    with pytest.raises((ValueError, KeyError), match=f'nothing|{key}'):
        run(settings(tmp_path, stream(kind), **{key: 'nothing'}))
    assert not list(tmp_path.rglob('*.pth.tar'))


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('kind', _KINDS)
def test_labels_out_of_range(stream, tmp_path, kind, workers):
    """A label that the model has no class for is named when it is first seen."""
    options = {} if kind == 'wds' else {'names': False}
    with pytest.raises(ValueError, match='Label 2 is outside of the 2 classes of the model: set num_classes'):
        run(settings(tmp_path, stream(kind, **options), num_classes=2, workers=workers))


@pytest.mark.parametrize('kind', ['hfids', 'hfds'])
def test_more_classes_than_the_model(stream, tmp_path, kind):
    """A data set that names more classes than the model has is refused before anything is written."""
    with pytest.raises(ValueError, match='num_classes: 2, but the data set has 3 classes'):
        run(settings(tmp_path, stream(kind), num_classes=2))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('kind', _KINDS)
def test_unknown_split(stream, tmp_path, kind):
    """A split that the data set does not have is named."""
    with pytest.raises((ValueError, FileNotFoundError), match='nothing'):
        run(settings(tmp_path, stream(kind), train_split='nothing'))


@pytest.mark.parametrize('kind', ['wds', 'hfids'])
def test_fewer_shards_than_workers(stream, tmp_path, kind):
    """A stream of fewer shards than loader processes is refused: some would have nothing to read."""
    with pytest.raises((ValueError, RuntimeError), match='shard'):
        run(settings(tmp_path, stream(kind, shards=1), workers=2))
    assert not list(tmp_path.rglob('*.pth.tar'))


# packages


@pytest.mark.parametrize(('kind', 'package', 'command'), [
    ('wds', 'webdataset', r'dreal_timm\[streaming\]'), ('hfids', 'datasets', r'dreal_timm\[streaming\]'),
    ('hfds', 'datasets', r'dreal_timm\[streaming\]'), ('tfds', 'tensorflow_datasets', 'tensorflow-datasets'),
])
def test_missing_package(tmp_path, monkeypatch, kind, package, command):
    """Without its package a data set is refused, with the package and what installs it."""
    monkeypatch.setitem(sys.modules, package, None)
    for reader in ('reader_wds', 'reader_hfids', 'reader_hfds', 'reader_tfds', '_hfds'):
        monkeypatch.delitem(sys.modules, f'timm.data.readers.{reader}', raising=False)
    with pytest.raises(ModuleNotFoundError, match=f'{package}.*{command}'):
        run(settings(tmp_path / 'output', {'dataset': f'{kind}/name', 'data_dir': str(tmp_path)}))
    assert not (tmp_path / 'output').exists()


def test_extra_that_the_error_names():
    """The extra 'streaming' installs what the readers need."""
    lines = [line for line in (_ROOT / 'pyproject.toml').read_text().splitlines() if line.startswith('streaming = ')]
    assert len(lines) == 1
    assert 'webdataset' in lines[0] and 'datasets' in lines[0].replace('webdataset', '')


# two processes


def _take_part(cases, folder, rank):
    """Run recipes, one after the other, as one of two processes; a run that hangs ends the process."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    for name, values in cases.items():
        faulthandler.dump_traceback_later(20, exit=True)
        with watched() as steps:
            try:
                result = {'epochs': run(values)['epochs'], 'steps': steps}
            except Exception as error:
                result = {'error': f'{type(error).__name__}: {error}'}
        (folder / f'{name}-{rank}.json').write_text(json.dumps(result))
        faulthandler.cancel_dump_traceback_later()


def _main(cases, folder):
    """Import what both processes need, and fork them."""
    import datasets
    import timm.data.readers.reader_hfds
    import timm.data.readers.reader_hfids
    import timm.data.readers.reader_wds  # noqa: F401
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0
    datasets.disable_progress_bars()
    for rank in range(2):
        if os.fork() == 0:
            _take_part(cases, folder, rank)
            os._exit(0)
    for _ in range(2):
        os.wait()


@pytest.fixture(scope='module')
def shared(stream, tmp_path_factory):
    """Runs of two processes on streams."""
    folder = tmp_path_factory.mktemp('shared')
    streams = {kind: stream(kind) for kind in _KINDS} | {'one shard': stream('wds', shards=1)}
    cases = {
        name: settings(folder, keys, experiment=name, validation_batch_size=3) for name, keys in streams.items()}
    with socket.socket() as sock:
        sock.bind(('127.0.0.1', 0))
        port = sock.getsockname()[1]
    environment = os.environ | {
        'WORLD_SIZE': '2', 'LOCAL_WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port),
        'OMP_NUM_THREADS': '1', 'PYTHONPATH': f'{_ROOT}:{_ROOT / "tests"}',
    }
    with (folder / 'log').open('w') as log:
        process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(cases), str(folder)], stdout=log, stderr=log, env=environment,
            start_new_session=True)
    try:
        process.wait(120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # with its forks
            process.wait(10)

    def results(name):
        files = [folder / f'{name}-{rank}.json' for rank in range(2)]
        assert all(file.exists() for file in files), f"a process hung or died: {(folder / 'log').read_text()[-3000:]}"
        return cases[name], folder / name, [json.loads(file.read_text()) for file in files]

    return results


@pytest.mark.parametrize('kind', _KINDS)
def test_two_processes_share_a_stream(shared, kind):
    """Two processes learn from every image once an epoch, each from its own half, and return the same metrics."""
    _, _, (first, second) = shared(kind)
    assert first['epochs'] == second['epochs']
    assert len(first['steps']) == len(second['steps']) == 6
    for epoch in (slice(0, 3), slice(3, 6)):
        assert sorted(joined(first['steps'][epoch] + second['steps'][epoch])) == list(range(_TRAIN))


@pytest.mark.parametrize('kind', _KINDS)
def test_two_processes_validate_every_image_once(shared, kind):
    """The metrics of two processes are those of every image of the validation split, once."""
    values, directory, (first, _) = shared(kind)
    for entry in first['epochs']:
        weights = torch.load(directory / f"checkpoint-{entry['epoch']}.pth.tar", weights_only=True)['state_dict']
        for name, value in by_hand(weights, values).items():
            assert entry['validation'][name] == pytest.approx(value, rel=1e-5, abs=1e-5)


def test_fewer_shards_than_processes(shared):
    """A stream of fewer shards than processes is refused in all of them: one would wait for the others for ever."""
    _, directory, results = shared('one shard')
    assert all('shard' in result['error'] for result in results)
    assert not list(directory.rglob('*.pth.tar'))


if __name__ == '__main__':
    _main(json.loads(sys.argv[1]), Path(sys.argv[2]))
