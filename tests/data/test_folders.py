"""Image folders: every image in its class, and what is none left out"""
import logging

import pytest
from PIL import Image

from dreal_timm.data.classes import class_names
from dreal_timm.data.opening import open_dataset


def write(root, *names):
    """Write grey images by their paths in a folder."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('L', (4, 4), 100).save(path)


def files(dataset):
    return {name: dataset.reader.samples[i][1] for i, name in enumerate(dataset.filenames())}


def test_every_kind_of_image(tmp_path):
    """Images in .webp and .bmp are read beside timm's kinds; of other kinds they are left out and counted."""
    write(tmp_path, 'a/0.png', 'a/1.webp', 'a/2.bmp', 'b/3.JPG', 'b/4.jpeg', 'b/5.tif', 'b/6.gif')
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger('dreal_timm').addHandler(handler)
    try:
        dataset = open_dataset('', str(tmp_path), '', channels=1)
    finally:
        logging.getLogger('dreal_timm').removeHandler(handler)
    assert files(dataset) == {'a/0.png': 0, 'a/1.webp': 0, 'a/2.bmp': 0, 'b/3.JPG': 1, 'b/4.jpeg': 1}
    assert any('2 image files' in line for line in records)
    assert [image.size for image, _ in dataset] == [(4, 4)] * 5


def test_the_process_keeps_its_extensions(tmp_path):
    """timm's own list of extensions is what it was."""
    from timm.data import get_img_extensions
    before = get_img_extensions()
    write(tmp_path, 'a/1.webp', 'a/2.bmp')
    open_dataset('', str(tmp_path), '', channels=1)
    assert get_img_extensions() == before


def test_chosen_extensions(tmp_path):
    """`input_key` names the extensions that are wanted."""
    write(tmp_path, 'a/0.png', 'a/1.tif', 'b/2.gif', 'b/3.png')
    assert files(open_dataset('', str(tmp_path), '', channels=1, image_key='.tif;.gif')) == {'a/1.tif': 0, 'b/2.gif': 1}


def test_names_with_a_dot(tmp_path):
    """Files and folders whose names begin with a dot are no images and no classes."""
    write(tmp_path, 'a/0.png', 'a/._0.png', '.ipynb_checkpoints/0.png', 'b/1.png', 'b/.cache/2.png', '.DS.png')
    dataset = open_dataset('', str(tmp_path), '', channels=1)
    assert files(dataset) == {'a/0.png': 0, 'b/1.png': 1}
    assert class_names(dataset) == ['a', 'b']


@pytest.mark.parametrize(('names', 'named'), [
    (['cats/indoor/0.png', 'dogs/indoor/1.png'], r'cats/indoor.*dogs/indoor'),
    (['a/0.png', 'b/1.png', 'stray.png'], r'stray\.png'),
])
def test_merged_and_nameless_classes(tmp_path, names, named):
    """Two folders of one name, and an image beside the classes, are errors that name them."""
    write(tmp_path, *names)
    with pytest.raises(ValueError, match=named):
        open_dataset('', str(tmp_path), '', channels=1)


def test_a_class_map_leaves_out_and_is_said(tmp_path, caplog):
    """Classes that a class map does not name are left out, and their images counted; the others get its numbers."""
    write(tmp_path, 'a/0.png', 'b/1.png', 'b/2.png', 'c/3.png')
    with caplog.at_level(logging.WARNING):
        dataset = open_dataset('', str(tmp_path), '', channels=1, class_map={'c': 0, 'a': 5})
    assert files(dataset) == {'a/0.png': 5, 'c/3.png': 0}
    assert '2 images' in caplog.text


def test_the_order_is_timms(tmp_path):
    """Classes and images have the order of timm's reader: numbers by value."""
    from timm.data import create_dataset
    write(tmp_path, *(f'{label}/{i}.png' for label in (10, 2, 1, 33) for i in (12, 3, 1)))
    ours, theirs = open_dataset('', str(tmp_path), '', channels=1), create_dataset('', tmp_path, split='')
    assert [list(sample) for sample in ours.reader.samples] == [list(sample) for sample in theirs.reader.samples]
    assert class_names(ours) == ['1', '2', '10', '33']
