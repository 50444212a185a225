"""Push and pull against a Hub on loopback that the unmodified client talks to"""
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
import timm
import torch
from fake_hub import TOKEN
from huggingface_hub import constants
from networks import make_model
from safetensors.torch import load_file
from timm.models import _registry

from dreal_timm.cli import main
from dreal_timm.errors import WeightsError
from dreal_timm.hub import export, load, prepare, push
from dreal_timm.hub.folder import checksums

NAME = 'user/network'


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """A small exported network with SE."""
    return export(make_model(), tmp_path_factory.mktemp('exported') / 'net', data_config={'input_size': (3, 64, 64)})


@pytest.fixture
def folder(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / 'net')


def equal(model, folder):
    expected = load_file(folder / 'model.safetensors')
    return all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def forget(tmp_path):
    shutil.rmtree(tmp_path / 'cache', ignore_errors=True)


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_another_process_loads_what_was_pushed(hub, folder, tmp_path, capsys):
    """timm alone, in another process with another cache, gets the same weights and logits; no token went astray."""
    assert main(['push', str(folder), NAME, '--tag', 'v1', '--private']) == 0
    out = capsys.readouterr()
    assert out.out.startswith(f'sent: {hub.url}/{NAME}/commit/') and TOKEN not in out.out + out.err
    repo = hub.repositories[NAME]
    assert repo.private and len(repo.commits) == 2 and repo.tags['v1'] == repo.refs['main']
    assert {path: content for path, content in repo.commits[-1][1].items() if path != '.gitattributes'} == {
        path.relative_to(folder).as_posix(): path.read_bytes().replace(b'hf-hub:USER/NAME', f'hf-hub:{NAME}'.encode())
        for path in folder.rglob('*') if path.is_file()}
    code = (
        'import sys, timm, torch\n'
        'from safetensors.torch import load_file\n'
        f'model = timm.create_model("hf-hub:{NAME}", pretrained=True).eval()\n'
        'expected = load_file(sys.argv[1] + "/model.safetensors")\n'
        'assert all(torch.equal(t, expected[n]) for n, t in model.state_dict().items())\n'
        'test = load_file(sys.argv[1] + "/test/rand_tensors.safetensors")\n'
        'torch.testing.assert_close(model(test["input"]), test["output"])\n'
    )
    subprocess.run([sys.executable, '-c', code, str(folder)], check=True, timeout=120,
                   env=os.environ | hub.environment(tmp_path / 'other'))
    assert not [headers for origin, *_, headers in hub.requests if origin == 'lfs' and 'Authorization' in headers]
    assert not [path for *_, path, headers in hub.requests if TOKEN in path]


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_a_second_push_is_no_commit(hub, folder):
    """Nothing has changed: no commit and no upload; an edited card alone is sent alone."""
    first = push(folder, NAME)
    assert first.changed
    uploads = hub.calls('PUT')
    again = push(folder, NAME)
    assert not again.changed and again.revision == first.revision
    (folder / 'README.md').write_text('---\nlibrary_name: timm\n---\n# Edited\n')
    third = push(folder, NAME)
    assert third.changed and len(hub.repositories[NAME].commits) == 3 and hub.calls('PUT') == uploads
    assert hub.repositories[NAME].commits[-1][1]['README.md'].endswith(b'# Edited\n')


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_the_card_names_its_repository(hub, folder):
    """The lines of use in the card that was sent are those of the repository; the folder is left as it was."""
    before = (folder / 'README.md').read_bytes()
    push(folder, NAME)
    sent = hub.repositories[NAME].commits[-1][1]['README.md']
    assert f"'hf-hub:{NAME}'".encode() in sent
    assert b'USER/NAME' not in sent
    assert (folder / 'README.md').read_bytes() == before
    assert prepare(folder, NAME).files['README.md'] == len(sent)
    assert not push(folder, NAME).changed


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_what_an_earlier_push_left_is_removed(hub, folder, tmp_path):
    """Metrics and training notes that the folder no longer has go; files of others stay."""
    push(folder, NAME)
    repo = hub.repositories[NAME]
    repo.commit({**repo.commits[-1][1], '.eval_results/old.yaml': b'[]', 'notes.txt': b'mine'})
    push(folder, NAME)
    assert '.eval_results/old.yaml' not in repo.commits[-1][1] and 'notes.txt' in repo.commits[-1][1]


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_pull_request(hub, folder):
    """A pull request leaves the branch as it is, needs a repository, and creates none."""
    with pytest.raises(WeightsError, match='no such repository'):
        push(folder, NAME, create_pr=True)
    assert NAME not in hub.repositories
    before = push(folder, NAME)
    (folder / 'README.md').write_text('---\nlibrary_name: timm\n---\n')
    done = push(folder, NAME, create_pr=True)
    assert done.url == f'{hub.url}/{NAME}/discussions/1'
    assert hub.repositories[NAME].refs['main'] == before.revision


@pytest.mark.parametrize('fault', [('POST', '/preupload'), ('POST', '/commit'), ('GET', f'hub/api/models/{NAME}')])
@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_a_new_repository_goes_with_its_failed_push(hub, folder, fault):
    """It is removed while it is empty; the message says so in a line."""
    hub.faults[fault] = [403]
    with pytest.raises(WeightsError, match=r"'user/network': it was not sent: .* was removed") as caught:
        push(folder, NAME)
    assert NAME not in hub.repositories and caught.value.__cause__ is not None
    assert '\n' not in str(caught.value) and TOKEN not in str(caught.value)


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_a_new_repository_that_cannot_be_removed_is_named(hub, folder):
    """The Hub is gone for the clean-up as well."""
    hub.faults = {('POST', '/commit'): [403], ('DELETE', ''): [403]}
    with pytest.raises(WeightsError, match='user/network was created, is empty, and could not be removed'):
        push(folder, NAME)


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_a_cut_upload(hub, folder, tmp_path):
    """An upload that ends in the middle leaves the old revision whole, and the next push succeeds."""
    push(folder, NAME)
    old = dict(hub.repositories[NAME].commits[-1][1])
    other = export(make_model(seed=1), tmp_path / 'other', data_config={'input_size': (3, 64, 64)})
    hub.faults['PUT', 'lfs'] = [403]
    with pytest.raises(WeightsError, match='it was not sent'):
        push(other, NAME)
    assert hub.repositories[NAME].commits[-1][1] == old  # one that existed is never removed
    hub.faults['PUT', 'lfs'] = ['cut']
    assert push(other, NAME).changed
    assert equal(load(f'hf-hub:{NAME}'), other)


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_somebody_else_was_faster(hub, folder):
    """A commit that arrived meanwhile is not overwritten."""
    push(folder, NAME)
    hub.faults['POST', '/commit'] = [412]
    (folder / 'README.md').write_text('---\nlibrary_name: timm\n---\n')
    with pytest.raises(WeightsError, match='changed meanwhile: try again'):
        push(folder, NAME)


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_a_tag_that_exists(hub, folder):
    """Nothing is sent where the tag is taken."""
    push(folder, NAME, tag='v1')
    (folder / 'README.md').write_text('---\nlibrary_name: timm\n---\n')
    with pytest.raises(WeightsError, match="has a tag 'v1' already: nothing was sent"):
        push(folder, NAME, tag='v1')
    assert len(hub.repositories[NAME].commits) == 2


def test_without_a_token_or_with_a_wrong_one(hub, folder, monkeypatch):
    """No request is made without a token; a wrong one is said to be wrong, and another's name forbidden."""
    with pytest.raises(WeightsError, match='does not allow it'):
        push(folder, 'other/network')
    monkeypatch.setenv('HF_TOKEN', 'hf_wrong')
    with pytest.raises(WeightsError, match='log in') as caught:
        push(folder, NAME)
    assert 'hf_wrong' not in str(caught.value)
    monkeypatch.delenv('HF_TOKEN')
    monkeypatch.setattr('dreal_timm.hub.upload.get_token', lambda: None)
    hub.requests.clear()
    with pytest.raises(WeightsError, match='there is no token'):
        push(folder, NAME)
    assert not hub.requests


def test_dry_run(hub, folder, capsys):
    """It is complete without a network: the same checks, the list of files, no request."""
    assert main(['push', str(folder), NAME, '--dry-run']) == 0
    out = capsys.readouterr().out
    for path in folder.rglob('*'):
        if path.is_file() and path.name != 'README.md':  # it gets the repository's name
            assert re.search(rf'{path.stat().st_size:,}  {re.escape(path.relative_to(folder).as_posix())}\n', out)
    assert 'nothing was sent' in out and not hub.requests


@pytest.mark.parametrize(('name', 'message'), [
    ('network', 'USER/NAME'), ('a/b/c', 'Repo id|USER/NAME'), ('user/na me', 'Repo id'), ('user/..', 'Repo id'),
])
def test_names(folder, name, message, capsys):
    """What is no name of a repository is refused before anything is looked at."""
    assert main(['push', str(folder), name, '--dry-run']) == 2
    assert re.search(message, capsys.readouterr().err)


def test_what_was_not_exported_is_not_sent(hub, folder, tmp_path):
    """A file beside the list, a link out of the folder, and a front matter that is none."""
    (folder / 'notes.txt').write_text('private')
    with pytest.raises(ValueError, match=r'holds notes\.txt, which was not exported'):
        prepare(folder, NAME)
    (folder / 'notes.txt').unlink()
    (folder / '.gitattributes').write_text('')  # of a folder that came from the Hub
    (folder / '.cache').mkdir()
    (folder / '.cache' / 'secret').write_text('')
    assert not [name for name in prepare(folder, NAME).files if name.startswith(('.git', '.cache'))]
    (folder / 'README.md').write_text('---\nlicense: [\n---\n')
    with pytest.raises(WeightsError, match='front matter cannot be read'):
        prepare(folder, NAME)
    (folder / 'README.md').unlink()
    with pytest.raises(WeightsError, match='no card'):
        prepare(folder, NAME)
    (folder / 'README.md').write_text('---\nlibrary_name: timm\n---\n')
    shutil.copy(folder / 'config.json', tmp_path / 'outside.json')
    (folder / 'config.json').unlink()
    (folder / 'config.json').symlink_to(tmp_path / 'outside.json')
    with pytest.raises(WeightsError, match=r'config\.json: it is not what was exported'):
        prepare(folder, NAME)
    assert not hub.requests


@pytest.mark.parametrize('name', [
    '.env', 'id_rsa', 'test/private.safetensors', 'test/.env', 'training/.env', 'training/notes.json',
    '.eval_results/a.json', 'config.json/a', 'training/run.json/a', 'extra/config.json',
    'pytorch_model.bin', 'model.safetensors.bak'])
def test_what_no_export_writes_is_not_sent(hub, folder, name):
    """A file of another name stays, also if the list of checksums names it with its hash."""
    first = name.split('/')[0]
    if name.endswith('/a'):
        (folder / name[:-2]).unlink(missing_ok=True)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text('private')
    (folder / 'SHA256SUMS').write_text(checksums(folder))
    assert f'  {first}' in (folder / 'SHA256SUMS').read_text()
    with pytest.raises(WeightsError):
        push(folder, NAME)
    assert not hub.requests


def test_what_an_export_writes_is_sent(hub, folder):
    """Settings, metrics, results and the Hub's own results beside the network: all of them, and nothing else."""
    names = [
        *(f'training/{name}' for name in (
            'args.yaml', 'checkpoint.json', 'control.json', 'float32.json', 'results.json', 'run.json', 'summary.csv')),
        '.eval_results/zalando-datasets_fashion_mnist.yaml']
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text('{}')
    (folder / 'SHA256SUMS').write_text(checksums(folder))
    assert {*prepare(folder, NAME).files} == {*names, 'config.json', 'model.safetensors', 'README.md', 'SHA256SUMS',
                                              'test/rand_tensors.safetensors'}


@pytest.fixture
def published(hub, folder):
    """A repository with an exported network."""
    from fake_hub import Repository
    repo = hub.repositories[NAME] = Repository()
    files = [path for path in folder.rglob('*') if path.is_file()]
    repo.commit({path.relative_to(folder).as_posix(): path.read_bytes() for path in files})
    return repo


def test_load_and_what_is_asked(hub, published, folder):
    """The weights are equal; a commit that is in the cache asks nothing of the Hub."""
    assert equal(load(f'hf-hub:{NAME}@{published.refs["main"]}'), folder)
    hub.requests.clear()
    assert equal(load(f'hf-hub:{NAME}@{published.refs["main"]}'), folder)
    assert not hub.requests
    assert equal(load(f'hf-hub:{NAME}'), folder)


def test_failures_of_a_pull(hub, published, tmp_path, monkeypatch):
    """Each cause has its word, and repository and file stand in the line."""
    for name, word in (
        ('user/nothing', 'no such repository, or it is private'), (f'{NAME}@v9', 'no such revision'),
        ('user/na me', 'config.json'),
    ):
        with pytest.raises(WeightsError, match=word) as caught:
            load(f'hf-hub:{name}')
        assert f"'{name}', config.json" in str(caught.value) and '\n' not in str(caught.value)
        assert caught.value.__cause__ is not None
    published.gated = True
    with pytest.raises(WeightsError, match='gated: ask for access at'):
        load(f'hf-hub:{NAME}')
    published.gated = False
    for status, word in ((401, 'token is not valid'), (429, 'too many requests'), (503, r'error \(503\): try again')):
        hub.faults['GET', '/api/models'] = [status]
        with pytest.raises(WeightsError, match=word):
            load(f'hf-hub:{NAME}')
    head = published.commits[-1][1]
    published.commit({name: content for name, content in head.items() if name != 'model.safetensors'})
    with pytest.raises(WeightsError, match=r"'user/network', .*: the repository has no such file"):
        load(f'hf-hub:{NAME}')


def test_a_release_on_the_hub(hub, published, tmp_path, monkeypatch):
    """A release that is not in a checkout comes from the commit of its table, and must have the hash of its table."""
    from dreal_timm.models import releases
    release = releases.RELEASES[0]
    staged = release.file.parent
    oid = published.commit({'model.safetensors': release.file.read_bytes()})
    published.commit({'model.safetensors': b'of later'})
    monkeypatch.setattr(releases, '_STAGED', tmp_path)
    cfg = dataclasses.replace(timm.get_pretrained_cfg(release.name), file=None, hf_hub_id=f'{NAME}@{oid}')
    monkeypatch.setitem(_registry._model_pretrained_cfgs, release.name, cfg)  # as of a package without the folder
    assert equal(load(release.name).half(), staged)
    other = dataclasses.replace(release, sha256='0' * 64)
    monkeypatch.setattr(releases, 'RELEASES', (other,))
    with pytest.raises(WeightsError, match='it is not what was released'):
        load(release.name)


def test_without_a_network(hub, published, folder, tmp_path):
    """With no network: seconds and one error without a cache, the weights with one."""
    load(f'hf-hub:{NAME}')
    hub.close()
    assert equal(load(f'hf-hub:{NAME}'), folder)
    forget(tmp_path)
    start = time.monotonic()
    for model in (f'hf-hub:{NAME}', 'resnet10t', 'dreal_se_resnet50'):
        with pytest.raises(WeightsError, match=r'cannot be reached .*: check the network'):
            load(model)
    assert time.monotonic() - start < 5


def test_switched_off(hub, published, tmp_path, monkeypatch, capsys):
    """HF_HUB_OFFLINE asks nothing; the commands say it in a line."""
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(WeightsError, match='switched off'):
        load(f'hf-hub:{NAME}')
    assert main(['validate', f'hf-hub:{NAME}', '--data', str(tmp_path)]) == 2
    assert 'HF_HUB_OFFLINE' in capsys.readouterr().err
    assert not hub.requests


@pytest.mark.parametrize('fault', ['cut', 'other'])
def test_a_broken_download_never_gives_other_weights(hub, published, folder, fault):
    """A download that is cut goes on or starts again; other bytes of the same number are found by their hash."""
    hub.faults['GET', 'lfs/objects'] = [fault]
    if fault == 'cut':
        assert equal(load(f'hf-hub:{NAME}'), folder)
        return
    with pytest.raises(WeightsError, match=r'safetensors: the copy in the cache is broken .* delete \S+') as caught:
        load(f'hf-hub:{NAME}')
    os.unlink(str(caught.value).rsplit(' ', 1)[-1])
    assert equal(load(f'hf-hub:{NAME}'), folder)


def test_a_newer_commit_is_compared_too(hub, published, folder, tmp_path):
    """With an older commit in the cache, the download of the newer one is compared with its hash."""
    load(f'hf-hub:{NAME}')
    other = export(make_model(seed=1), tmp_path / 'other', data_config={'input_size': (3, 64, 64)})
    weights = (other / 'model.safetensors').read_bytes()
    published.commit({**published.commits[-1][1], 'model.safetensors': weights})
    hub.faults['GET', 'lfs/objects'] = ['other']
    with pytest.raises(WeightsError, match='the copy in the cache is broken') as caught:
        load(f'hf-hub:{NAME}')
    os.unlink(str(caught.value).rsplit(' ', 1)[-1])
    assert equal(load(f'hf-hub:{NAME}'), other)


def test_architectures_of_others(folder, capsys):
    """A folder of a network that nobody registered names the package to import as what to do."""
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps({**config, 'architecture': 'elsewhere_resnet'}))
    (folder / 'SHA256SUMS').unlink()
    with pytest.raises(WeightsError, match="no architecture 'elsewhere_resnet': import the package"):
        load(str(folder))
    assert timm.create_model('test_resnet') is not None
