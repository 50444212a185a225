import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm

import dreal_timm
from dreal_timm import DrealTask, find_sites
from dreal_timm.cli import main
from dreal_timm.hub import export


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data') / 'digits'
    assert main(['data', 'digits', str(folder)]) == 0
    return folder


SMALL = ['model=test_resnet', 'model_kwargs.block_args={attn_layer: cbam}', 'epochs=1', 'device=cpu']


def test_train_and_validate(digits, tmp_path, capsys):
    """One command trains and says the accuracy, the folder and the line that loads it; another one validates."""
    output = [f'data_dir={digits}', f'output={tmp_path}', 'experiment=run']
    assert main(['train', 'quickstart', *SMALL, *output]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith('top-1 accuracy ')
    assert lines[1] == f'exported model {tmp_path}/run/model'
    code = lines[2].removeprefix('load it with   ')
    subprocess.run([sys.executable, '-c', f'{code}; assert model.num_classes == 10'], check=True)
    results = tmp_path / 'results.json'
    assert main([
        'validate', f'{tmp_path}/run/model', '--data', str(digits), '--workers', '0', '--device', 'cpu',
        '--results', str(results), '--json',
    ]) == 0
    measured = json.loads(results.read_text())
    assert measured == json.loads(capsys.readouterr().out)
    assert f"top-1 accuracy {measured['top1']:.2f} %" in lines[0]
    assert measured['samples'] == 355


def test_inspect(capsys, tmp_path):
    """A table of sites: parameters add up, groups and critics are those of the task; JSON says the same."""
    assert main(['inspect', 'test_resnet', 'block_args={attn_layer: cbam}', '--input-size', '3', '64', '64']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ['site', 'class', 'kind', 'map', 'group', 'parameters', 'critic']
    assert lines[2].split() == [
        'layer1.0.se.spatial', 'SpatialAttn', 'spatial', '16', 'x', '16', 'layer1_spatial', '100', '2,060']
    options = ['test_resnet', 'num_classes=4', 'block_args={attn_layer: cbam}']
    assert main(['inspect', *options, '--input-size', '3', '64', '64', '--json']) == 0
    rows = json.loads(capsys.readouterr().out)
    model = timm.create_model('test_resnet', num_classes=4, block_args={'attn_layer': 'cbam'})
    task = DrealTask(model, verbose=False, input_size=(3, 64, 64))
    assert [row['site'] for row in rows] == [site.name for site in find_sites(model, (3, 64, 64))]
    assert sum(row['parameters'] for row in rows) == sum(
        p.numel() for name, p in model.named_parameters() if '.se.' in name)
    critics = {row['group']: row['critic'] for row in rows}
    assert critics == {name: sum(p.numel() for p in c.parameters()) for name, c in task._trainable.critic.items()}
    assert lines[-1] == f'{len(rows)} sites in {len(critics)} groups; critics: {sum(critics.values()):,} parameters'
    export(timm.create_model('dreal_se_resnet18', num_classes=3), tmp_path / 'model')
    assert main(['inspect', str(tmp_path / 'model')]) == 0
    assert 'layer4.1.se' in capsys.readouterr().out


def test_inspect_without_sites(capsys):
    """A network without attention: exit code 1 and a hint."""
    assert main(['inspect', 'test_resnet']) == 1
    captured = capsys.readouterr()
    assert captured.out == ''
    assert 'no attention site' in captured.err and 'register_attention' in captured.err


@pytest.mark.parametrize(('arguments', 'message'), [
    (['inspect', 'resnet18', 'attn_layer'], "Expected OPTION=VALUE, got 'attn_layer'"),
    (['inspect', 'resnett18'], 'did you mean'),
    (['train', 'quikstart'], "did you mean 'quickstart'"),
    (['train', 'quickstart', 'modell=x'], "Unknown key 'modell' (did you mean 'model'?)"),
    (['train', 'quickstart', 'model=dreal_se_resnet19'], "Unknown model 'dreal_se_resnet19' (did you mean"),
    (['train', 'quickstart', 'model=resnet18'], 'no attention site'),
    (['train', 'quickstart', 'data_dir=/nowhere'], "no folder '/nowhere'"),
    (['train', 'quickstart', 'epochs=few'], "epochs: expected a whole number, got 'few'"),
    (['train', 'quickstart', 'epochs'], 'Expected key=value'),
    (['train', 'quickstart', 'dreal.probe=guess'], "dreal.probe: expected one of 'exact', 'split', 'taylor'"),
    (['validate', '/nowhere/at/all', '--data', '.'], "No folder '/nowhere/at/all'"),
    (['recipes', '--copy', 'nothing'], "No recipe 'nothing'"),
    (['train', 'quickstart', 'aa=foo'], 'AssertionError'),
    (['validate', 'x', '--data', '.', '--results', '/nowhere/x.json'], '--results'),
])
def test_errors_are_one_line(digits, arguments, message, capsys, tmp_path, monkeypatch):
    """Wrong input gets one line and exit code 2, no traceback, and leaves no file."""
    monkeypatch.chdir(tmp_path)
    if arguments[0] == 'train' and not any(a.startswith('data_dir') for a in arguments):
        arguments = [*arguments[:2], f'data_dir={digits}', *arguments[2:]]
    assert main(arguments) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if 'error' in line]
    assert len(error) == 1
    assert message in error[0]
    assert error[0].startswith(f'dreal-timm {arguments[0]}: error: ')
    assert not list(tmp_path.iterdir())


def test_existing_data_is_not_overwritten(digits, capsys):
    """Preparing a data set twice is an error of one line."""
    assert main(['data', 'digits', str(digits)]) == 2
    assert 'exists' in capsys.readouterr().err


def test_debug_shows_the_traceback():
    """--debug raises."""
    with pytest.raises(FileNotFoundError):
        main(['--debug', 'train', 'nothing'])


def test_recipes_are_listed_and_copied(tmp_path, capsys):
    """Recipes are listed with their titles; a copy is the file itself, and does not overwrite."""
    assert main(['recipes']) == 0
    listed = capsys.readouterr().out.splitlines()
    assert any(line.startswith('quickstart ') and 'digits' in line for line in listed)
    assert main(['recipes', '--copy', 'quickstart', '--to', str(tmp_path)]) == 0
    copied = tmp_path / 'quickstart.yaml'
    assert copied.read_text().startswith('# Reinforced SE-ResNet-18')
    assert main(['recipes', '--copy', 'quickstart', '--to', str(tmp_path)]) == 2
    capsys.readouterr()
    assert main(['recipes', '--keys']) == 0
    keys = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert {'epochs', 'dreal.gamma'} <= set(keys)
    assert ' 300 ' in keys['epochs']


@pytest.mark.parametrize('arguments', [[], ['fly'], ['train'], ['data', 'imagenet', 'x'], ['validate', 'x']])
def test_usage(arguments, capsys):
    """An incomplete command shows its usage and exits with 2."""
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert 'usage' in capsys.readouterr().err


def test_no_traceback_from_a_process(tmp_path):
    """The same holds for the installed program."""
    process = subprocess.run(
        [sys.executable, '-m', 'dreal_timm', 'train', 'nothing'], capture_output=True, text=True,
        cwd=Path(dreal_timm.__file__).parent.parent,
    )
    assert process.returncode == 2
    assert 'Traceback' not in process.stderr
    assert len(process.stderr.strip().splitlines()) == 1


def test_version(capsys):
    """--version prints the version of the package."""
    with pytest.raises(SystemExit):
        main(['--version'])
    assert capsys.readouterr().out.strip() == f'dreal_timm {dreal_timm.__version__}'
