"""Classes of a data set and outputs of a network: by name, or not at all"""
import tarfile
import unicodedata

import pytest
import timm
from PIL import Image
from timm.data import ImageNetInfo

from dreal_timm.data.classes import ClassesError, Match, class_names, match_classes, network_names, relabel
from dreal_timm.data.opening import open_dataset, open_for

NAMES = ['zero', 'one', 'two', 'three']


@pytest.mark.parametrize(('names', 'known', 'expected'), [
    (['zero', 'one', 'two', 'three'], [NAMES], Match('name', None, 0)),
    (['one', 'three', 'two', 'zero'], [NAMES], Match('name', (1, 3, 2, 0), 0)),
    (['three', 'zero'], [NAMES], Match('name', (3, 0), 2)),
    (['zero', 'one'], [NAMES], Match('name', None, 2)),
    (['b', 'a'], [NAMES, ['a', 'b', 'c', 'd']], Match('name', (1, 0), 2)),
    (None, [NAMES], Match('order')),
    (['a', 'b', 'c', 'd'], [], Match('order')),
    ([unicodedata.normalize('NFD', 'é')], [['è', 'é', 'e', 'f']], Match('name', (1,), 3)),
])
def test_match(names, known, expected):
    """By name where all names are known, by order where one side has none."""
    assert match_classes(names, known, 4) == expected


@pytest.mark.parametrize(('names', 'known', 'named'), [
    (['0', '1', '2', '3'], [NAMES], '4 of the 4'),
    (['zero', 'one', 'two', '3'], [NAMES], r'1 of the 4 .*\(3\)'),
    (['zero', 'one'], [['zero', 'one', 'zero', 'two']], r'1 of the 2 .*\(zero\)'),
    (['a', 'b', 'c'], [], '3 classes'),
    (['a', 'b', 'c', 'd', 'e'], [], '5 classes'),
])
def test_no_match(names, known, named):
    """Other names, names that are there twice, and other numbers of classes are errors."""
    with pytest.raises(ClassesError, match=named):
        match_classes(names, known, 4)


def test_what_a_user_says():
    """A class map and the order come before names; a class that the map leaves out, and another number, are errors."""
    assert match_classes(['zero', 'b'], [NAMES], 4, class_map={'b': 2, 'zero': 3}) == Match('map', (3, 2), 2)
    assert match_classes(['a', 'b', 'c', 'd'], [NAMES], 4, by_order=True) == Match('order')
    with pytest.raises(ClassesError, match='does not name b'):
        match_classes(['zero', 'b'], [NAMES], 4, class_map={'zero': 3})
    with pytest.raises(ClassesError, match='3 classes'):
        match_classes(['a', 'b', 'c'], [NAMES], 4, by_order=True)
    with pytest.raises(ClassesError, match='no names'):
        match_classes(None, [NAMES], 4, class_map={'zero': 3})


def test_names_of_networks():
    """A network's own names are taken; else ImageNet's synsets and descriptions by the number of classes."""
    model = timm.create_model('test_resnet', num_classes=3)
    assert network_names(model) == []
    for names in (['a', 'b', 'c'], {'0': 'a', '1': 'b', '2': 'c'}):
        model.pretrained_cfg = {**model.pretrained_cfg, 'label_names': names}
        assert network_names(model) == [['a', 'b', 'c']]
    synsets, words = network_names(timm.create_model('test_resnet', num_classes=1000))
    assert (synsets[1], words[1]) == ('n01443537', 'goldfish, Carassius auratus')


def test_imagenet_by_its_words():
    """The names that Hugging Face's imagenet-1k has for the classes, in an order of their own, find the outputs."""
    known = network_names(timm.create_model('test_resnet', num_classes=1000))
    words = [ImageNetInfo().index_to_description(i) for i in (7, 1, 999)]
    assert match_classes(words, known, 1000).outputs == (7, 1, 999)


class _Known:
    """Stands in for a data set, with what tells its classes."""

    def __init__(self, **known):
        self.__dict__.update(known)


@pytest.mark.parametrize(('dataset', 'expected'), [
    (_Known(class_to_idx={'b': 1, 'a': 0}), ['a', 'b']),
    (_Known(reader=_Known(class_to_idx={'a': 0, 'b': 3})), ['a', 'class 1', 'class 2', 'b']),
    (_Known(reader=_Known(class_to_idx={'a': 0, 'b': 1, 'c': 0})), ['a, c', 'b']),
    (_Known(reader=_Known(class_name_to_idx={'a': 0, 'b': 1})), ['a', 'b']),
    (_Known(wnids=['n1', 'n2'], class_to_idx={'tench': 0, 'Tinca': 0, 'crane': 1}), ['n1', 'n2']),
    (_Known(reader=_Known()), None),
    (_Known(class_to_idx={}), None),
    (None, None),
])
def test_names_of_data_sets(dataset, expected):
    """Classes have names of all kinds of data sets; an index without one, or with two, has one as well."""
    assert class_names(dataset) == expected


def _folder(root, names):
    for i, name in enumerate(names):
        (root / name).mkdir(parents=True)
        Image.new('L', (4, 4), 10 * i).save(root / name / '0.png')
    return str(root)


def _network(label_names, num_classes=4):
    model = timm.create_model('test_resnet', num_classes=num_classes)
    model.pretrained_cfg = {**model.pretrained_cfg, 'label_names': label_names}
    return model


def test_a_folder_gets_the_outputs(tmp_path):
    """Labels of a folder of some classes are the network's outputs, and a relabelled set is relabelled afresh."""
    folder = _folder(tmp_path / 'data', ['two', 'three', 'zero'])
    dataset, match = open_for(_network(NAMES), '', folder, '', channels=1)
    assert [label for _, label in dataset] == [3, 2, 0]  # folders in the order of the alphabet
    assert match == Match('name', (3, 2, 0), 1)
    relabel(dataset, 4, Match('name', (1, 0, 2), 1))
    assert [label for _, label in dataset] == [1, 0, 2]


def test_a_class_map_of_a_folder(tmp_path):
    """Its numbers are the outputs, whatever the network's names; those without an image are absent."""
    folder = _folder(tmp_path / 'data', ['x', 'y'])
    (tmp_path / 'map.txt').write_text('y\nw\nx\n')
    for class_map in (str(tmp_path / 'map.txt'), {'y': 0, 'w': 1, 'x': 2}):
        dataset, match = open_for(_network(NAMES), '', folder, '', channels=1, class_map=class_map)
        assert [label for _, label in dataset] == [2, 0]
        assert match.summary() == {'by': 'map', 'absent': 2}


def test_torchvisions_folder(tmp_path):
    """torchvision's data sets are matched by their names too, and take a class map."""
    folder = _folder(tmp_path / 'data', ['one', 'zero'])
    opened = dict(name='torch/image_folder', root=folder, split='')
    assert [label for _, label in open_for(_network(NAMES), **opened)[0]] == [1, 0]
    found = open_for(_network(NAMES), **opened, class_map={'one': 3, 'zero': 2})
    assert [label for _, label in found[0]] == [3, 2]
    with pytest.raises(ClassesError):
        open_for(_network(['a', 'b'], 2), **opened)
    with pytest.raises(ValueError, match='class_map'):
        open_dataset('torch/image_folder', folder, '', class_map={'one': 0})


def test_one_form_of_accents(tmp_path):
    """A class map finds a folder whatever form its accents have, and a mark of Windows' editors is no name."""
    folder = _folder(tmp_path / 'data', [unicodedata.normalize('NFD', 'zoë'), 'a'])
    (tmp_path / 'map.txt').write_text('\ufeffa\nzoë\n', encoding='utf-8')
    dataset = open_dataset('', folder, '', channels=1, class_map=str(tmp_path / 'map.txt'))
    assert [label for _, label in dataset] == [0, 1]
    assert class_names(dataset) == ['a', 'zoë']


def test_merged_classes_of_a_tar(tmp_path):
    """Folders of one name in a tar would become one class: an error that names them."""
    _folder(tmp_path / 'data', ['a/x', 'b/x'])
    with tarfile.open(tmp_path / 'data.tar', 'w') as file:
        file.add(tmp_path / 'data', '')
    with pytest.raises(ValueError, match='would be one class'):
        open_dataset('', str(tmp_path / 'data.tar'), '', channels=1)


@pytest.mark.parametrize(('content', 'named'), [
    (None, 'no file'), ('map.csv', 'Unsupported'), (b'\x80\x04N.', 'Invalid'), (b'\xff\xfe', 'cannot be read'),
    ({'a': -1}, 'number'), ({'a': 'b'}, 'number'), ({'': 0}, 'number'),
])
def test_broken_class_maps(tmp_path, content, named):
    """A class map that is none is an error in a line."""
    folder = _folder(tmp_path / 'data', ['a'])
    class_map = content
    if content is None or isinstance(content, str):
        class_map = str(tmp_path / (content or 'nowhere.txt'))
        if content:
            (tmp_path / content).write_text('a')
    elif isinstance(content, bytes):
        class_map = str(tmp_path / ('map.pkl' if content[0] == 128 else 'map.txt'))
        (tmp_path / class_map).write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=named):
        open_dataset('', folder, '', channels=1, class_map=class_map)
