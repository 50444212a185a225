import copy

import pytest
import timm
import torch
from networks import ATTENTION, make_batch, make_model
from oracle import map_by_hand
from timm.layers import SEModule
from torch import nn

from dreal_timm.attention.capture import bypass, read_map, record
from dreal_timm.attention.readers import READERS, MapReader, register_attention
from dreal_timm.attention.sites import attention_parameters, find_sites, group_sites
from dreal_timm.replay.overrides import scratch_buffers


def hook_count(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def used_maps(model: nn.Module, input: torch.Tensor, sites) -> dict[str, torch.Tensor]:
    """The maps that the modules really used, captured at their gates."""
    maps, handles = {}, []
    for site in sites:
        gate = model.get_submodule(site.name).gate
        handles.append(gate.register_forward_hook(lambda m, a, out, name=site.name: maps.__setitem__(name, out)))
    model(input)
    for handle in handles:
        handle.remove()
    return maps


def test_sites_of_se():
    """SE has one channel site a block, in depth order, with the channels of its stage."""
    sites = find_sites(timm.create_model('dreal_se_resnet50', device='meta'))
    assert [site.name for site in sites[:4]] == ['layer1.0.se', 'layer1.1.se', 'layer1.2.se', 'layer2.0.se']
    assert len(sites) == 16
    assert {(site.stage, site.kind, site.size) for site in sites} == {
        ('layer1', 'channel', (256,)), ('layer2', 'channel', (512,)),
        ('layer3', 'channel', (1024,)), ('layer4', 'channel', (2048,)),
    }


def test_sites_of_cbam():
    """CBAM has two sites a block, the channel one first, and a group for each kind in a stage."""
    sites = find_sites(timm.create_model('dreal_cbam_resnet18', device='meta'), (3, 224, 224))
    assert [site.name for site in sites[:2]] == ['layer1.0.se.channel', 'layer1.0.se.spatial']
    groups = group_sites(sites)
    assert [group.name for group in groups[:2]] == ['layer1_channel', 'layer1_spatial']
    assert [group.size for group in groups] == [
        (64,), (56, 56), (128,), (28, 28), (256,), (14, 14), (512,), (7, 7)]
    assert all(len(group.sites) == 2 for group in groups)


def test_spatial_map_of_one_position_is_no_site():
    """At 32 px the last stage has one position, so its spatial maps are no sites."""
    kinds = {(site.stage, site.kind) for site in find_sites(timm.create_model('dreal_cbam_resnet18'), (3, 32, 32))}
    assert ('layer4', 'channel') in kinds
    assert ('layer4', 'spatial') not in kinds


def test_sites_of_plain_timm_networks():
    """timm's own SE and CBAM networks have sites, a plain network has none."""
    assert len(find_sites(timm.create_model('seresnet50', device='meta'))) == 16
    cbam = timm.create_model('resnet50', device='meta', block_args=dict(attn_layer='cbam'))
    assert len(find_sites(cbam)) == 32
    assert find_sites(timm.create_model('resnet18', device='meta')) == []


def test_find_sites_leaves_no_trace(attention):
    """Flags, buffers, generator and hooks are as before, also where the flags were mixed."""
    model = make_model(attention)
    model.train()
    model.layer2.eval()
    flags = [m.training for m in model.modules()]
    state = copy.deepcopy(model.state_dict())
    rng = torch.get_rng_state()
    find_sites(model, (3, 64, 64))
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), rng)
    assert hook_count(model) == 0
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_find_sites_of_a_foreign_model():
    """A model that timm did not build needs input_size; without feature_info the stage is the top-level module."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), SEModule(8), nn.Sequential(nn.Conv2d(8, 8, 3), SEModule(8)))
    with pytest.raises(ValueError, match='input_size'):
        find_sites(model)
    assert [(site.name, site.stage) for site in find_sites(model, (3, 16, 16))] == [('1', '1'), ('2.1', '2')]
    with pytest.raises(ValueError, match=r'\(C, H, W\)'):
        find_sites(model, (16, 16))


def test_gate_called_twice_is_refused():
    """A module that is used twice would need two sites with one name: an error says so."""
    se = SEModule(8)
    with pytest.raises(ValueError, match='2 times'):
        find_sites(nn.Sequential(nn.Conv2d(3, 8, 3), se, se), (3, 16, 16))


def test_groups_split_by_map_size():
    """Sites of one stage with maps of different sizes form groups of their own, with the size in their names."""
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3), SEModule(8), nn.Conv2d(8, 16, 3), SEModule(16)))
    groups = group_sites(find_sites(model, (3, 16, 16)))
    assert [(group.name, group.size) for group in groups] == [('0_channel_8', (8,)), ('0_channel_16', (16,))]


@pytest.mark.parametrize('mode', ['train', 'eval'])
def test_maps_read_are_the_maps_used(attention, mode):
    """Maps read from a recording equal, bit for bit, the maps that the modules used, and Eq. 4 to 7 by hand."""
    model = make_model(attention).train(mode == 'train')
    sites = find_sites(model, (3, 64, 64))
    input, _ = make_batch()
    twin = copy.deepcopy(model)
    with record(model, sites) as readings:
        model(input)
    used = used_maps(twin, input, sites)
    assert len(readings) == len(sites)
    for site in sites:
        read = read_map(model, site, readings[site.name])
        torch.testing.assert_close(read, used[site.name], rtol=0, atol=0)
        shape = (8, site.size[0], 1, 1) if site.kind == 'channel' else (8, 1, *site.size)
        assert read.shape == readings[site.name].state.shape == shape


def test_state_and_map_by_hand(attention):
    """The state is the module's input averaged to the map's shape, the map follows the paper's equations."""
    model = make_model(attention).double().train()
    sites = find_sites(model, (3, 64, 64))
    inputs, handles = {}, []
    for site in sites:
        module = model.get_submodule(site.name)
        handles.append(module.register_forward_pre_hook(lambda m, a, name=site.name: inputs.update({name: a[0]})))
    with record(model, sites) as readings:
        model(make_batch(dtype=torch.float64)[0])
    for handle in handles:
        handle.remove()
    for site in sites:
        x = inputs[site.name]
        state = x.mean((2, 3), keepdim=True) if site.kind == 'channel' else x.mean(1, keepdim=True)
        torch.testing.assert_close(readings[site.name].state, state, rtol=1e-12, atol=1e-12)
        expected = map_by_hand(copy.deepcopy(model.get_submodule(site.name)), x)
        torch.testing.assert_close(read_map(model, site, readings[site.name]), expected, rtol=1e-10, atol=1e-12)


def test_gradient_of_a_map_reaches_attention_parameters_alone(attention):
    """A map that was read has a graph to theta and to nothing upstream; the reading itself has none."""
    model = make_model(attention).train()
    sites = find_sites(model, (3, 64, 64))
    with record(model, sites) as readings:
        model(make_batch()[0])
    assert not any(t.requires_grad for r in readings.values() for t in (r.state, *r.descriptors))
    # squared: the plain sum of a batch-normalised map has no gradient
    sum(read_map(model, site, readings[site.name]).square().sum() for site in sites).backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert reached == set(attention_parameters(model, sites))


def test_a_descriptor_that_is_the_input_has_no_graph():
    """Also a reader that returns the input itself as descriptor keeps the backbone out of the map's graph."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Conv2d(8, 8, 1)
            self.gate = nn.Sigmoid()

        def forward(self, x):
            return x * self.gate(self.fc(x).mean((2, 3), keepdim=True))

    model = nn.Sequential(nn.Conv2d(3, 8, 3), Gated())
    reader = MapReader(
        'channel', lambda m, x: (x.mean((2, 3), keepdim=True), (x,)),
        lambda m, x: m.gate(m.fc(x).mean((2, 3), keepdim=True)),
    )
    try:
        register_attention(Gated, reader)
        sites = find_sites(model, (3, 16, 16))
        with record(model, sites) as readings:
            model(make_batch(size=16)[0])
        read_map(model, sites[0], readings['1']).sum().backward()
    finally:
        READERS.pop(Gated, None)
    assert model[0].weight.grad is None
    assert model[1].fc.weight.grad is not None


def test_reading_a_map_leaves_buffers(attention):
    """A gate with batch norm does not update its buffers twice."""
    model = make_model(attention).train()
    sites = find_sites(model, (3, 64, 64))
    with record(model, sites) as readings:
        model(make_batch()[0])
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for site in sites:
        read_map(model, site, readings[site.name])
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_recording_changes_nothing(attention):
    """Logits and buffers are bit-equal with and without a recording."""
    model, twin = make_model(attention).train(), make_model(attention).train()
    input, _ = make_batch()
    with record(model, find_sites(model, (3, 64, 64))):
        output = model(input)
    assert torch.equal(output, twin(input))
    assert all(torch.equal(b, twin.get_buffer(name)) for name, b in model.named_buffers())


def test_bypass_replaces_the_map_by_its_mean(attention):
    """Inside bypass the module multiplies by the mean of its map, per sample; outside by the map."""
    model = make_model(attention).eval()
    for site in find_sites(model, (3, 64, 64)):
        module = model.get_submodule(site.name)
        x = torch.randn(4, site.size[0] if site.kind == 'channel' else 5, 6, 6)
        plain = module(x)
        attention_map = map_by_hand(module, x)
        with bypass(model, [site]):
            torch.testing.assert_close(module(x), x * attention_map.mean((1, 2, 3), keepdim=True))
        torch.testing.assert_close(module(x), plain, rtol=0, atol=0)
        torch.testing.assert_close(plain, x * attention_map)


@pytest.mark.parametrize('context', [record, bypass])
def test_an_exception_leaves_no_hook(context):
    """An exception in the middle of a pass leaves zero hooks behind."""
    model = make_model('cbam')
    sites = find_sites(model, (3, 64, 64))
    with pytest.raises(ZeroDivisionError), context(model, sites):
        assert hook_count(model) >= len(sites)
        raise ZeroDivisionError
    assert hook_count(model) == 0


def test_scratch_buffers_swap():
    """Writes go to copies; afterwards the very same tensors are back, with the version autograd saw."""
    norm = nn.BatchNorm2d(3).train()
    original, version = norm.running_mean, norm.running_mean._version
    with scratch_buffers([norm]):
        norm(torch.randn(2, 3, 4, 4))
        assert norm.running_mean is not original
    assert norm.running_mean is original
    assert original._version == version


def test_register_attention():
    """Another class becomes a site with a reader of its own; doubles and unknown kinds are refused."""

    class Doubt(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Conv2d(8, 8, 1)
            self.gate = nn.Sigmoid()

        def forward(self, x):
            return x * self.gate(self.fc(x.mean((2, 3), keepdim=True)))

    def describe(module, x):
        pooled = x.mean((2, 3), keepdim=True)
        return pooled, (pooled,)

    model = nn.Sequential(nn.Conv2d(3, 8, 3), Doubt())
    assert find_sites(model, (3, 16, 16)) == []
    reader = MapReader('channel', describe, lambda m, x: m.gate(m.fc(x)))
    try:
        register_attention(Doubt, reader)
        assert [site.name for site in find_sites(model, (3, 16, 16))] == ['1']
        with pytest.raises(ValueError, match='already'):
            register_attention(Doubt, reader)
    finally:
        READERS.pop(Doubt, None)
    with pytest.raises(ValueError, match='sideways'):
        register_attention(Doubt, MapReader('sideways', describe, lambda m, x: x))


def test_subclasses_are_not_recognised():
    """A subclass may compute its map another way: it is no site."""
    class Mine(SEModule):
        pass

    model = timm.create_model('test_resnet', block_args=dict(attn_layer=Mine))
    assert find_sites(model, (3, 64, 64)) == []


def test_attention_parameters_are_all_of_the_module():
    """theta is every parameter between the module's input and the map."""
    for name in ATTENTION:
        model = make_model(name)
        theta = attention_parameters(model, find_sites(model, (3, 64, 64)))
        assert set(theta) == {n for n, _ in model.named_parameters() if '.se.' in n}
