"""What our recipes train with: every value that is not timm's default, and what becomes of it"""
import itertools

import pytest
import timm
import torch
from reid.pictures import market
from small_run import write_images
from timm.task import ClassificationTask
from torch import nn

from dreal_timm import DrealTask, find_sites
from dreal_timm.hub.results import flat_settings
from dreal_timm.probes.exact import ExactProbe
from dreal_timm.train import find_recipe, list_recipes, load_config
from dreal_timm.train.config import to_dict
from dreal_timm.train.loop import train_one_epoch
from dreal_timm.train.runner import run
from dreal_timm.train.setup import set_up

COMMON = {'device_modules': ['dreal_timm']}
SMALL = COMMON | {
    'num_classes': 10, 'input_size': [1, 32, 32], 'crop_pct': 1.0, 'interpolation': 'bilinear',
    'model': 'dreal_se_resnet18', 'model_kwargs': {'zero_init_last': False}, 'weight_decay': 5e-4, 'scale': [0.7, 1.0],
    'color_jitter': 0.0, 'train_interpolation': 'bilinear',
}
PAPER = COMMON | {
    'data_dir': 'data/imagenet', 'num_classes': 1000, 'input_size': [3, 224, 224], 'batch_size': 256, 'workers': 8,
    'pin_mem': True, 'model_kwargs': {'zero_init_last': False}, 'opt': 'momentum', 'weight_decay': 1e-4,
    'opt_kwargs': {'filter_bias_and_bn': False}, 'sched': 'step', 'lr': 0.1, 'epochs': 100, 'decay_epochs': 30.0,
    'warmup_epochs': 0, 'color_jitter': 0.0, 'train_interpolation': 'bilinear', 'smoothing': 0.0, 'crop_pct': 0.875,
    'interpolation': 'bilinear', 'log_interval': 100,
}
EFFECTIVE = {
    'quickstart': SMALL | {
        'data_dir': 'data/digits', 'mean': [0.3], 'std': [0.38], 'batch_size': 64, 'workers': 0, 'lr': 0.05,
        'epochs': 6, 'warmup_epochs': 0, 'hflip': 0.0, 'checkpoint_hist': 2, 'log_interval': 11,
    },
    'fashion_mnist': SMALL | {
        'data_dir': 'data/fashion-mnist', 'dataset': 'torch/fashion_mnist', 'mean': [0.286], 'std': [0.353],
        'workers': 2, 'lr': 0.1, 'epochs': 20, 'warmup_epochs': 1,
    },
    'imagenet_resnet50': PAPER,
    'imagenet_resnet101': PAPER | {'model': 'dreal_se_resnet101'},
    'imagenet_streaming': PAPER | {'dataset': 'wds/', 'data_dir': 'data/imagenet-wds'},
    'imagenet_modern': COMMON | {
        'data_dir': 'data/imagenet', 'num_classes': 1000, 'input_size': [3, 224, 224], 'batch_size': 256, 'workers': 8,
        'pin_mem': True, 'drop_path': 0.05, 'amp': True, 'amp_dtype': 'bfloat16', 'channels_last': True, 'opt': 'lamb',
        'weight_decay': 0.02, 'lr_base': 5e-3, 'lr_base_size': 2048, 'warmup_lr': 1e-6, 'min_lr': 1e-6,
        'color_jitter': 0.0, 'aa': 'rand-m7-mstd0.5-inc1', 'mixup': 0.1, 'cutmix': 1.0, 'bce_loss': True,
        'bce_target_thresh': 0.2,
        'smoothing': 0.0, 'crop_pct': 0.95, 'interpolation': 'bicubic', 'model_ema': True, 'model_ema_warmup': True,
        'log_interval': 100,
    },
    'finetune': COMMON | {
        'data_dir': 'data/images', 'batch_size': 64, 'model': 'seresnet50.a1_in1k', 'pretrained': True,
        'drop_path': 0.05, 'opt': 'adamw', 'weight_decay': 0.05, 'lr': 1e-4, 'min_lr': 1e-6, 'epochs': 20,
        'warmup_epochs': 2, 'warmup_lr': 1e-6, 'clip_grad': 1.0, 'scale': [0.35, 1.0], 'color_jitter': 0.2,
        'reprob': 0.1, 'checkpoint_hist': 3, 'log_interval': 20,
    },
}
REID = COMMON | {'model': 'dreal_reid', 'opt': 'adam', 'color_jitter': 0.0, 'train_interpolation': 'bilinear'}
PEOPLE = REID | {
    'model_kwargs': {'backbone': 'dreal_cbam_resnet50'}, 'weight_decay': 5e-4, 'reprob': 0.5, 'remode': 'const'}
EFFECTIVE |= {
    'reid_market1501': PEOPLE | {
        'data_dir': 'data/market1501', 'input_size': [3, 384, 128], 'workers': 8, 'pin_mem': True,
        'opt_kwargs': {'amsgrad': True, 'filter_bias_and_bn': False}, 'opt_betas': [0.9, 0.999], 'sched': 'step',
        'lr': 3e-4, 'decay_epochs': 40.0, 'epochs': 160, 'warmup_epochs': 0, 'eval_metric': 'epoch',
        'val_interval': 10,
    },
    'reid_custom': PEOPLE | {
        'data_dir': 'data/people', 'input_size': [3, 256, 128], 'batch_size': 64, 'sched': 'multistep', 'lr': 3.5e-4,
        'decay_milestones': [40, 70], 'epochs': 120, 'warmup_epochs': 10, 'warmup_lr': 3.5e-5, 'eval_metric': 'mAP',
        'val_interval': 5,
    },
    'reid_glyphs': REID | {
        'data_dir': 'data/glyphs', 'input_size': [1, 32, 32], 'mean': [0.5], 'std': [0.25], 'workers': 2,
        'model_kwargs': {'backbone': 'dreal_cbam_resnet18', 'backbone_args': {'zero_init_last': False}},
        'opt_kwargs': {'amsgrad': True}, 'weight_decay': 5e-4, 'lr': 3e-3, 'epochs': 20, 'warmup_epochs': 2,
        'hflip': 0.0, 'eval_metric': 'epoch', 'val_interval': 5,
    },
}
IMAGENET = ('imagenet_resnet50', 'imagenet_resnet101')
OF_THE_PAPER = {'actor_weight': 1.0, 'probe': 'exact', 'reward_clip': None}
DREAL = {
    'finetune': {'rotate': 'step'},
    'reid_market1501': OF_THE_PAPER | {'task': 'reid', 'start.backbone': 'resnet50.tv_in1k'},
    'reid_custom': {
        'task': 'reid', 'start.backbone': 'resnet50.a1_in1k', 'start.gates': 'open', 'reid.num_instances': 4},
    'reid_glyphs': {'task': 'reid', 'actor_weight': 1.0, 'reid.flip_test': False},
    **{name: OF_THE_PAPER for name in (*IMAGENET, 'imagenet_streaming')},
}


@pytest.mark.parametrize('name', sorted(list_recipes()))
def test_effective_values(name):
    """Each recipe sets what is pinned here, and leaves all else at timm's defaults, and DREAL's."""
    values, defaults = flat_settings(to_dict(load_config(name))), flat_settings(to_dict(load_config({})))
    for key, value in values.items():
        print(f'{name}  {key} = {value!r}')
    own = {f'dreal.{key}': value for key, value in DREAL.get(name, {}).items()}
    assert {key: value for key, value in values.items() if value != defaults[key]} == EFFECTIVE[name] | own


@pytest.mark.parametrize('name', sorted(list_recipes()))
def test_recipes_load(name):
    """Every recipe of the package loads, begins with its title and names the module that registers the models."""
    assert find_recipe(name).read_text(encoding='utf-8').startswith('# ')
    assert load_config(name).device_modules == ['dreal_timm']


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    """Grey images of three classes, which a network of three channels reads as coloured ones."""
    return write_images(tmp_path_factory.mktemp('photos') / 'data', train=8, validation=2)


def small(photos, tmp_path, *settings):
    return (
        f'data_dir={photos}', 'batch_size=8', 'workers=0', 'pin_mem=false', 'device=cpu', f'output={tmp_path}',
        'experiment=run', *settings,
    )


@pytest.mark.parametrize(('name', 'attention'), list(itertools.product(IMAGENET, ('se', 'cbam', 'srm'))))
def test_the_protocol_of_the_paper(photos, tmp_path, name, attention):
    """Sec. 4.1 to the letter, for each variant: optimizer, decay, schedule, transforms and loss as they are built."""
    depth = name.removeprefix('imagenet_')
    config = load_config(name, small(photos, tmp_path, f'model=dreal_{attention}_{depth}'))
    state = set_up(config)
    optimizer = state.optimizer.optimizer
    assert type(optimizer) is torch.optim.SGD
    decayed = {id(p) for group in optimizer.param_groups if group['weight_decay'] == 1e-4 for p in group['params']}
    assert decayed == {id(p) for p in state.model.parameters()}  # biases and norms too, the critic not
    for group in optimizer.param_groups:
        assert (group['momentum'], group['nesterov'], group['dampening']) == (0.9, False, 0)
    rates = []
    for epoch in range(state.epochs):
        rates.append(state.lr)
        state.scheduler.step(epoch + 1)
    assert rates == pytest.approx([0.1] * 30 + [0.01] * 30 + [0.001] * 30 + [0.0001] * 10)

    train, val = (str(loader.dataset.transform) for loader in (state.train_loader, state.validate.keywords['loader']))
    assert 'RandomResizedCropAndInterpolation(size=(224, 224), scale=(0.08, 1.0)' in train
    assert 'interpolation=bilinear' in train
    assert 'RandomHorizontalFlip(p=0.5)' in train
    assert 'ColorJitter(brightness=None, contrast=None, saturation=None, hue=None)' in train  # which does nothing
    assert 'Resize(size=256, interpolation=bilinear' in val
    assert 'CenterCrop(size=(224, 224))' in val
    assert state.train_loader.random_erasing is None
    assert type(state.task.criterion) is nn.CrossEntropyLoss
    assert state.task.criterion.label_smoothing == 0.0
    assert all(norm.weight.detach().min() == 1 for norm in state.model.modules() if isinstance(norm, nn.BatchNorm2d)
               and norm.weight.numel() > 1)  # zero_init_last=False
    assert (state.task.config.actor_weight, state.task.probe.rule.gamma, state.task.probe.rule.clip) == (1.0, 1.0, None)
    assert type(state.task.probe) is ExactProbe
    assert state.task.get_trainable_module().rotation.rotate == 'epoch'


@pytest.mark.filterwarnings('ignore:.*lr_scheduler.*')
def test_the_modern_recipe_trains(photos, tmp_path):
    """The modern recipe trains an epoch on a small network: bf16, LAMB, BCE, mixup, EMA and channels-last together."""
    model = 'test_resnet', "model_kwargs={'zero_init_last': false, 'block_args': {'attn_layer': 'se'}}"
    results = run('imagenet_modern', small(
        photos, tmp_path, f'model={model[0]}', model[1], 'num_classes=3', 'input_size=[3,64,64]', 'epochs=1',
        'warmup_epochs=0',
    ))
    assert {'validation', 'validation_ema'} <= set(results['epochs'][0])
    rate = results['epochs'][0]['lr']
    assert rate == pytest.approx(5e-3 * (8 / 2048) ** 0.5)


@pytest.mark.parametrize('freeze', ['', 'backbone'])
def test_the_finetune_recipe_trains(photos, tmp_path, freeze):
    """Fine-tuning starts from weights in a file, with a new classifier, and trains all of it or attention and head."""
    torch.manual_seed(0)
    pretrained = timm.create_model('dreal_se_resnet18', num_classes=11)
    torch.save(pretrained.state_dict(), tmp_path / 'weights.pth')
    state = set_up(load_config('finetune', small(
        photos, tmp_path, 'model=dreal_se_resnet18', 'num_classes=3', f'pretrained_path={tmp_path}/weights.pth',
        'input_size=[3,64,64]', f'dreal.start.freeze={freeze}',
    )))
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    assert torch.equal(before['layer3.1.conv2.weight'], pretrained.state_dict()['layer3.1.conv2.weight'])
    assert before['fc.weight'].shape == (3, 512)
    train_one_epoch(state, 0)
    changed = {name for name, value in state.model.state_dict().items() if not torch.equal(value, before[name])}
    assert {'fc.weight', 'layer2.0.se.fc1.weight', 'layer2.0.se.fc2.bias'} <= changed
    trained = {name for name in before if '.se.' in name or name.startswith('fc.')}
    assert (changed <= trained) == bool(freeze)
    assert ('layer1.0.bn1.running_mean' in changed) == (not freeze)


def test_finetuning_needs_the_number_of_classes(photos, tmp_path):
    """Without num_classes, a classifier that does not match the data is an error that tells the number."""
    with pytest.raises(ValueError, match=r'data set has 3 classes, the model as it comes 1000: add num_classes=3'):
        set_up(load_config('finetune', small(
            photos, tmp_path, 'model=dreal_se_resnet18', 'pretrained=false', 'input_size=[3,64,64]')))


VARIANTS = {
    'baseline': ('dreal.enabled=false', 'model_kwargs.backbone=resnet50'), 'attention': ('dreal.enabled=false',),
    'reinforce': (),
}


@pytest.mark.parametrize('variant', VARIANTS)
def test_the_protocol_of_reid(tmp_path, variant):
    """Sec. 4.2 to the letter, for each row of Table 2: network, optimizer, schedule, transforms, batches and loss."""
    people = market(tmp_path / 'data', {
        'bounding_box_train': [(pid, 1, 2) for pid in range(2, 20)], 'query': [(1, 1, 1)],
        'bounding_box_test': [(1, 2, 1)]})
    state = set_up(load_config('reid_market1501', (
        f'data_dir={people}', 'workers=0', 'pin_mem=false', 'device=cpu', f'output={tmp_path}', 'dreal.start.backbone=',
        *VARIANTS[variant])))
    head = f'# {variant}' if variant != 'baseline' else 'model_kwargs.backbone=resnet50   # baseline'
    assert head in find_recipe('reid_market1501').read_text(encoding='utf-8')  # as the recipe tells its user
    sites = 0 if variant == 'baseline' else 32
    assert len(find_sites(state.model)) == sites
    assert state.model.forward_features(torch.zeros(1, 3, 384, 128)).shape == (1, 2048, 24, 8)
    assert type(state.task) is (DrealTask if variant == 'reinforce' else ClassificationTask)
    optimizer = state.optimizer.optimizer
    assert type(optimizer) is torch.optim.Adam
    for group in optimizer.param_groups:
        assert (group['amsgrad'], tuple(group['betas'])) == (True, (0.9, 0.999))
    decayed = {id(p) for group in optimizer.param_groups if group['weight_decay'] == 5e-4 for p in group['params']}
    assert decayed == {id(p) for p in state.model.parameters() if p.requires_grad}
    rates = []
    for epoch in range(state.epochs):
        rates.append(state.lr)
        state.scheduler.step(epoch + 1)
    assert rates == pytest.approx([3e-4] * 40 + [3e-5] * 40 + [3e-6] * 40 + [3e-7] * 40)
    images, labels = next(iter(state.train_loader))
    assert images.shape == (128, 3, 384, 128)
    assert sorted(labels.bincount().tolist())[-16:] == [8] * 16
    assert state.train_loader.random_erasing.probability == 0.5
    transform = str(state.train_loader.dataset.transform)
    places = [transform.find(part) for part in (
        'Resize(size=(384, 128)', 'Pad(padding=10', 'RandomCrop(size=(384, 128)', 'RandomHorizontalFlip(p=0.5)')]
    assert -1 not in places and places == sorted(places), transform
    loss = state.task.criterion
    assert (loss.classification.label_smoothing, loss.triplet.margin, loss.triplet_weight) == (0.1, 0.5, 1.0)
    assert state.eval_metric == 'epoch'


@pytest.mark.parametrize('name', ['reid_custom', 'reid_glyphs'])
def test_the_reid_recipes_train(tmp_path, name):
    """The other recipes of re-identification train an epoch on a small set and a small network."""
    people = market(tmp_path / 'data')
    results = run(name, (
        f'data_dir={people}', 'batch_size=8', 'dreal.reid.num_instances=4', 'workers=0', 'device=cpu', 'epochs=1',
        f'output={tmp_path}', 'dreal.start.backbone=', 'warmup_epochs=0', 'input_size=[3,32,16]', 'mean=[0.5,0.5,0.5]',
        'std=[0.2,0.2,0.2]',
        "model_kwargs={'backbone': 'test_resnet', 'backbone_args': {'block_args': {'attn_layer': 'se'}}}",
    ))
    assert results['metrics']['queries'] == 3
