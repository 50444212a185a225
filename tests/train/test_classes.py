"""Classes of a run keep their outputs: when it goes on, when another starts from it, when it is measured"""
import json
import shutil
from pathlib import Path

import pytest
import torch
from small_run import SE, recipe, start

from dreal_timm.train import run
from dreal_timm.train.validate import validate


@pytest.fixture(scope='module')
def turned(images, tmp_path_factory):
    """A run whose class map has the classes in another order than their names."""
    folder = tmp_path_factory.mktemp('turned')
    (folder / 'map.txt').write_text('class2\nclass0\nclass1\n')
    return run(recipe(images, folder, class_map=str(folder / 'map.txt'), epochs=3, lr=0.02))


def weights(results):
    return torch.load(f"{results['directory']}/last.pth.tar", weights_only=True)['state_dict']


def labels(state):
    """Outputs of the images by the folder that they lie in."""
    dataset = state.train_loader.dataset
    dataset.transform = None
    return {name.split('/')[0]: dataset[i][1] for i, name in enumerate(dataset.filenames())}


def test_a_run_with_a_class_map_is_measured_by_names(turned, images):
    """validate finds the accuracy of the run in its export, whose classes are those of the class map."""
    found = validate(turned['model'], images, device='cpu', workers=0)
    assert found['top1'] == pytest.approx(turned['metrics']['top1'])
    assert found['loss'] == pytest.approx(turned['metrics']['loss'], rel=1e-4)
    assert found['classes'] == {'by': 'name', 'absent': 0}
    assert found['top1'] > 60  # by the order of the folders it would be less


def test_some_of_the_classes(turned, images, tmp_path):
    """Of a data set without one of the classes, the others are measured as they are in the whole."""
    part = tmp_path / 'part'
    shutil.copytree(images / 'validation', part / 'validation')
    shutil.rmtree(part / 'validation' / 'class0')
    found = validate(turned['model'], part, device='cpu', workers=0)
    for label, name in enumerate(('class1', 'class2')):
        one = tmp_path / name
        shutil.copytree(part / 'validation' / name, one / 'validation' / name)
        alone = validate(turned['model'], one, device='cpu', workers=0)
        assert alone['samples'] == 4 and alone['classes']['absent'] == 2, label
        found['loss'] -= alone['loss'] / 2
        found['top1'] -= alone['top1'] / 2
    assert found['samples'] == 8
    assert found['loss'] == pytest.approx(0, abs=1e-5) and found['top1'] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize('rename', [{'class0': 'zebra'}, {'class0': 'a', 'class1': 'b', 'class2': 'c'}])
def test_a_resumed_run_refuses_other_classes(images, tmp_path, rename):
    """A folder that was renamed would swap labels under the classifier: the run stops and nothing is changed."""
    data = tmp_path / 'data'
    shutil.copytree(images, data)
    run(recipe(data, tmp_path, stop_epoch=1))
    before = (tmp_path / 'run' / 'last.pth.tar').read_bytes()
    for split in ('train', 'validation'):
        for name, new in rename.items():
            (data / split / name).rename(data / split / new)
    with pytest.raises(ValueError, match='other classes'):
        run(recipe(data, tmp_path, resume='auto'))
    with pytest.raises(ValueError, match='other classes'):
        run(recipe(data, tmp_path, resume=str(tmp_path / 'run' / 'last.pth.tar'), experiment='other'))
    assert (tmp_path / 'run' / 'last.pth.tar').read_bytes() == before


def test_a_resumed_run_keeps_its_order(images, tmp_path):
    """The same classes in another order are put into the run's own: the end is that of a run without a break."""
    whole = run(recipe(images, tmp_path / 'whole'))
    (tmp_path / 'map.txt').write_text('class2\nclass1\nclass0\n')
    run(recipe(images, tmp_path, stop_epoch=1))
    resumed = run(recipe(images, tmp_path, resume='auto', class_map=str(tmp_path / 'map.txt')))
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(resumed)[name]), name
    assert resumed['metrics'] == whole['metrics']


def test_an_old_checkpoint_is_compared_too(images, tmp_path):
    """A checkpoint without names, as earlier releases wrote it, has those of its run's network beside it."""
    run(recipe(images, tmp_path, stop_epoch=1))
    path = tmp_path / 'run' / 'last.pth.tar'
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint['class_names']
    torch.save(checkpoint, path)
    data = tmp_path / 'data'
    shutil.copytree(images, data)
    for split in ('train', 'validation'):
        (data / split / 'class1').rename(data / split / 'other')
    with pytest.raises(ValueError, match='other classes'):
        run(recipe(data, tmp_path, resume='auto'))


@pytest.mark.parametrize('source', ['model/model.safetensors', 'model_best.pth.tar', 'local-dir'])
def test_a_start_with_a_classifier(turned, images, tmp_path, source):
    """A run that starts with a trained classifier gives each class its output, and keeps their names."""
    values = {'initial_checkpoint': f"{turned['directory']}/{source}"}
    if source == 'local-dir':
        values = {'model': f"local-dir:{turned['model']}", 'pretrained': True, 'model_kwargs': {}}
    state = start(images, tmp_path, **values)
    assert labels(state) == {'class2': 0, 'class0': 1, 'class1': 2}
    assert state.class_names == ['class2', 'class0', 'class1']
    data = tmp_path / 'data'
    shutil.copytree(images, data)
    for split in ('train', 'validation'):
        (data / split / 'class1').rename(data / split / 'other')
    with pytest.raises(ValueError, match='1 of the 3 classes'):
        start(data, tmp_path / 'other', **values)
    (tmp_path / 'map.txt').write_text('class0\nclass2\nother\n')
    assert labels(start(data, tmp_path / 'other', **values, class_map=str(tmp_path / 'map.txt'))) == {
        'class0': 0, 'class2': 1, 'other': 2}


def test_names_inside_of_a_checkpoint(turned, images, tmp_path):
    """A checkpoint that was copied away from its run knows its classes: a start and validate take them."""
    path = tmp_path / 'weights.pth.tar'
    shutil.copyfile(f"{turned['directory']}/model_best.pth.tar", path)
    assert labels(start(images, tmp_path, initial_checkpoint=str(path))) == {'class2': 0, 'class0': 1, 'class1': 2}
    found = validate(
        'test_resnet', images, checkpoint=path, workers=0, device='cpu',
        model_kwargs={'num_classes': 3, 'in_chans': 1, **SE})
    assert found['classes'] == {'by': 'name', 'absent': 0}


def test_names_of_another_network_are_not_exported(turned, images, tmp_path):
    """A network with a new classifier on data without names does not keep the names of the one it came from."""
    from dreal_timm.train import classification
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classification, 'class_names', lambda dataset: None)
        results = run(recipe(
            images, tmp_path, model=f"local-dir:{turned['model']}", pretrained=True, model_kwargs={}, epochs=1))
    assert 'label_names' not in json.loads(Path(results['model'], 'config.json').read_text())


def test_a_new_classifier_has_the_order_of_the_folders(turned, images, tmp_path):
    """Where the classifier is made anew, names of the network that it came from mean nothing."""
    state = start(images, tmp_path, pretrained_path=f"{turned['model']}/model.safetensors")
    assert labels(state) == {'class0': 0, 'class1': 1, 'class2': 2}
