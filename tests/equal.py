"""Comparison of nested states"""
import torch


def assert_equal(first, second, where='checkpoint'):
    """Every tensor and every number is equal, bit for bit."""
    assert type(first) is type(second), where
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    elif isinstance(first, dict):
        assert list(first) == list(second), where
        for name in first:
            assert_equal(first[name], second[name], f'{where}.{name}')
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        for index, (one, two) in enumerate(zip(first, second, strict=True)):
            assert_equal(one, two, f'{where}[{index}]')
    else:
        assert first == second, where
