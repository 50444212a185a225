"""Cards: what they tell was measured of these weights"""
import json
import re
import statistics
from pathlib import Path

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from networks import make_model
from safetensors.torch import load_file
from small_run import recipe, write_images

from dreal_timm.cli import main
from dreal_timm.hub import export, export_run, weights_digest
from dreal_timm.hub.results import check_control, read_results
from dreal_timm.train.validate import validate


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp('card') / 'images')


@pytest.fixture(scope='module')
def runs(images, tmp_path_factory):
    """A reinforced run, and its plain control."""
    from dreal_timm.train import run
    output = tmp_path_factory.mktemp('card-runs')
    run(recipe(images, output, experiment='reinforced'))
    run(recipe(images, output, experiment='plain', dreal={'enabled': False}))
    return output


@pytest.fixture(scope='module')
def results(runs, images):
    """Files with the results of both."""
    files = []
    for name in ('reinforced', 'plain'):
        file = runs / f'{name}.json'
        assert main([
            'validate', str(runs / name / 'model'), '--data', str(images), '--workers', '0', '--results', str(file),
        ]) == 0
        files.append(file)
    return files


def table(folder: Path) -> list[str]:
    text = (folder / 'README.md').read_text()
    return re.findall(r'^\| (?:this network|plain, the same settings) .*', text, flags=re.MULTILINE)


def test_card_with_control(runs, results, tmp_path, capsys):
    """The table repeats the numbers of both files, and the Hub's validator reads the front matter."""
    told, plain = (json.loads(path.read_text()) for path in results)
    folder = tmp_path / 'out'
    assert main(
        ['export', str(runs / 'reinforced'), str(folder), '--results', str(results[0]), '--control', str(results[1])],
    ) == 0
    assert table(folder) == [
        f"| {name} | {row['top1']:.2f} | {row['top5']:.2f} | {row['loss']:.4f} |"
        for name, row in (('this network', told), ('plain, the same settings', plain))]
    card = ModelCard.load(folder / 'README.md')
    assert card.data.library_name == 'timm'
    assert {entry.metric_type: entry.metric_value for entry in card.data.eval_results} == {
        key: told[key] for key in ('top1', 'top5')}
    text = card.text
    assert 'One run each' in text
    assert '`dreal.probe` | split' in text
    assert '{{' not in text
    assert 'Not measured' not in text
    assert str(runs) not in ''.join(path.read_text() for path in (folder / 'training').iterdir())


def test_cost(runs, results, tmp_path):
    """The cost is the quotient of both medians, and is left out where the devices differ."""
    seconds = [
        statistics.median(row['seconds'] for row in json.loads((runs / name / 'run.json').read_text())['epochs'])
        for name in ('reinforced', 'plain')]
    told = json.loads(results[1].read_text())
    for row in told['run']['epochs']:
        row['device'] = 'another'
    (tmp_path / 'other.json').write_text(json.dumps(told))
    lines = []
    for folder, control in (('same', results[1]), ('other', tmp_path / 'other.json')):
        export_run(runs / 'reinforced', tmp_path / folder, results=results[0], control=control)
        lines += re.findall('What a step costs .*', (tmp_path / folder / 'README.md').read_text())
    assert f'took {seconds[0]:.1f} s (median of 2 epochs, cpu, ' in lines[0]
    assert f'and {seconds[1]:.1f} s of the plain network' in lines[0]
    assert f': {seconds[0] / seconds[1]:.2f} times.' in lines[0]
    assert f'took {seconds[0]:.1f} s' in lines[1]
    assert 'of the plain network' not in lines[1]


def test_card_without_results(runs, tmp_path):
    """Without results there is no number of accuracy, and the card says so."""
    export_run(runs / 'reinforced', tmp_path / 'out')
    text = (tmp_path / 'out' / 'README.md').read_text()
    assert 'Not measured.' in text
    assert 'top-1' not in text
    assert 'model-index' not in text


def test_a_network_without_a_run(tmp_path):
    """The card of a network that no run trained does not guess how it was trained, and counts its parameters."""
    model = timm.create_model('dreal_cbam_resnet18', num_classes=5)
    folder = export(model, tmp_path / 'out', data_config={'input_size': (3, 64, 64)})
    text = (folder / 'README.md').read_text()
    assert 'is not recorded' in text
    assert f'{sum(p.numel() for p in model.parameters()):,}' in text


def test_results_of_other_weights(runs, results, tmp_path, capsys):
    """Results of other weights, and those of float32 for float16, are refused; nothing is left."""
    for source, options in (('plain', []), ('reinforced', ['--half'])):
        code = main(['export', str(runs / source), str(tmp_path / 'out'), '--results', str(results[0]), *options])
        assert code == 2
        assert 'of other weights' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_half_is_measured(runs, images, tmp_path):
    """With data the rounded weights are measured, and those before; the card tells the change."""
    folder = tmp_path / 'out'
    assert main(['export', str(runs / 'reinforced'), str(folder), '--half', '--data', str(images)]) == 0
    told, before = (json.loads((folder / 'training' / name).read_text()) for name in ('results.json', 'float32.json'))
    again = validate(str(folder), images, workers=0)
    assert {key: told[key] for key in ('top1', 'loss', 'weights_sha256')} == {
        key: again[key] for key in ('top1', 'loss', 'weights_sha256')}
    assert before['weights_sha256'] != told['weights_sha256']
    assert f"({told['top1'] - before['top1']:+.2f} since)" in (folder / 'README.md').read_text()


@pytest.mark.parametrize(('change', 'message'), [
    ({'samples': 3}, 'its samples is 3'),
    ({'dataset': 'torch/mnist'}, 'its dataset is'),
    ({'training': None}, 'no training settings'),
    ({'training': {'lr': 9}}, 'trained with lr 9'),
    ({'training': {'dreal': {'enabled': True}}}, 'reinforced too'),
    ({'training': {'dreal': {'enabled': False, 'gates': 'open'}}}, r"trained with dreal.gates 'open', and not 'fresh'"),
])
def test_what_is_no_control(results, change, message):
    """A control was measured on the same images and trained with the same settings, plainly."""
    told, plain = (read_results(path) for path in results)
    check_control(told, plain)
    if isinstance(change.get('training'), dict):
        change = {'training': {**plain['training'], **change['training']}}
    with pytest.raises(ValueError, match=message):
        check_control(told, {**plain, **change})


def test_control_needs_results(runs, results, tmp_path, capsys):
    """A control alone is refused."""
    assert main(['export', str(runs / 'reinforced'), str(tmp_path / 'out'), '--control', str(results[1])]) == 2
    assert 'needs results' in capsys.readouterr().err


@pytest.mark.parametrize(('content', 'message'), [
    ('{', 'is no JSON'), ('[]', "has no 'architecture'"), ('{"architecture": "resnet18"}', "has no 'weights_sha256'")])
def test_broken_results(tmp_path, content, message):
    """A file that validate did not write is named."""
    (tmp_path / 'results.json').write_text(content)
    with pytest.raises(ValueError, match=message):
        read_results(tmp_path / 'results.json')


def test_eval_results(runs, results, images, tmp_path):
    """For a data set that the Hub knows there is a file in its format, listed in the checksums."""
    told = {**json.loads(results[0].read_text()), 'dataset': 'torch/fashion_mnist'}
    (tmp_path / 'results.json').write_text(json.dumps(told))
    folder = export_run(runs / 'reinforced', tmp_path / 'out', results=tmp_path / 'results.json')
    file, = (folder / '.eval_results').iterdir()
    entry, = yaml.safe_load(file.read_text())
    assert entry['dataset'] == {'id': 'zalando-datasets/fashion_mnist', 'task_id': 'top1'}
    assert entry['value'] == told['top1']
    assert f'.eval_results/{file.name}' in (folder / 'SHA256SUMS').read_text()


def test_digest(tmp_path):
    """The hash of a network is that of its file, whatever the order of names, and another after any change."""
    model = make_model()
    folder = export(model, tmp_path / 'out', data_config={'input_size': (3, 64, 64)})
    state = model.state_dict()
    digest = weights_digest(state)
    assert digest == weights_digest(load_file(folder / 'model.safetensors'))
    assert digest == weights_digest(dict(reversed(state.items())))
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-3
    assert digest != weights_digest(model.state_dict())
