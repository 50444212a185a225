"""Releases: what the table says of the weights is so, and what timm loads by their name is what was released"""
import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

import dreal_timm.models.dreal_resnet as dreal_resnet
import dreal_timm.models.releases as releases
from dreal_timm.cli import main
from dreal_timm.hub import load, write_card
from dreal_timm.hub.folder import check_folder

ROOT = Path(__file__).parents[2]
STAGED = [release for release in releases.RELEASES if release.file.is_file()]
each_staged = pytest.mark.parametrize('release', STAGED, ids=lambda release: release.name)


def test_every_folder_stands_in_the_table():
    """Folders of hub_cards are those of the table, at least one, and take 100 MB together at most."""
    folders = {path.name for path in (ROOT / 'hub_cards').iterdir() if path.is_dir() and path.name != '__pycache__'}
    assert folders == {release.name for release in STAGED}
    assert folders
    files = [path for name in folders for path in (ROOT / 'hub_cards' / name).rglob('*')]
    assert sum(path.stat().st_size for path in files if path.is_file()) < 100e6


@each_staged
def test_what_the_table_says(release):
    """Hash, metrics, licence and preprocessing are those of the folder, all of whose files are what was exported."""
    folder = release.file.parent
    check_folder(folder, everything=True)
    assert hashlib.sha256(release.file.read_bytes()).hexdigest() == release.sha256
    results = json.loads((folder / 'training' / 'results.json').read_text())
    assert release.metrics == {key: results[key] for key in ('top1', 'top5')}
    config = json.loads((folder / 'config.json').read_text())
    cfg = timm.get_pretrained_cfg(release.name)
    for key in ('input_size', 'interpolation', 'crop_pct', 'mean', 'std', 'num_classes', 'first_conv', 'classifier',
                'license', 'crop_mode'):
        expected = config['pretrained_cfg'][key]
        assert getattr(cfg, key) == (tuple(expected) if isinstance(expected, list) else expected), key
    assert list(cfg.label_names) == config['label_names']
    assert release.license == config['pretrained_cfg']['license']
    assert f'licence of the data | {release.data_license} |' in (folder / 'README.md').read_text()
    document = (ROOT / 'docs' / 'hub.md').read_text()
    row = next(line for line in document.splitlines() if line.startswith(f'| `{release.name}`'))
    control = json.loads((folder / 'training' / 'control.json').read_text())
    assert f"| {results['top1']:.2f} | {control['top1']:.2f} |" in row
    assert release.tag.startswith('dreal_')
    assert bool(release.hub_id) == bool(re.fullmatch('[0-9a-f]{40}', release.revision))


@each_staged
def test_the_card_is_what_the_template_makes(release, tmp_path):
    """Nothing in a card was written by hand."""
    folder = shutil.copytree(release.file.parent, tmp_path / 'copy')
    (folder / 'README.md').unlink()
    write_card(folder)
    assert (folder / 'README.md').read_text() == (release.file.parent / 'README.md').read_text()


@each_staged
def test_timm_loads_it_by_its_name(release):
    """pretrained=True gives the released weights, in float32, and repeats the logits beside them, with no network."""
    code = (
        'import sys, timm, torch, dreal_timm\n'
        'from safetensors.torch import load_file\n'
        'model = timm.create_model(sys.argv[1], pretrained=True).eval()\n'
        'expected = load_file(sys.argv[2])\n'
        'with torch.no_grad():\n'
        '    torch.testing.assert_close(model(expected["input"]), expected["output"], rtol=1e-4, atol=1e-5)\n'
    )
    tensors = release.file.parent / 'test' / 'rand_tensors.safetensors'
    subprocess.run(
        [sys.executable, '-c', code, release.name, str(tensors)], check=True, cwd=ROOT, env={'HF_HUB_OFFLINE': '1'})
    weights = load_file(release.file)
    for model in (timm.create_model(release.name, pretrained=True), load(release.name)):
        assert model.pretrained_cfg['tag'] == release.tag
        assert all(torch.equal(tensor, weights[name].to(tensor.dtype)) for name, tensor in model.state_dict().items())
    other = timm.create_model(release.name, pretrained=True, num_classes=3, in_chans=3)
    assert (other.fc.out_features, other.conv1.in_channels) == (3, 3)
    assert torch.equal(other.layer1[0].se.fc1.weight, weights['layer1.0.se.fc1.weight'].float())


@each_staged
def test_no_release_on_small_data_is_a_default(release):
    """The model's name alone keeps its ImageNet classifier, and asks for weights in vain."""
    assert timm.get_pretrained_cfg(release.model).tag == 'untrained'
    assert timm.create_model(release.model, device='meta').fc.out_features == 1000
    with pytest.raises(RuntimeError, match=f'No pretrained weights exist for {release.model} here.*{release.name}'):
        timm.create_model(release.model, pretrained=True)


def test_weights_that_were_changed(tmp_path, monkeypatch, capsys):
    """A file that is not the released one is refused, by timm's own function and by the commands."""
    release = STAGED[0]
    monkeypatch.setattr(releases, '_STAGED', tmp_path)
    source = ROOT / 'hub_cards' / release.name
    shutil.copytree(source, tmp_path / release.name)
    content = bytearray(release.file.read_bytes())
    content[-1] ^= 1
    release.file.write_bytes(content)
    with pytest.raises(RuntimeError, match='wrong SHA-256, it is not what was released'):
        timm.create_model(release.name, pretrained=True)
    assert main(['validate', release.name, '--data', str(tmp_path)]) == 2
    assert 'wrong SHA-256' in capsys.readouterr().err


def test_a_release_that_is_not_there(tmp_path, monkeypatch):
    """Without the folder and without a repository, the error says where the weights are."""
    release = STAGED[0]
    monkeypatch.setattr(releases, '_STAGED', tmp_path)
    assert release.source() == {}
    cfg = timm.get_pretrained_cfg(release.name)
    monkeypatch.setattr(cfg, 'file', None)
    with pytest.raises(RuntimeError, match=r'are in a clone of dreal_timm \(hub_cards/\), and not published yet'):
        dreal_resnet.dreal_se_resnet18(pretrained=True, pretrained_cfg=cfg)


def test_a_release_on_the_hub(tmp_path, monkeypatch):
    """Where the folder is missing, timm is sent to the commit that the table names."""
    monkeypatch.setattr(releases, '_STAGED', tmp_path)
    release = dataclasses.replace(STAGED[0], hub_id='user/network', revision='0' * 40)
    assert release.source() == {'hf_hub_id': f"user/network@{'0' * 40}"}
