"""Embedding networks: last stride, pooling, neck, and what timm expects of a model"""
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from dreal_timm import DrealTask, find_sites
from dreal_timm.hub import export, load, load_backbone
from dreal_timm.layers import GemPool
from dreal_timm.models.reid import ReidNetwork, remove_last_stride

SMALL = dict(backbone='test_resnet', backbone_args={'block_args': {'attn_layer': 'se'}, 'zero_init_last': False})


def build(**kwargs):
    torch.manual_seed(0)
    return timm.create_model('dreal_reid', **{**SMALL, **kwargs})


@pytest.mark.parametrize('backbone', [
    'dreal_se_resnet18', 'dreal_cbam_resnet50', 'dreal_srm_resnet18', 'resnet50', 'resnet50d', 'seresnet50',
    'efficientnet_b0', 'regnety_032',
])
def test_last_stride(backbone):
    """The last map of a 384 x 128 image is 24 x 8 in place of 12 x 4, with the same weights and no dilation."""
    plain = timm.create_model(backbone, num_classes=0, device='meta')
    with torch.device('meta'):
        model = timm.create_model('dreal_reid', backbone=backbone, num_classes=5)
        input = torch.zeros(2, 3, 384, 128)
        assert model.forward_features(input).shape == (2, plain.num_features, 24, 8)
        assert plain.forward_features(input).shape[2:] == (12, 4)
        assert model(input).shape == (2, 5)
    assert {name: tensor.shape for name, tensor in model.backbone.state_dict().items()} == {
        name: tensor.shape for name, tensor in plain.state_dict().items()}
    dilations = [
        [module.dilation for module in network.modules() if isinstance(module, nn.Conv2d)]
        for network in (model.backbone, plain)]
    assert dilations[0] == dilations[1]
    changed = [
        name for name, module in plain.named_modules()
        if isinstance(module, nn.Conv2d) and module.stride != model.backbone.get_submodule(name).stride]
    assert 1 <= len(changed) <= 2


def test_last_stride_as_it_was():
    """With last_stride=2 the map is that of the network as timm has it, number for number."""
    model = build(last_stride=2, num_classes=0).eval()
    plain = timm.create_model('test_resnet', num_classes=0, **SMALL['backbone_args']).eval()
    plain.load_state_dict(model.backbone.state_dict())
    input = torch.randn(2, 3, 64, 32)
    with torch.no_grad():
        assert torch.equal(model.forward_features(input), plain.forward_features(input))


@pytest.mark.parametrize('pool', ['avg', 'max', 'gem'])
@pytest.mark.parametrize('neck', [True, False])
def test_head(pool, neck):
    """Features are pooled, embeddings are behind the neck, and logits are linear in the embeddings."""
    model = build(global_pool=pool, neck=neck, num_classes=7).eval()
    if neck:
        model.neck.running_mean.normal_()
        model.neck.running_var.uniform_(0.5, 2)
    maps = model.forward_features(torch.randn(3, 3, 64, 32))
    pooled = {
        'avg': lambda: maps.mean((2, 3)), 'max': lambda: maps.amax((2, 3)),
        'gem': lambda: maps.clamp(min=1e-6).pow(3).mean((2, 3)).pow(1 / 3)}[pool]()
    torch.testing.assert_close(model.pool(maps), pooled)
    expected = pooled
    if neck:
        expected = (pooled - model.neck.running_mean) / (model.neck.running_var + 1e-5).sqrt()
    torch.testing.assert_close(model.forward_head(maps, pre_logits=True), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.forward_head(maps), expected @ model.fc.weight.T, rtol=1e-4, atol=1e-5)
    assert model.get_classifier() is model.fc and model.fc.bias is None
    model.reset_classifier(0)
    torch.testing.assert_close(model.forward_head(maps), expected, rtol=1e-4, atol=1e-5)
    model.reset_classifier(4)
    assert model.forward_head(maps).shape == (3, 4)
    with pytest.raises(ValueError, match='cannot be changed to catavgmax'):
        model.reset_classifier(4, 'catavgmax')


def test_neck_has_no_bias_to_learn():
    """The neck's bias is zero and gets no gradient; GeM's exponent gets one, and no weight decay."""
    model = build(global_pool='gem', num_classes=3)
    model(torch.randn(4, 3, 64, 32)).logsumexp(1).sum().backward()
    assert model.neck.bias.grad is None and not model.neck.bias.any()
    assert model.neck.weight.grad.any() and model.global_pool.p.grad.any()
    assert 'global_pool.p' in model.no_weight_decay()


def test_gem_in_half_precision():
    """Powers are taken in float32, where float16 would overflow."""
    x = torch.full((1, 2, 4, 4), 300.0, dtype=torch.float16)
    assert torch.allclose(GemPool()(x).float(), torch.full((1, 2), 300.0), rtol=1e-3)
    assert GemPool()(x).dtype == torch.float16


def test_export(tmp_path):
    """The folder builds the same network again, with its backbone and options, and as embeddings with num_classes=0."""
    model = build(global_pool='gem', num_classes=7).eval()
    config = {'input_size': (3, 64, 32), 'mean': (0.4, 0.4, 0.4), 'std': (0.3, 0.3, 0.3)}
    export(model, tmp_path / 'out', data_config=config)
    input = torch.randn(2, 3, 64, 32)
    loaded, embedding = load(str(tmp_path / 'out')).eval(), load(str(tmp_path / 'out'), num_classes=0).eval()
    with torch.no_grad():
        assert torch.equal(loaded(input), model(input))
        assert torch.equal(embedding(input), model.forward_head(model.forward_features(input), pre_logits=True))
    assert isinstance(loaded, ReidNetwork) and loaded.pool_type == 'gem'
    assert list(timm.data.resolve_model_data_config(loaded)['mean']) == [0.4, 0.4, 0.4]
    assert 'neck.running_mean' in load_file(tmp_path / 'out' / 'model.safetensors')


def test_backbone_of_plain_weights(tmp_path):
    """The backbone starts from a plain network's weights, the attention fresh."""
    torch.manual_seed(1)
    plain = timm.create_model('test_resnet')
    torch.save(plain.state_dict(), tmp_path / 'plain.pth')
    model = build()
    found = load_backbone(model.backbone, tmp_path / 'plain.pth')
    assert torch.equal(model.backbone.conv1[0].weight, plain.conv1[0].weight)
    assert not found.missing
    assert all('.se.' in name for name in found.fresh)


@pytest.mark.parametrize('probe', ['exact', 'split', 'taylor'])
def test_reinforced(probe):
    """The sites of the backbone are found, and a step reinforces them."""
    model = build(num_classes=4)
    assert len(find_sites(model)) == len(find_sites(model.backbone)) > 0
    task = DrealTask(model, probe=probe, input_size=(3, 64, 32), verbose=False)
    task.get_trainable_module().train()
    for _ in range(2):
        result = task(torch.randn(4, 3, 64, 32), torch.arange(4))
        result['loss'].backward()
    assert result['reward'].isfinite().any()
    assert model.backbone.layer1[0].se.fc1.weight.grad.any()


def test_groups():
    """Layer-wise learning rates see every parameter of the backbone in a layer."""
    model = build(num_classes=4)
    parameters = timm.optim.param_groups_layer_decay(model, layer_decay=0.5)
    scales = {scale['lr_scale'] for scale in parameters}
    assert len(scales) > 2
    model.set_grad_checkpointing()
    assert model.backbone.grad_checkpointing


@pytest.mark.parametrize(('kwargs', 'message'), [
    ({'global_pool': 'catavgmax'}, 'global_pool must be one of'), ({'last_stride': 4}, 'last_stride 1 or 2'),
    ({'backbone': 'convnext_tiny', 'backbone_args': None}, 'has no last stride that could be removed'),
    ({'backbone': 'vit_tiny_patch16_224', 'backbone_args': None}, 'cannot be tried with'),
])
def test_errors(kwargs, message):
    """What cannot be built is an error in a line."""
    with pytest.raises(ValueError, match=message):
        build(**kwargs)


def test_strides_that_are_not_there():
    """A second removal takes the next stride, and leaves the mode as it was."""
    model = timm.create_model('test_resnet', num_classes=0).train()
    first, second = remove_last_stride(model), remove_last_stride(model)
    assert first and second and not set(first) & set(second)
    assert model.training
    assert not any(name.endswith('num_batches_tracked') and tensor.any() for name, tensor in model.state_dict().items())


def test_channels_of_an_exported_network(tmp_path):
    """Weights that were made for colour load for grey images, summed over the channels as timm does it."""
    model = build(num_classes=0)
    export(model, tmp_path / 'model')
    grey = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True, in_chans=1)
    first, colour = grey.backbone.conv1[0].weight, model.backbone.conv1[0].weight
    torch.testing.assert_close(first, colour.sum(1, keepdim=True))


def test_features_only_is_refused():
    """What is no feature extractor does not pass for one."""
    with pytest.raises(RuntimeError, match='features_only'):
        build(features_only=True)


@pytest.mark.parametrize('backbone', ['convnext_atto', 'vit_tiny_patch16_224'])
def test_a_stride_that_stays(backbone):
    """Where the last stride cannot be removed the error says how to leave it, and with that the network is made."""
    with pytest.raises(ValueError, match='last_stride=2 leaves it'):
        timm.create_model('dreal_reid', backbone=backbone)
    if backbone == 'convnext_atto':
        model = timm.create_model('dreal_reid', backbone=backbone, last_stride=2).eval()
        assert model(torch.zeros(1, 3, 64, 32)).shape == (1, model.num_features)
