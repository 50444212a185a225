"""`dreal-timm audit`: folders, resume, processes, and what can be wrong with models and images"""
import argparse
import copy
import csv
import dataclasses
import json
import os
import shutil
import subprocess
import sys

import pytest
import timm
import torch
from networks import make_model
from PIL import Image

from dreal_timm import DrealTask
from dreal_timm.attention.sites import find_sites, group_sites
from dreal_timm.audit import Audit, audit, audit_model, command, compare_audits, folder, load_critic
from dreal_timm.audit.images import NumberedImages
from dreal_timm.audit.settings import AuditSettings
from dreal_timm.audit.subject import load_subject, open_images
from dreal_timm.cli import main
from dreal_timm.hub import export, weights_digest

OPTIONS = {'workers': 0, 'device': 'cpu', 'resamples': 20, 'batch_size': 5}


def test_audit_of_a_run(run_folder, images, tmp_path, capsys):
    """The command writes all files; their numbers are those of the exported network and the best epoch's critic."""
    output = tmp_path / 'out'
    arguments = ['audit', str(run_folder), '--data', str(images), '--output', str(output), '--workers', '0']
    assert main([*arguments, '--device', 'cpu', '--resamples', '50', '--batch-size', '5']) == 0
    out = capsys.readouterr().out
    assert sorted(path.name for path in output.iterdir()) == [
        'audit.json', 'examples.safetensors', 'figures', 'maps.safetensors', 'report.html', 'samples.safetensors',
        'sites.csv']
    content = json.loads((output / 'audit.json').read_text())
    assert content['schema_version'] == 1
    assert content['provenance']['model'] == str(run_folder)
    assert content['provenance']['versions']['torch'] == torch.__version__
    with (output / 'sites.csv').open(newline='') as file:
        rows = list(csv.DictReader(file))
    assert [row['site'] for row in rows] == [row['site'] for row in content['sites']]
    assert float(rows[0]['reward']) == content['sites'][0]['reward']
    assert f"top-1 {content['network']['top1']:.2f} %" in out
    assert all(row['site'] in out for row in content['sites'])
    assert out.splitlines()[-1] == f'report {output}/report.html'

    model = timm.create_model(f'local-dir:{run_folder}/model', pretrained=True)
    found = open_images(model, str(images))
    batch = [found[number] for number in range(12)]
    pixels, target = torch.stack([item[0] for item in batch]), torch.tensor([item[1] for item in batch])
    loaded = Audit.load(output)
    critic = load_critic(run_folder / 'model_best.pth.tar', group_sites(find_sites(model)))
    expected = audit(model, [(pixels, target)], critic=critic)
    for name in ('log_p', 'mean_log_p', 'constant_log_p', 'quality'):
        torch.testing.assert_close(getattr(loaded, name), getattr(expected, name), rtol=0, atol=1e-5)
    assert content['network']['top1'] == pytest.approx(100 * (model.eval()(pixels).argmax(1) == target).float().mean())
    assert loaded.number.tolist() == list(range(12))


def test_top1_is_that_of_validate(run_folder, images, tmp_path, capsys):
    """The audit's top-1 is what `dreal-timm validate` measures."""
    model = str(run_folder / 'model')
    assert main(['validate', model, '--data', str(images), '--workers', '0', '--device', 'cpu', '--json']) == 0
    measured = json.loads(capsys.readouterr().out)
    found, summary = audit_model(model, str(images), tmp_path / 'out', **OPTIONS)
    assert summary['network']['top1'] == pytest.approx(measured['top1'])
    assert found.quality is None  # an exported network has no critic


def test_the_critic_is_the_best_epochs(run_folder, tmp_path):
    """The critic of a checkpoint has its weights; that of another network is an error; plain training has none."""
    checkpoint = torch.load(run_folder / 'model_best.pth.tar', weights_only=True)
    model = timm.create_model(f'local-dir:{run_folder}/model', pretrained=True)
    critic = load_critic(run_folder / 'model_best.pth.tar', group_sites(find_sites(model)))
    saved = checkpoint['task_state']['critic']
    assert critic.state_dict().keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in critic.state_dict().items())
    other = make_model('se')
    with pytest.raises(ValueError, match=r'judges .*layer1_channel'):
        load_critic(run_folder / 'model_best.pth.tar', group_sites(find_sites(other, (3, 64, 64))))
    torch.save({**checkpoint, 'args': argparse.Namespace(model='x')}, tmp_path / 'timm.pth.tar')  # as timm's script
    assert load_critic(tmp_path / 'timm.pth.tar', group_sites(find_sites(model))) is not None
    (tmp_path / 'broken.pth.tar').write_bytes(b'PK')
    with pytest.raises(ValueError, match='broken or no checkpoint'):
        load_critic(tmp_path / 'broken.pth.tar', group_sites(find_sites(model)))
    torch.save({'state_dict': checkpoint['state_dict']}, tmp_path / 'plain.pth.tar')
    assert load_critic(tmp_path / 'plain.pth.tar', group_sites(find_sites(model))) is None


@pytest.mark.parametrize('options', [{'cell': 'gru'}, {'hidden_size': 3, 'depth': 2}])
def test_critics_of_other_shapes(options, tmp_path):
    """Cell, hidden size and depth are read off the weights."""
    model = make_model('se')
    task = DrealTask(
        model, input_size=(3, 64, 64), verbose=False, **{f'critic_{key}': value for key, value in options.items()})
    torch.save({'task_state': task.get_task_state()}, tmp_path / 'last.pth.tar')
    critic = load_critic(tmp_path / 'last.pth.tar', task.groups)
    made = task.get_trainable_module().critic
    for name, module in critic.items():
        assert type(module.rnn) is type(made[name].rnn)
        assert (module.hidden_size, module.rnn.num_layers) == (made[name].hidden_size, made[name].rnn.num_layers)


class Stopped(Exception):
    pass


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of five images."""
    monkeypatch.setattr('dreal_timm.audit.parts._FEWEST', 5)
    monkeypatch.setattr('dreal_timm.audit.parts._PARTS', 100)


@pytest.mark.parametrize('stop', [2, 5])
def test_resume(run_folder, images, tmp_path, monkeypatch, small_parts, stop):
    """An audit that stops in either pass goes on with what is left, and ends where an uninterrupted one does."""
    whole, _ = audit_model(str(run_folder), str(images), tmp_path / 'whole', **OPTIONS)
    asked = []
    save = folder.Parts.save

    def stopping(self, phase, part, tensors):
        if len(asked) == stop:
            raise Stopped
        asked.append((phase, part))
        save(self, phase, part, tensors)

    monkeypatch.setattr(folder.Parts, 'save', stopping)
    with pytest.raises(Stopped):
        audit_model(str(run_folder), str(images), tmp_path / 'cut', **OPTIONS)
    assert not (tmp_path / 'cut' / 'audit.json').exists()
    with pytest.raises(FileExistsError, match='--resume'):
        audit_model(str(run_folder), str(images), tmp_path / 'cut', **OPTIONS)
    with pytest.raises(ValueError, match=r'another audit .*split'):
        audit_model(str(run_folder), str(images), tmp_path / 'cut', split='train', resume=True, **OPTIONS)
    monkeypatch.setattr(folder.Parts, 'save', lambda self, phase, part, tensors: (
        asked.append((phase, part)), save(self, phase, part, tensors)))
    resumed, _ = audit_model(str(run_folder), str(images), tmp_path / 'cut', resume=True, **OPTIONS)
    assert asked == [(phase, part) for phase in ('first', 'second') for part in range(3)]
    for name in ('number', 'target', 'log_p', 'mean_log_p', 'constant_log_p', 'quality'):
        assert torch.equal(getattr(resumed, name), getattr(whole, name)), name
    assert not (tmp_path / 'cut' / 'parts').exists()


def _halve(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def _flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 64
    path.write_bytes(content)


def _zero(path):
    content = path.read_bytes()
    path.write_bytes(content[:-40] + bytes(40))


@pytest.mark.parametrize('damage', [_halve, _flip, _zero, lambda path: path.write_bytes(b'')])
def test_a_broken_part_is_measured_again(run_folder, images, tmp_path, monkeypatch, small_parts, damage):
    """Parts that a crash or a disk broke are measured again, those alone, and the numbers are the same as before."""
    subject = load_subject(str(run_folder / 'model'))
    found = open_images(subject.model, str(images))
    again = AuditSettings(batch_size=5, workers=0, device='cpu')
    whole, _ = folder.audit_folder(subject, found, tmp_path, again)
    for name in ('first-000001', 'second-000002'):
        damage(tmp_path / 'parts' / f'{name}.safetensors')
    _halve(tmp_path / 'parts' / 'plan.json')
    saved = []
    save = folder.Parts.save
    monkeypatch.setattr(folder.Parts, 'save', lambda self, phase, part, tensors: (
        saved.append((phase, part)), save(self, phase, part, tensors)))
    resumed, _ = folder.audit_folder(subject, found, tmp_path, again)
    assert saved == [('first', 1), ('second', 2)]
    for name in ('number', 'target', 'log_p', 'mean_log_p', 'constant_log_p'):
        assert torch.equal(getattr(resumed, name), getattr(whole, name)), name
    for name in whole.names:
        assert torch.equal(resumed.maps[name].mean, whole.maps[name].mean)


def test_parts_of_another_plan_are_not_taken(run_folder, images, tmp_path, small_parts):
    """Where the plan is lost, parts of another network are not taken for this one's."""
    found, other = (load_subject(str(run_folder / 'model')) for _ in range(2))
    with torch.no_grad():
        other.model.fc.weight.mul_(2)
    other = dataclasses.replace(other, weights=weights_digest(other.model.state_dict()))
    data = open_images(found.model, str(images))
    again = AuditSettings(batch_size=5, workers=0, device='cpu')
    folder.audit_folder(other, data, tmp_path / 'one', again)
    (tmp_path / 'one' / 'parts' / 'plan.json').write_text('{')
    mixed, _ = folder.audit_folder(found, data, tmp_path / 'one', again)
    alone, _ = folder.audit_folder(found, data, tmp_path / 'two', again)
    assert torch.equal(mixed.log_p, alone.log_p)


def test_nothing_is_overwritten(run_folder, images, tmp_path):
    """A folder that exists is left alone: a finished audit, and one that holds something else."""
    audit_model(str(run_folder), str(images), tmp_path / 'out', **OPTIONS)
    before = {path: path.read_bytes() for path in (tmp_path / 'out').rglob('*') if path.is_file()}
    for resume in (False, True):
        with pytest.raises(FileExistsError, match='holds a finished audit'):
            audit_model(str(run_folder), str(images), tmp_path / 'out', resume=resume, **OPTIONS)
    assert before == {path: path.read_bytes() for path in (tmp_path / 'out').rglob('*') if path.is_file()}
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'thesis.txt').write_text('all of it')
    with pytest.raises(FileExistsError, match='not empty'):
        audit_model(str(run_folder), str(images), tmp_path / 'mine', resume=True, **OPTIONS)
    assert (tmp_path / 'mine' / 'thesis.txt').read_text() == 'all of it'


def test_two_processes(run_folder, images, tmp_path):
    """Two processes share the parts and come to the numbers of one."""
    audit_model(str(run_folder), str(images), tmp_path / 'one', **OPTIONS)
    code = (
        'import dreal_timm.audit.parts as parts; parts._FEWEST, parts._PARTS = 5, 100; '
        'import sys; from dreal_timm.cli import main; sys.exit(main(sys.argv[1:]))'
    )
    script = tmp_path / 'audit.py'
    script.write_text(code)
    arguments = ['audit', str(run_folder), '--data', str(images), '--output', str(tmp_path / 'two'), '--workers', '0']
    done = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', str(script),
         *arguments, '--device', 'cpu', '--resamples', '20', '--batch-size', '3'],
        capture_output=True, text=True, timeout=300, env={**os.environ, 'OMP_NUM_THREADS': '1'}, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('report ') == 1
    one, two = Audit.load(tmp_path / 'one'), Audit.load(tmp_path / 'two')
    assert two.provenance['processes'] == 2
    assert torch.equal(one.number, two.number)
    for name in ('log_p', 'mean_log_p', 'constant_log_p', 'quality'):
        torch.testing.assert_close(getattr(one, name), getattr(two, name), rtol=0, atol=1e-5)


def test_unreadable_images_are_named(run_folder, images, tmp_path, capsys):
    """Images that cannot be read are left out, named, and not counted for their neighbours."""
    broken = tmp_path / 'broken'
    shutil.copytree(images, broken)
    (broken / 'validation' / 'class1' / '2.png').write_bytes(b'not an image')
    (broken / 'validation' / 'class2' / '3.png').write_bytes(b'')
    model = str(run_folder / 'model')
    whole, _ = audit_model(model, str(images), tmp_path / 'whole', **OPTIONS)
    found, summary = audit_model(model, str(broken), tmp_path / 'out', **OPTIONS)
    left = [number for number in range(12) if number not in (6, 11)]
    assert found.number.tolist() == left
    assert found.unreadable == ['class1/2.png', 'class2/3.png']
    assert summary['network']['unreadable'] == 2
    torch.testing.assert_close(found.log_p, whole.log_p[left], rtol=0, atol=1e-5)
    assert 'class1/2.png' in (tmp_path / 'out' / 'report.html').read_text()


def test_no_image_can_be_read(run_folder, images, tmp_path, capsys):
    """A data set of broken images is an error in a line."""
    broken = tmp_path / 'broken'
    shutil.copytree(images, broken)
    for path in (broken / 'validation').rglob('*.png'):
        path.write_bytes(b'')
    arguments = ['audit', str(run_folder / 'model'), '--data', str(broken), '--output', str(tmp_path / 'out')]
    assert main([*arguments, '--workers', '0', '--device', 'cpu']) == 2
    assert len(capsys.readouterr().err.strip().splitlines()[-1]) < 300


def test_classes_by_name(images, tmp_path):
    """A network that knows names takes a data set of some of its classes; without names the numbers must agree."""
    model = make_model('se', num_classes=5, in_chans=1)
    data = {'input_size': (1, 32, 32), 'mean': (0.4,), 'std': (0.3,), 'crop_pct': 1.0}
    export(model, tmp_path / 'named', data, label_names=['class2', 'other', 'class0', 'class1', 'more'])
    found, _ = audit_model(str(tmp_path / 'named'), str(images), tmp_path / 'out', **OPTIONS)
    assert found.target.tolist() == [2] * 4 + [3] * 4 + [0] * 4
    export(model, tmp_path / 'nameless', data)
    with pytest.raises(ValueError, match=r'3 classes .*the model 5.*--class-map'):
        audit_model(str(tmp_path / 'nameless'), str(images), tmp_path / 'none', **OPTIONS)
    (tmp_path / 'map.txt').write_text('other\nclass1\nclass0\nclass2\nmore\n')
    found, _ = audit_model(
        str(tmp_path / 'nameless'), str(images), tmp_path / 'mapped', class_map=str(tmp_path / 'map.txt'), **OPTIONS)
    assert found.target.tolist() == [2] * 4 + [1] * 4 + [3] * 4


@pytest.mark.parametrize('named', [True, False])
def test_other_orders_of_the_classes_compare(images, tmp_path, named):
    """A network and the same one with its classes in another order differ in nothing, with names or a class map."""
    names = ['class2', 'x', 'y', 'class0', 'z', 'class1', 'v', 'w', 'u', 't']
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    assert order.tolist() != list(range(10))
    first = make_model('se', num_classes=10, in_chans=1)
    second = copy.deepcopy(first)
    with torch.no_grad():
        second.fc.weight.copy_(first.fc.weight[order])
        second.fc.bias.copy_(first.fc.bias[order])
    data = {'input_size': (1, 32, 32), 'mean': (0.4,), 'std': (0.3,), 'crop_pct': 1.0}
    audits = []
    for name, network, own in (('a', first, names), ('b', second, [names[index] for index in order])):
        export(network, tmp_path / name, data, label_names=own if named else None)
        (tmp_path / f'{name}.txt').write_text('\n'.join(own) + '\n')
        subject = load_subject(str(tmp_path / name))
        found = open_images(
            subject.model, str(images), class_map='' if named else str(tmp_path / f'{name}.txt'))
        audited, _ = folder.audit_folder(
            subject, found, tmp_path / f'{name}-audit', AuditSettings(batch_size=5, workers=0, device='cpu'))
        assert audited.target.tolist() == [own.index(f'class{label}') for label in (0, 1, 2) for _ in range(4)]
        audits.append(audited)
    assert audits[0].target.tolist() != audits[1].target.tolist()
    compared = compare_audits(*audits, resamples=10)
    assert {value for key, value in compared['network'].items()} == {0.0}
    for row in compared['sites']:
        assert {value for key, value in row.items() if key != 'site' and value == value} <= {0.0}, row
        assert row['log_likelihood_gain'] == 0.0
    assert len(compared['sites']) == len(audits[0].names) > 0
    swapped = {**audits[1].provenance, 'class_names': {
        str(output): f'class{(int(name[-1]) + 1) % 3}'
        for output, name in audits[1].provenance['class_names'].items() if name.startswith('class')}}
    with pytest.raises(ValueError, match='different classes'):
        compare_audits(audits[0], dataclasses.replace(audits[1], provenance=swapped))


def test_imagenet_is_known_by_synset(tmp_path):
    """Folders of a few synsets get the indices of ImageNet where the network has its classes."""
    for name in ('n01440764', 'n02102040', 'n03888257'):
        folder = tmp_path / 'validation' / name
        folder.mkdir(parents=True)
        Image.new('RGB', (32, 32), 'red').save(folder / 'a.png')
    model = timm.create_model('seresnet50.ra2_in1k')
    found = open_images(model, str(tmp_path))
    assert [found.dataset[i][1] for i in range(3)] == [0, 217, 701]


def test_an_empty_class(run_folder, images, tmp_path):
    """An empty folder shifts no labels: with names it is passed over, and its absence is an error without."""
    empty = tmp_path / 'empty'
    shutil.copytree(images, empty)
    (empty / 'validation' / 'another').mkdir()
    with pytest.raises(ValueError, match='no image of another'):
        audit_model(str(run_folder / 'model'), str(empty), tmp_path / 'out', **OPTIONS)


@pytest.mark.parametrize(('arguments', 'message'), [
    (['dreal_se_resnet18', '--data', 'DATA'], "'dreal_se_resnet18' has no published weights"),
    (['PLAIN', '--data', 'DATA'], 'ResNet has no attention site'),
    (['nowhere/model', '--data', 'DATA'], "No folder 'nowhere/model'"),
    (['MODEL', '--data', 'nowhere'], "no folder 'nowhere'"),
    (['MODEL', '--data', 'DATA', '--split', 'test'], "no folder 'test'"),
    (['MODEL', '--data', 'DATA', '--sites', 'layer7'], "No attention site 'layer7'"),
    (['MODEL', '--data', 'DATA', '--num-samples', '0'], 'num_samples must be 1 or more'),
    (['MODEL', '--data', 'DATA', '--batch-size', '0'], 'batch_size must be 1 or more'),
    (['MODEL', '--data', 'DATA', '--dataset', 'wrong/kind'], 'expected kind/name'),
])
def test_errors_are_a_line(run_folder, images, tmp_path, capsys, arguments, message):
    """What a user gets wrong is told in a line, and leaves no folder behind."""
    known = {'MODEL': str(run_folder / 'model'), 'DATA': str(images), 'PLAIN': str(tmp_path / 'plain')}
    if 'PLAIN' in arguments:
        export(timm.create_model('test_resnet', num_classes=3, in_chans=1), tmp_path / 'plain', {
            'input_size': (1, 32, 32), 'mean': (0.4,), 'std': (0.3,), 'crop_pct': 1.0}, ['class0', 'class1', 'class2'])
    output = tmp_path / 'out'
    words = [known.get(word, word) for word in arguments]
    assert main(['audit', *words, '--output', str(output), '--device', 'cpu', '--workers', '0']) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1
    assert message in errors[0]
    assert not output.exists()


@pytest.mark.parametrize('kind', ['plain', 'embedding'])
def test_a_network_that_cannot_be_audited(images, tmp_path, capsys, kind):
    """Without sites, or without classes: one short line that names the network, before anything is measured."""
    data = {'input_size': (1, 32, 32), 'mean': (0.4,), 'std': (0.3,), 'crop_pct': 1.0}
    names = ['class0', 'class1', 'class2']
    export(make_model('se', num_classes=3, in_chans=1), tmp_path / 'good', data, names)
    if kind == 'plain':
        export(timm.create_model('test_resnet', num_classes=3, in_chans=1), tmp_path / 'bad', data, names)
    else:
        export(make_model('se', num_classes=0, in_chans=1), tmp_path / 'bad', data)
    good, bad = str(tmp_path / 'good'), str(tmp_path / 'bad')
    for command_line in (['audit', bad], ['compare', bad, good], ['compare', good, bad]):
        output = tmp_path / 'out'
        assert main([*command_line, '--data', str(images), '--output', str(output), '--workers', '0']) == 2
        errors = capsys.readouterr().err.strip().splitlines()
        assert len(errors) == 1
        assert len(errors[0]) < 500 + len(bad)
        assert bad in errors[0]
        assert not output.exists()
    if kind == 'plain':
        assert main(['inspect', bad]) == 1
        told = capsys.readouterr()
        assert told.out == ''
        assert len(told.err.strip().splitlines()) == 1
        assert len(told.err) < 500


def test_a_stream_is_refused():
    """Streams have no numbered images."""
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(())

    with pytest.raises(ValueError, match='a stream'):
        NumberedImages(Stream(), {})


def test_weights_tell_networks_apart(run_folder):
    """The digest is that of the weights: equal for equal ones, another after a change of one number."""
    first, second = (load_subject(str(run_folder / 'model')) for _ in range(2))
    assert first.weights == second.weights
    assert load_subject(str(run_folder)).weights == first.weights
    with torch.no_grad():
        second.model.conv1[0].weight.view(-1)[0] += 1
    assert weights_digest(second.model.state_dict()) != first.weights


def test_weights_are_those_of_the_card(run_folder, images, tmp_path):
    """The audit names its network by the digest that validate writes for the card, of a run and of its exports."""
    from dreal_timm.train.validate import validate
    half = tmp_path / 'half'
    model = timm.create_model(f'local-dir:{run_folder}/model', pretrained=True)
    export(model, half, label_names=['class0', 'class1', 'class2'], half=True)
    for source, exported in ((run_folder, run_folder / 'model'), (half, half)):
        measured = validate(str(exported), images, workers=0, device='cpu')
        assert load_subject(str(source)).weights == measured['weights_sha256']


@pytest.fixture(scope='module')
def averaged(tmp_path_factory):
    """The folder of a run with a moving average, and its task: weights and critics, averaged and not, all differ."""
    folder = tmp_path_factory.mktemp('averaged')
    model = make_model('se', num_classes=3, in_chans=1)
    task = DrealTask(model, input_size=(1, 32, 32), verbose=False, actor_weight=1.0)
    task.setup_ema(decay=0.5)
    trainable = task.get_trainable_module()
    trainable.train()
    optimizer = torch.optim.SGD(trainable.parameters(), lr=0.3)
    pixels, target = torch.randn(6, 1, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3
    for _ in range(4):
        optimizer.zero_grad()
        task(pixels, target)['loss'].backward()
        optimizer.step()
        task.update_ema()
    torch.save(
        {**task.get_checkpoint_state(), **task.get_checkpoint_state(ema=True)}, folder / 'model_best.pth.tar')
    (folder / 'args.yaml').write_text('model_ema: true\n')
    return folder, task


@pytest.mark.parametrize('half', [False, True])
@pytest.mark.parametrize('ema', [False, True])
def test_averaged_weights_have_the_averaged_critic(averaged, tmp_path, ema, half):
    """The network that a run exported is judged by the critic of its own weights: their average's, or the other."""
    source, task = averaged
    run = tmp_path / 'run'
    shutil.copytree(source, run)
    network = task.get_eval_model(ema=ema)
    data = {'input_size': (1, 32, 32), 'mean': (0.4,), 'std': (0.3,), 'crop_pct': 1.0}
    export(network, run / 'model', data, label_names=['a', 'b', 'c'], half=half)
    subject = load_subject(str(run))
    wanted = task.get_task_state(ema=ema)['critic']
    other = task.get_task_state(ema=not ema)['critic']
    found = subject.critic.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())
    assert not all(torch.equal(tensor, other[name]) for name, tensor in found.items())
    if half:
        return
    pixels, target = torch.randn(5, 1, 32, 32, generator=torch.Generator().manual_seed(1)), torch.arange(5) % 3
    audited = audit(subject.model, [(pixels, target)], critic=subject.critic)
    trainable = task.get_trainable_module(ema=ema)
    trainable = getattr(trainable, 'module', trainable).eval()
    with torch.no_grad():
        expected = trainable(pixels).critic_quality
    order = [site.name for group in task.groups for site in group.sites]
    columns = [order.index(name) for name in audited.names]
    torch.testing.assert_close(audited.quality, expected[:, columns], rtol=0, atol=1e-6)


def test_a_checkpoint_has_the_critic_of_what_timm_loads(averaged, tmp_path, caplog):
    """timm loads the average of a checkpoint that has one; of another network's weights there is no critic, said."""
    source, task = averaged
    run = tmp_path / 'run'
    shutil.copytree(source, run)
    data = {'input_size': (1, 32, 32), 'mean': (0.4,), 'std': (0.3,), 'crop_pct': 1.0}
    export(make_model('se', seed=5, num_classes=3, in_chans=1), run / 'model', data, label_names=['a', 'b', 'c'])
    best = str(run / 'model_best.pth.tar')
    content = torch.load(best, weights_only=True)
    raw = str(tmp_path / 'raw.pth.tar')
    torch.save({key: value for key, value in content.items() if not key.endswith('_ema')}, raw)
    odd = str(tmp_path / 'odd.pth.tar')
    torch.save({key: value for key, value in content.items() if key != 'task_state_ema'}, odd)
    for checkpoint, ema in ((best, True), (raw, False)):
        subject = load_subject(str(run), checkpoint)
        loaded = task.get_eval_model(ema=ema).state_dict()
        assert all(torch.equal(tensor, loaded[name]) for name, tensor in subject.model.state_dict().items())
        wanted = task.get_task_state(ema=ema)['critic']
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in subject.critic.state_dict().items())
    caplog.clear()
    for checkpoint in ('', odd):  # the run's folder holds another network by now; the average has no critic
        subject = load_subject(str(run), checkpoint)
        assert subject.critic is None
        assert subject.checkpoint == checkpoint
    assert len([record for record in caplog.records if 'No critic' in record.message]) == 2


def test_some_of_the_images(run_folder, images, tmp_path):
    """--num-samples draws images; the numbers are those of the same images in the whole audit."""
    model = str(run_folder / 'model')
    whole, _ = audit_model(model, str(images), tmp_path / 'whole', **OPTIONS)
    some, _ = audit_model(model, str(images), tmp_path / 'some', num_samples=7, sites=['layer2'], **OPTIONS)
    assert len(some.number) == 7
    columns = [whole.column(name) for name in some.names]
    assert some.names == ['layer2.0.se.channel', 'layer2.0.se.spatial']
    torch.testing.assert_close(some.mean_log_p, whole.mean_log_p[some.number][:, columns], rtol=0, atol=1e-5)


def test_check_output_is_the_first_processes(tmp_path, monkeypatch):
    """Other processes do not look: the first may have made the folder already."""
    (tmp_path / 'audit.json').write_text('{}')
    monkeypatch.setenv('RANK', '1')
    command.check_output(tmp_path, resume=False)
    monkeypatch.setenv('RANK', '0')
    with pytest.raises(FileExistsError):
        command.check_output(tmp_path, resume=False)
