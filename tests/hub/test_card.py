"""Cards: what they tell was measured of these weights"""
import json
import re
import shutil
import statistics
from contextlib import nullcontext
from html.parser import HTMLParser
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
from dreal_timm.hub.card import write_card
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
    ({'training': {'dreal': {'enabled': False, 'start': {'gates': 'open'}}}},
     r"trained with dreal.start.gates 'open', and not 'fresh'"),
])
def test_what_is_no_control(results, change, message):
    """A control was measured on the same images and trained with the same settings, plainly."""
    told, plain = (read_results(path) for path in results)
    check_control(told, plain)
    if isinstance(change.get('training'), dict):
        change = {'training': {**plain['training'], **change['training']}}
    with pytest.raises(ValueError, match=message):
        check_control(told, {**plain, **change})


@pytest.mark.parametrize(('own', 'others', 'same'), [
    ({'lr': [0.1, 0.2]}, {}, False), ({}, {'lr': [0.1, 0.2]}, False), ({'lr': [0.1, 0.2]}, {'lr': [0.1, 0.3]}, False),
    ({'lr': [0.1, 0.2]}, {'lr': [0.1, 0.2]}, True), ({'dreal.gamma': [1, 2], 'workers': [1, 2]}, {}, True),
])
def test_a_control_changed_as_the_network_did(results, own, others, same):
    """A run that went on with other settings has a control that did so from the same epoch on."""
    told, plain = (read_results(path) for path in results)
    for found, settings in ((told, own), (plain, others)):
        found['run'] = {'changes': [{'epoch': 1, 'settings': settings}]} if settings else None
    with nullcontext() if same else pytest.raises(ValueError, match='settings changed'):
        check_control(told, plain)


def test_a_card_tells_changed_settings(runs, tmp_path):
    """The card says from which epoch on which settings were others, up to the epoch that is exported."""
    source = shutil.copytree(runs / 'reinforced', tmp_path / 'run')
    record = json.loads((source / 'run.json').read_text())
    record['changes'] = [
        {'epoch': 0, 'settings': {'lr': [0.05, 0.01]}}, {'epoch': 40, 'settings': {'momentum': [0.9, 0.5]}}]
    (source / 'run.json').write_text(json.dumps(record))
    export_run(source, tmp_path / 'out')
    text = (tmp_path / 'out' / 'README.md').read_text()
    assert 'From epoch 1 on `lr` `0.01` (before `0.05`).' in text
    assert 'momentum` `0.5`' not in text


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


HOSTILE = (
    '<img src=x onerror=alert(1)>', '[here](http://127.0.0.1/a)', 'a | b | c', '`` ` x', '*a* __b__ ~~c~~',
    'a\n\n# b\n---\n', '![x](y)', 'https://127.0.0.1/a', 'www.example.org', 'mail@example.org', '\x1b[31mred',
    '\u202eltr', '&lt;b&gt;', '$x$', '#1', '{{ 7 * 7 }}', '{% raw %}', 'a\x00b', "': x", '\\[a](b)', 'x' * 5000)


class Tags(HTMLParser):
    """The tags of a text."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append(tag)


def told_card(folder, text):
    """The card of a folder where whatever a file can say is this text, and its front matter."""
    training = folder / 'training'
    training.mkdir(exist_ok=True)
    record = {
        'versions': {text: text}, 'commit': text, 'epochs': [{'epoch': 0, 'seconds': 1.5, 'device': text}],
        'changes': [{'epoch': 1, 'settings': {f'dreal.{text}': [text, text]}}]}
    results = {
        'dataset': f'hfds/{text}', 'split': text, 'samples': 40, 'loss': 1.5, 'top1': 25.0, 'top5': 75.0,
        'architecture': 'test_resnet', 'weights_sha256': weights_digest(load_file(folder / 'model.safetensors')),
        'versions': {text: text}, 'settings': {text: text}, 'training': {'opt': text, 'dreal': {'enabled': True}}}
    control = results | {'training': {'opt': text, 'dreal': {'enabled': False}}, 'run': record}
    told = {
        'results.json': results, 'control.json': control, 'float32.json': results, 'run.json': record,
        'checkpoint.json': {'epoch': 4, 'weights': 'raw'}}
    for name, value in told.items():
        (training / name).write_text(json.dumps(value))
    (training / 'args.yaml').write_text(yaml.safe_dump({
        'dataset': text, 'opt': text, 'aa': text, 'lr': [text], 'sched': {text: text},
        'dreal': {'probe': text, 'start': {'backbone': text}}}))
    config = json.loads((folder / 'config.json').read_text())
    config['pretrained_cfg']['license'] = text
    (folder / 'config.json').write_text(json.dumps(config))
    write_card(folder)
    card = (folder / 'README.md').read_text()
    head, body = card.removeprefix('---\n').split('\n---\n', 1)
    return yaml.safe_load(head), body


@pytest.fixture(scope='module')
def plain_folder(tmp_path_factory):
    return export(make_model(), tmp_path_factory.mktemp('plain') / 'net', data_config={'input_size': (3, 64, 64)})


@pytest.mark.parametrize('text', HOSTILE)
def test_values_of_files_are_text(plain_folder, tmp_path, text):
    """What files say adds no line, cell, tag, link, span of code or control character to a card; YAML gives it back."""
    head, expected = told_card(shutil.copytree(plain_folder, tmp_path / 'plain'), 'abc')
    hostile, body = told_card(shutil.copytree(plain_folder, tmp_path / 'hostile'), text)
    lines, wanted = body.splitlines(), expected.splitlines()
    assert len(lines) == len(wanted)
    assert Tags(body).found == Tags(expected).found == []
    for line, other in zip(lines, wanted, strict=True):
        assert line.isprintable()
        shown = re.sub(r'\\[!-/:-@\[-`{-~]', '', line)  # without what is escaped,
        outside = re.sub(r'`[^`]*`', '', shown)  # and without spans of code
        assert shown.count('|') == other.count('|')
        if line != other:
            assert not re.search(r'[\[\]*~`$]|://|www\.|@|^#[^ ]|\b_|_\b', outside), line
    assert hostile.keys() - {'datasets'} == head.keys() - {'datasets'}
    entry, = hostile['model-index']
    shown = ' '.join(text[:300].split())
    found = entry['results'][0]['dataset']['split']
    assert found == ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in shown)
    assert hostile['license'] == found


@pytest.mark.parametrize('change', [
    {'top1': float('nan')}, {'top1': float('inf')}, {'top1': '90'}, {'top1': 101.0}, {'top5': -1.0}, {'top1': True},
    {'loss': float('nan')}, {'loss': 10 ** 400}, {'samples': 0}, {'samples': True}, {'samples': 4.5}, {'versions': 'x'},
    {'run': {'epochs': [{'seconds': 'x', 'device': 'cpu'}]}}, {'run': {'epochs': [{'seconds': float('nan')}]}},
    {'run': {'changes': 3}}, {'run': {'changes': [{'epoch': 0}]}},
    {'run': {'changes': [{'epoch': 0, 'settings': {'a': 1}}]}},
    {'run': []}, {'training': {'dreal': 'x'}}, {'training': [1]}, {'settings': 'x'}, {'mAP': 50.0, 'rank1': 50.0},
])
def test_results_that_are_no_numbers(plain_folder, tmp_path, change):
    """A result that is no number, or a record that no run writes, is refused by its file: no card tells it."""
    folder = shutil.copytree(plain_folder, tmp_path / 'net')
    told_card(folder, 'abc')
    before = (folder / 'README.md').read_bytes()
    file = folder / 'training' / 'results.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=re.escape(str(file))):
        write_card(folder)
    assert (folder / 'README.md').read_bytes() == before


@pytest.mark.parametrize(('name', 'content'), [
    ('float32.json', '{"top1": "x"}'), ('checkpoint.json', '{"epoch": "x", "weights": "raw"}'),
    ('checkpoint.json', '{"epoch": 1, "weights": "<b>"}'), ('checkpoint.json', '[]'), ('run.json', '{"epochs": 7}'),
    ('args.yaml', 'dreal: [1]'), ('args.yaml', 'a: &a {x: 1}\nb: {<<: *a}'), ('args.yaml', 'a: ['), ('run.json', '{'),
])
def test_files_that_no_run_writes(plain_folder, tmp_path, name, content):
    """A broken file beside the network is an error that names it."""
    folder = shutil.copytree(plain_folder, tmp_path / 'net')
    told_card(folder, 'abc')
    (folder / 'training' / name).write_text(content)
    with pytest.raises(ValueError, match=name):
        write_card(folder)
