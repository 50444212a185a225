"""Fixtures: kinds of attention and of probes, and a Hub on loopback"""
import pytest
import torch
from fake_hub import TOKEN, FakeHub
from huggingface_hub import constants, hf_api
from networks import ATTENTION, PROBES

torch.set_num_threads(1)


@pytest.fixture(params=ATTENTION)
def attention(request) -> str:
    return request.param


@pytest.fixture(params=PROBES)
def probe(request) -> str:
    return request.param


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub, and this process with an empty cache and a token for it."""
    server = FakeHub()
    monkeypatch.setattr(constants, 'ENDPOINT', server.url)
    monkeypatch.setattr(
        constants, 'HUGGINGFACE_CO_URL_TEMPLATE', server.url + '/{repo_id}/resolve/{revision}/{filename}')
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_TELEMETRY', True)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(hf_api.api, 'endpoint', server.url)
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    yield server
    server.close()
