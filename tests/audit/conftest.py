"""A small reinforced run, and its images"""
import pytest
from small_run import recipe, write_images


@pytest.fixture(scope='session')
def images(tmp_path_factory):
    """An image folder of three classes, 4 images to validate on in each."""
    return write_images(tmp_path_factory.mktemp('audited') / 'images', train=16, validation=4)


@pytest.fixture(scope='session')
def run_folder(images, tmp_path_factory):
    """A reinforced run with CBAM of two epochs on them."""
    from dreal_timm.train import run
    output = tmp_path_factory.mktemp('audited-run')
    run(recipe(
        images, output, model_kwargs={'zero_init_last': False, 'block_args': {'attn_layer': 'cbam'}},
        log_interval=100))
    return output / 'run'
