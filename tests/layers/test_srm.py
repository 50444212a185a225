"""SrmModule against a slow version of its formulas, hand-computed numbers, invariances and its edge cases."""
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call

from dreal_timm.layers import SrmModule

EPS = 1e-5
MOMENTUM = 0.1


def _module(channels: int, seed: int = 0, **kwargs) -> SrmModule:
    """A module in float64 whose map depends on its input: a fresh one has cfc = 0."""
    generator = torch.Generator().manual_seed(seed)
    module = SrmModule(channels, dtype=torch.float64, **kwargs)
    with torch.no_grad():
        module.cfc.normal_(generator=generator)
        module.bn.weight.normal_(generator=generator)
        module.bn.bias.normal_(generator=generator)
        module.bn.running_mean.normal_(generator=generator)
        module.bn.running_var.uniform_(0.5, 2., generator=generator)
    return module


def _input(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _map(module: SrmModule, x: torch.Tensor) -> torch.Tensor:
    return module.style_integrate(module.style_pool(x))


def _slow_style(positions: list[float], eps: float) -> tuple[float, float]:
    """Mean and standard deviation of one channel of one image."""
    n = len(positions)
    mean = math.fsum(positions) / n
    variance = math.fsum((p - mean) ** 2 for p in positions) / (n - 1) if n > 1 else 0.
    return mean, math.sqrt(variance + eps)


def _slow_srm(module: SrmModule, x: torch.Tensor, eps: float = EPS) -> tuple[torch.Tensor, torch.Tensor, list, list]:
    """The formulas, number by number: output, map, and the running statistics after the pass."""
    images = x.flatten(2).tolist()
    cfc = module.cfc.tolist()
    weight, bias = module.bn.weight.tolist(), module.bn.bias.tolist()
    running_mean, running_var = module.bn.running_mean.tolist(), module.bn.running_var.tolist()

    attention = torch.empty(x.shape[0], x.shape[1], 1, 1, dtype=x.dtype)
    output = torch.empty_like(x)
    for c in range(x.shape[1]):
        integrated = []
        for image in images:
            mean, std = _slow_style(image[c], eps)
            integrated.append(cfc[c][0] * mean + cfc[c][1] * std)
        mean, variance = running_mean[c], running_var[c]
        if module.training:
            n = len(integrated)
            mean = math.fsum(integrated) / n
            variance = math.fsum((z - mean) ** 2 for z in integrated) / n
            running_mean[c] = (1 - MOMENTUM) * running_mean[c] + MOMENTUM * mean
            running_var[c] = (1 - MOMENTUM) * running_var[c] + MOMENTUM * variance * n / (n - 1)
        for b, z in enumerate(integrated):
            z = weight[c] * (z - mean) / math.sqrt(variance + module.bn.eps) + bias[c]
            attention[b, c, 0, 0] = 1 / (1 + math.exp(-z))
            for h in range(x.shape[2]):
                for w in range(x.shape[3]):
                    output[b, c, h, w] = x[b, c, h, w] * attention[b, c, 0, 0]
    return output, attention, running_mean, running_var


@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
@pytest.mark.parametrize('size', [(2, 3), (1, 2), (1, 1), (5, 4)], ids=lambda size: 'x'.join(map(str, size)))
def test_module_equals_the_slow_version(size, training):
    """Output, map and running statistics are those of the formulas, in training and in evaluation mode."""
    module, x = _module(4).train(training), _input(3, 4, *size)
    output, attention, running_mean, running_var = _slow_srm(module, x)
    actual = module(x)
    torch.testing.assert_close(module.bn.running_mean.tolist(), running_mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(module.bn.running_var.tolist(), running_var, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(actual, output, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(_map(module, x), attention, rtol=1e-9, atol=1e-9)
    assert attention.std() > 0.01  # the maps differ, or this would check nothing


def test_style_is_mean_and_unbiased_standard_deviation():
    """The style is torch's own mean and unbiased variance, eps added inside the square root."""
    x = _input(2, 3, 4, 5)
    variance, mean = torch.var_mean(x, dim=(2, 3), correction=1)
    expected = torch.stack([mean, (variance + EPS).sqrt()], dim=2)
    torch.testing.assert_close(SrmModule(3, dtype=torch.float64).style_pool(x), expected, rtol=1e-12, atol=1e-12)


def test_numbers_worked_by_hand():
    """Positions 0 and 2: mean 1, variance 2, std sqrt(2 + 2) = 2; 3 * 1 + 0.5 * 2 = 4; sigmoid(4 - 4 + ln 3) = 3/4."""
    module = SrmModule(1, norm_layer=partial(nn.BatchNorm2d, eps=0.), eps=2., dtype=torch.float64).eval()
    with torch.no_grad():
        module.cfc.copy_(torch.tensor([[3., 0.5]]))
        module.bn.running_mean.fill_(4.)
        module.bn.bias.fill_(math.log(3.))
    x = torch.tensor([[[[0., 2.]]]], dtype=torch.float64)
    torch.testing.assert_close(module.style_pool(x), torch.tensor([[[1., 2.]]], dtype=torch.float64), rtol=0, atol=0)
    torch.testing.assert_close(module(x), torch.tensor([[[[0., 1.5]]]], dtype=torch.float64))


@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
def test_initial_map_is_one_half(training):
    """A fresh module halves its input exactly, whatever the input."""
    module, x = SrmModule(4, dtype=torch.float64).train(training), _input(3, 4, 2, 3)
    torch.testing.assert_close(_map(module, x), torch.full((3, 4, 1, 1), 0.5, dtype=x.dtype), rtol=0, atol=0)
    torch.testing.assert_close(module(x), x / 2, rtol=0, atol=0)


def test_variance_of_one_position_is_zero():
    """One position: the style is (the value, sqrt(eps))."""
    x = _input(3, 4, 1, 1)
    style = SrmModule(4, dtype=torch.float64).style_pool(x)
    torch.testing.assert_close(style[:, :, 0], x[:, :, 0, 0], rtol=0, atol=0)
    torch.testing.assert_close(style[:, :, 1], torch.full((3, 4), math.sqrt(EPS), dtype=x.dtype), rtol=1e-15, atol=0)


@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
@pytest.mark.parametrize('size', [(1, 1), (3, 2)], ids=['one position', 'constant channels'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
def test_gradients_are_finite_where_the_variance_is_zero(dtype, size, training):
    """A single position, or equal positions, give finite maps and gradients: eps is inside the square root."""
    module = _module(4).to(dtype).train(training)
    x = _input(3, 4, 1, 1).to(dtype).expand(3, 4, *size).clone().requires_grad_()
    output = module(x)
    output.square().sum().backward()
    assert output.isfinite().all()
    for tensor in (x, *module.parameters()):
        assert tensor.grad.isfinite().all()
    assert x.grad.abs().max() > 0


@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
@pytest.mark.parametrize('size', [(2, 3), (1, 1)], ids=['six positions', 'one position'])
def test_gradcheck(size, training):
    """Gradients of input and parameters agree with finite differences."""
    module = _module(2).train(training)
    names = [name for name, _ in module.named_parameters()]
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}

    def run(x, *parameters):
        tensors = dict(zip(names, parameters, strict=True)) | {name: buffer.clone() for name, buffer in buffers.items()}
        return functional_call(module, tensors, (x,))

    parameters = [parameter.detach().clone().requires_grad_() for parameter in module.parameters()]
    assert names == ['cfc', 'bn.weight', 'bn.bias']
    assert torch.autograd.gradcheck(run, (_input(3, 2, *size).requires_grad_(), *parameters))


@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
def test_map_ignores_the_order_of_positions(training):
    """The map of shuffled positions is the same map: style pooling knows no place."""
    module, x = _module(4).train(training), _input(3, 4, 4, 5)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(2))
    shuffled = x.flatten(2)[:, :, order].view_as(x)
    torch.testing.assert_close(_map(module, shuffled), _map(module, x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
def test_map_of_a_channel_depends_on_that_channel_alone(training):
    """Changing one channel changes its own map and no other channel's."""
    module, x = _module(4).train(training), _input(3, 4, 2, 3)
    other = x.clone()
    other[:, 1] = _input(3, 2, 3, seed=2)
    before, after = _map(module, x), _map(module, other)
    rest = [0, 2, 3]
    torch.testing.assert_close(after[:, rest], before[:, rest], rtol=0, atol=0)
    assert (after[:, 1] - before[:, 1]).abs().max() > 1e-3


def test_images_are_independent_in_evaluation_mode():
    """In evaluation mode the output of a batch is that of its images one by one."""
    module, x = _module(4).eval(), _input(3, 4, 2, 3)
    one_by_one = torch.cat([module(image[None]) for image in x])
    torch.testing.assert_close(module(x), one_by_one, rtol=1e-12, atol=1e-12)


def test_training_on_one_image_raises():
    """The batch norm needs more than one image a batch while it trains, and takes one in evaluation mode."""
    module, x = _module(4), _input(1, 4, 2, 3)
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        module.train()(x)
    assert module.eval()(x).isfinite().all()


def test_memory_format_does_not_matter():
    """Channels-last and non-contiguous inputs give the output of the contiguous one."""
    module, x = _module(4).eval(), _input(3, 4, 6, 5)
    expected = module(x)
    torch.testing.assert_close(module(x.to(memory_format=torch.channels_last)), expected, rtol=1e-12, atol=1e-12)
    transposed = x.transpose(2, 3).contiguous().transpose(2, 3)
    torch.testing.assert_close(module(transposed), expected, rtol=1e-12, atol=1e-12)


def test_parameters():
    """Four parameters a channel: two of the CFC, two of the batch norm; the CFC starts at zero."""
    module = SrmModule(8)
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    assert shapes == {'cfc': (8, 2), 'bn.weight': (8,), 'bn.bias': (8,)}
    assert not module.cfc.any()


def test_options():
    """gate_layer and norm_layer are the modules used, eps is the one inside the square root."""
    module = _module(2, gate_layer='hard_sigmoid', norm_layer=partial(nn.BatchNorm2d, eps=0.25), eps=0.5).eval()
    x = _input(3, 2, 2, 3)
    _, attention, _, _ = _slow_srm(module, x, eps=0.5)
    logit = torch.logit(attention)  # the slow version's gate is a sigmoid
    torch.testing.assert_close(_map(module, x), ((logit + 3) / 6).clamp(0, 1), rtol=1e-9, atol=1e-9)


def test_meta_device():
    """device='meta' reaches every tensor, and the module runs there."""
    module = SrmModule(4, device='meta')
    assert {tensor.device.type for tensor in module.state_dict().values()} == {'meta'}
    x = torch.empty(2, 4, 3, 5, device='meta')
    assert module(x).shape == (2, 4, 3, 5)
    assert _map(module, x).shape == (2, 4, 1, 1)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtype(dtype):
    """dtype reaches every floating tensor; output and map have the input's dtype and the documented shapes."""
    module = SrmModule(4, dtype=dtype)
    assert {tensor.dtype for tensor in module.state_dict().values() if tensor.is_floating_point()} == {dtype}
    x = _input(2, 4, 3, 5).to(dtype)
    assert module.style_pool(x).shape == (2, 4, 2)
    for tensor, shape in [(module(x), (2, 4, 3, 5)), (_map(module, x), (2, 4, 1, 1))]:
        assert tensor.shape == shape
        assert tensor.dtype == dtype
        assert tensor.isfinite().all()


@pytest.mark.filterwarnings('ignore:.*torch.jit')
@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
def test_torchscript(training):
    """A scripted module gives the eager output, at any size."""
    module = _module(4).train(training)
    scripted = torch.jit.script(module)
    for size in [(2, 3), (1, 1), (4, 4)]:
        x = _input(3, 4, *size)
        torch.testing.assert_close(scripted(x), module(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
def test_compile(training):
    """A compiled module, one graph, gives the eager output, gradients and running statistics."""
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        module, x = _module(4).train(training), _input(3, 4, 2, 3).requires_grad_()
        output = (torch.compile(module, backend='aot_eager', fullgraph=True) if compiled else module)(x)
        output.square().sum().backward()
        results.append([output.detach(), x.grad, *(p.grad for p in module.parameters()), *module.buffers()])
    torch._dynamo.reset()
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)


def test_float16_does_not_overflow():
    """The sum of squares of a large map leaves float16's range, its mean does not."""
    x = 8 * torch.randn(2, 4, 56, 56, generator=torch.Generator().manual_seed(0))
    style = SrmModule(4).half().style_pool(x.half())
    torch.testing.assert_close(style.float(), SrmModule(4).style_pool(x), rtol=1e-2, atol=1e-2)


def test_features_keep_their_type_under_autocast():
    """The statistics are computed in float32 under autocast, the features stay in bfloat16."""
    srm = SrmModule(4)
    x = torch.randn(2, 4, 3, 3, dtype=torch.bfloat16)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert srm(x).dtype == torch.bfloat16
