import pytest
from small_run import write_images


@pytest.fixture(scope='session')
def images(tmp_path_factory):
    """A folder of 3 classes: 12 images of each to train on, 4 to validate on. Not to be changed."""
    return write_images(tmp_path_factory.mktemp('images') / 'data')


@pytest.fixture(scope='session')
def few(tmp_path_factory):
    """A folder of 3 classes: 4 images of each to train on, 1 to validate on. Not to be changed."""
    return write_images(tmp_path_factory.mktemp('few') / 'data', train=4, validation=1)
