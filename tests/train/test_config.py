import json

import pytest
import yaml

from dreal_timm.config import DrealConfig
from dreal_timm.train import find_recipe, list_recipes, load_config
from dreal_timm.train.config import to_dict
from dreal_timm.train.settings import NOT_SUPPORTED, dotted_options

TIMM_DEFAULTS = {  # of timm's train.py, as its parser gives them
    'data_dir': None, 'dataset': '', 'train_split': 'train', 'val_split': 'validation', 'train_num_samples': None,
    'val_num_samples': None, 'dataset_download': False, 'class_map': '', 'input_img_mode': None, 'input_key': None,
    'target_key': None, 'dataset_trust_remote_code': False, 'pretrained': False, 'pretrained_path': None,
    'initial_checkpoint': '', 'resume': '', 'no_resume_opt': False, 'num_classes': None, 'gp': None, 'img_size':
    None, 'in_chans': None, 'input_size': None, 'crop_pct': None, 'mean': None, 'std': None, 'interpolation': '',
    'batch_size': 128, 'validation_batch_size': None, 'channels_last': False, 'grad_accum_steps': 1,
    'grad_checkpointing': False, 'fast_norm': False, 'model_kwargs': {}, 'head_init_scale': None, 'head_init_bias':
    None, 'torchcompile_mode': None, 'torchcompile': None, 'amp': False, 'amp_dtype': 'float16', 'no_ddp_bb': False,
    'device_modules': None, 'opt': 'sgd', 'opt_eps': None, 'opt_betas': None, 'momentum': 0.9, 'weight_decay':
    2e-05, 'clip_grad': None, 'clip_mode': 'norm', 'layer_decay': None, 'layer_decay_min_scale': 0,
    'layer_decay_no_opt_scale': None, 'opt_kwargs': {}, 'sched': 'cosine', 'sched_on_updates': False, 'lr': None,
    'lr_base': 0.1, 'lr_base_size': 256, 'lr_base_scale': '', 'lr_noise': None, 'lr_noise_pct': 0.67,
    'lr_noise_std': 1.0, 'lr_cycle_mul': 1.0, 'lr_cycle_decay': 0.5, 'lr_cycle_limit': 1, 'lr_k_decay': 1.0,
    'warmup_lr': 1e-05, 'min_lr': 0, 'epochs': 300, 'epoch_repeats': 0.0, 'start_epoch': None, 'decay_milestones':
    [90, 180, 270], 'warmup_epochs': 5, 'warmup_prefix': False, 'cooldown_epochs': 0, 'patience_epochs': 10,
    'decay_rate': 0.1, 'no_aug': False, 'train_crop_mode': None, 'scale': [0.08, 1.0], 'ratio': [0.75,
    1.3333333333333333], 'hflip': 0.5, 'vflip': 0.0, 'color_jitter': 0.4, 'color_jitter_prob': None,
    'grayscale_prob': None, 'gaussian_blur_prob': None, 'aa': None, 'aug_repeats': 0, 'bce_loss': False, 'bce_sum':
    False, 'bce_target_thresh': None, 'bce_pos_weight': None, 'reprob': 0.0, 'remode': 'pixel', 'recount': 1,
    'resplit': False, 'mixup': 0.0, 'cutmix': 0.0, 'cutmix_minmax': None, 'mixup_prob': 1.0, 'mixup_switch_prob':
    0.5, 'mixup_mode': 'batch', 'mixup_off_epoch': 0, 'smoothing': 0.1, 'train_interpolation': 'random', 'drop':
    0.0, 'drop_path': None, 'drop_block': None, 'bn_momentum': None, 'bn_eps': None, 'sync_bn': False, 'dist_bn':
    'reduce', 'model_ema': False, 'model_ema_force_cpu': False, 'model_ema_decay': 0.9998, 'model_ema_warmup':
    False, 'seed': 42, 'worker_seeding': 'all', 'log_interval': 50, 'val_interval': 1, 'checkpoint_hist': 10,
    'workers': 4, 'pin_mem': False, 'no_prefetcher': False, 'output': '', 'experiment': '', 'eval_metric': 'top1',
}
DREAL_DEFAULTS = {
    'gamma': 1.0, 'actor_weight': 0.1, 'probe': 'split', 'probe_every': 1, 'taylor_target': None, 'rotate': 'epoch',
    'reward_clip': 1.0, 'probe_dtype': None, 'seed': None, 'critic_cell': 'lstm', 'critic_hidden_size': 1,
    'critic_depth': 1, 'enabled': True, 'task': 'classification',
    'reid': {
        'num_instances': 8, 'crop': 'pad', 'margin': 0.5, 'triplet_weight': 1.0, 'dist_metric': 'cosine',
        'camera_rule': 'exclude', 'flip_test': True},
    'start': {'backbone': '', 'gates': 'fresh', 'freeze': ''},
    'hub': {'push_to': '', 'private': False},
}


def test_defaults_are_timms():
    """Keys have timm's names and defaults, DREAL's own those of the design."""
    config = to_dict(load_config({}))
    assert config.pop('dreal') == DREAL_DEFAULTS
    own = {  # no key of the script that was read, or with another default
        'ddp_timeout': None, 'decay_epochs': None, 'device': None, 'log_kwargs': {}, 'log_with': None,
        'lr_decay_fn': None, 'lr_stable_timescale': None, 'model': 'dreal_se_resnet50', 'save_epochs': None,
        'stop_epoch': None,
    }
    assert config == TIMM_DEFAULTS | own


def test_arguments_that_timm_wrote():
    """An args.yaml of timm's train.py, with all of its keys at their defaults, is a recipe."""
    written = TIMM_DEFAULTS | {name: default for name, (default, _) in NOT_SUPPORTED.items()} | {'model': 'seresnet50'}
    assert load_config(written).model == 'seresnet50'


@pytest.mark.parametrize('name', sorted(NOT_SUPPORTED))
def test_keys_that_are_not_supported(name):
    """A key of timm's without a meaning here is refused where it asks for something, with what to do instead."""
    default, instead = NOT_SUPPORTED[name]
    value = {bool: not default, str: 'x', int: 7, float: 0.123, list: [1], type(None): 'x'}[type(default)]
    with pytest.raises(ValueError, match=f"'{name}' .*not supported") as caught:
        load_config({name: value})
    assert instead in str(caught.value)
    assert load_config({name: default}, [f'{name}={json.dumps(default)}'])


def test_multilabel_is_refused():
    """A task without one true class a sample is refused in a line."""
    with pytest.raises(ValueError, match=r"'task' .*multilabel.*one true class"):
        load_config({'task': 'multilabel'})


def test_a_default_is_its_own():
    """Changing a configuration does not change the defaults."""
    load_config({}).model_kwargs['x'] = 1
    load_config({}).scale.append(3.0)
    assert load_config({}).model_kwargs == {}
    assert load_config({}).scale == [0.08, 1.0]


@pytest.mark.parametrize(('values', 'name', 'expected'), [
    ({'lr': '1e-4'}, 'lr', 1e-4),
    ({'weight_decay': '5.0e-4'}, 'weight_decay', 5e-4),
    ({'epochs': '7'}, 'epochs', 7),
    ({'epochs': 7.0}, 'epochs', 7),
    ({'input_size': ['1', 32, 32]}, 'input_size', [1, 32, 32]),
    ({'mean': 0.5}, 'mean', [0.5]),
    ({'no_aug': 'true'}, 'no_aug', True),
    ({'aa': 'rand-m9'}, 'aa', 'rand-m9'),
    ({'epochs': None}, 'epochs', 300),
    ({'lr': None}, 'lr', None),
])
def test_values_get_the_type_of_their_key(values, name, expected):
    """Numbers that YAML reads as text become numbers; null is the default."""
    value = getattr(load_config(values), name)
    assert value == expected
    assert type(value) is type(expected)


def test_reward_clip_may_be_null():
    """null is the literal equation for reward_clip, and not its default."""
    assert load_config({'dreal': {'reward_clip': None}}).dreal.reward_clip is None
    assert load_config({}, ['dreal.reward_clip=null']).dreal.reward_clip is None


@pytest.mark.parametrize(('values', 'message'), [
    ({'epochs': 'many'}, "epochs: expected a whole number, got 'many'"),
    ({'epochs': 1.5}, 'epochs: expected a whole number'),
    ({'epochs': True}, 'epochs: expected a whole number'),
    ({'lr': [0.1]}, 'lr: expected a number'),
    ({'no_aug': 'perhaps'}, 'no_aug: expected true or false'),
    ({'model': ['a']}, 'model: expected a text'),
    ({'model_kwargs': 3}, 'model_kwargs: expected a mapping'),
    ({'scale': ['a', 1]}, 'scale: expected a list of numbers'),
    ({'dreal': {'gamma': 'x'}}, 'dreal.gamma: expected a number'),
    ({'dreal': {'rotate': 'never'}}, "dreal.rotate: expected 'epoch', 'step' or a whole number"),
    ({'dreal': 3}, 'dreal: expected a mapping'),
    ({'dreal': {'reid': 3}}, 'dreal.reid: expected a mapping'),
    ({'dreal': {'reid': {'margin': -1}}}, 'dreal.reid.margin: must be 0 or more'),
    ({'dreal': {'start': {'gate': 'open'}}}, r"Unknown key 'dreal.start.gate' \(did you mean 'gates'\?\)"),
    ({'hflip': 5}, 'hflip: must be 1 or less'),
    ({'scale': 0.5}, 'scale: expected 2 values'),
    ({'interpolation': 'foo'}, "interpolation: expected one of .*'bicubic'"),
    ({'sched': 'foo'}, "sched: expected one of 'cosine'"),
    ({'epoch': 0}, r"Unknown key 'epoch' \(did you mean 'epochs'\?\)"),
    ({'dreal': {'enable': False}}, r"Unknown key 'dreal.enable' \(did you mean 'enabled'\?\)"),
    ({'epochs': 0}, 'epochs: must be 1 or more, got 0'),
    ({'batch_size': -8}, 'batch_size: must be 1 or more'),
    ({'workers': -1}, 'workers: must be 0 or more'),
    ({'lr': float('nan')}, 'lr: must be 0 or more'),
    ({'input_size': [3, 0, 32]}, 'input_size: must be 1 or more'),
    ({'dreal': {'critic_depth': 0}}, 'dreal.critic_depth: must be 1 or more'),
    ({'epoch': 3}, r"Unknown key 'epoch' \(did you mean 'epochs'\?\)"),
    ({'dreal': {'actor_wight': 3}}, r"Unknown key 'dreal.actor_wight' \(did you mean 'actor_weight'\?\)"),
    ({'zzzzzz': 3}, "Unknown key 'zzzzzz'"),
])
def test_wrong_values_and_keys(values, message):
    """A wrong type and an unknown key are said in one line, with the nearest key."""
    with pytest.raises(ValueError, match=message):
        load_config(values)


def test_keys_without_a_value_ask_for_nothing():
    """timm writes all of its keys into args.yaml: unknown ones that are null, false or empty are let through."""
    load_config({'fuser': '', 'jsd_loss': False, 'kd_model_name': None, 'wandb_tags': [], 'some_new_key': ''})
    with pytest.raises(ValueError, match='jsd_loss'):
        load_config({'jsd_loss': True})


def test_overrides():
    """key=value settings win over the recipe, also inside of mappings."""
    recipe = {'epochs': 3, 'model_kwargs': {'a': 1}, 'dreal': {'gamma': 0.5}}
    settings = ['epochs=5', 'model_kwargs.b=2', 'dreal.enabled=false', 'input_size=[3,64,64]', 'lr=1e-3']
    config = load_config(recipe, settings)
    assert (config.epochs, config.lr, config.input_size) == (5, 1e-3, [3, 64, 64])
    assert config.model_kwargs == {'a': 1, 'b': 2}
    assert (config.dreal.gamma, config.dreal.enabled) == (0.5, False)
    for wrong in ('epochs', '=3'):
        with pytest.raises(ValueError, match='key=value'):
            load_config({}, [wrong])
    for wrong in ('dreal.enable=false', 'worker=0'):
        with pytest.raises(ValueError, match='Unknown key'):
            load_config({}, [wrong])
    for text in ('010', '2024_01', '1:30', 'on'):
        assert load_config({}, [f'experiment={text}']).experiment == text


def test_recipes_are_found():
    """Recipes are found by file and by name; an unknown name lists those there are, and the nearest."""
    assert {'quickstart', 'fashion_mnist'} <= set(list_recipes())
    path = find_recipe('quickstart')
    assert find_recipe(path) == path
    with pytest.raises(FileNotFoundError, match=r"did you mean 'quickstart'.*fashion_mnist"):
        find_recipe('quikstart')


def test_files_that_are_no_recipes(tmp_path):
    """A file that is no YAML, or holds no mapping, is named."""
    for name, content in (('a', 'x: [1'), ('b', '- 1\n- 2'), ('c', '')):
        path = tmp_path / f'{name}.yaml'
        path.write_text(content)
        with pytest.raises(ValueError, match=path.name):
            load_config(path)


@pytest.mark.parametrize(('content', 'line'), [
    ('epochs: 3\nlr: 0.1\nepochs: 4\n', 3),
    ('lr: 0.1\ndreal:\n  gamma: 1.0\n  probe: exact\n  gamma: 0.5\n', 5),
    ('lr: 0.1\nepochs:\n', 2),
    ('model_kwargs: {a: 1, b: }\n', 1),
    ('lr: 0.1\nepochs: [1\nmodel: x\n', 3),
    ('a: b\n\tc: d\n', 2),
])
def test_faults_of_a_recipe_have_a_line(tmp_path, content, line):
    """A key that stands twice, one without a value, and wrong YAML are told with their line."""
    (tmp_path / 'r.yaml').write_text(content)
    with pytest.raises(ValueError, match=rf'r\.yaml, line {line}: '):
        load_config(tmp_path / 'r.yaml')


def test_null_and_empty_texts_in_a_recipe(tmp_path):
    """null asks for the default and '' for an empty text; an anchor is no second key."""
    (tmp_path / 'r.yaml').write_text(
        "epochs: null\nval_split: ''\nexperiment: ''\ndreal:\nmodel_kwargs:\n  a: &x {b: 1}\n  c: {<<: *x, d: 2}\n")
    config = load_config(tmp_path / 'r.yaml')
    assert (config.epochs, config.val_split) == (300, '')
    assert config.model_kwargs == {'a': {'b': 1}, 'c': {'b': 1, 'd': 2}}


@pytest.mark.parametrize('setting', ['epochs=', 'dreal.gamma=', 'model_kwargs=', 'model_kwargs.a=', 'lr=',
                                     'model_kwargs={a: 1, a: 2}'])
def test_a_setting_without_a_value(setting):
    """A setting without a value is an error, and not the default: 300 epochs for `epochs=`."""
    with pytest.raises(ValueError, match=setting.partition('=')[0]):
        load_config({}, [setting])


def test_an_empty_text_is_a_value():
    """A text may be empty."""
    assert load_config({}, ['val_split=']).val_split == ''


def test_the_folder_of_timms_arguments():
    """timm's train.py takes its folder as `data` or as `data_dir`; both are the folder of a recipe."""
    assert load_config({'data': 'images', 'data_dir': None}).data_dir == 'images'
    assert load_config({'data': None, 'data_dir': 'images'}).data_dir == 'images'
    assert load_config({'data': 'images'}, ['data_dir=others']).data_dir == 'others'


def test_configuration_round_trip(tmp_path):
    """The args.yaml of a run is a recipe that gives the same configuration."""
    config = load_config('quickstart', ['epochs=2', 'dreal.rotate=step'])
    path = tmp_path / 'args.yaml'
    path.write_text(yaml.safe_dump(to_dict(config)))
    assert to_dict(load_config(path)) == to_dict(config)


def test_keys_are_documented():
    """Every key has a meaning."""
    assert all(key.help for key in dotted_options().values())


def test_the_keys_are_these():
    """A key that comes or goes is a change for users, to be made here too: timm's, and DREAL's by its blocks."""
    own = {
        'ddp_timeout', 'decay_epochs', 'device', 'log_kwargs', 'log_with', 'lr_decay_fn', 'lr_stable_timescale',
        'model', 'save_epochs', 'stop_epoch'}
    dreal = {f'dreal.{name}' for name, value in DREAL_DEFAULTS.items() if not isinstance(value, dict)}
    blocks = {
        f'dreal.{block}.{name}' for block, values in DREAL_DEFAULTS.items() if isinstance(values, dict)
        for name in values}
    assert sorted(dotted_options()) == sorted(TIMM_DEFAULTS.keys() | own | dreal | blocks)


@pytest.mark.parametrize(('name', 'place'), [
    ('margin', 'dreal.reid.margin'), ('camera_rule', 'dreal.reid.camera_rule'), ('backbone', 'dreal.start.backbone'),
    ('gates', 'dreal.start.gates'), ('freeze', 'dreal.start.freeze'), ('push_to', 'dreal.hub.push_to'),
    ('push_private', 'dreal.hub.private'),
])
def test_keys_that_moved(name, place):
    """A key of `dreal:` at its place before is an error that says where it is now, as a setting too, and empty."""
    for values, settings in (({'dreal': {name: None}}, ()), ({}, [f'dreal.{name}=x']), ({}, [f'dreal.{name}='])):
        with pytest.raises(ValueError, match=rf"^Key 'dreal\.{name}' moved to {place}\.$"):
            load_config(values, settings)


@pytest.mark.parametrize('name', [
    'reward_form', 'reward_standardized', 'wrong_samples', 'critic_standardized', 'taylor_sites', 'actor',
    'actor_start', 'actor_share'])
def test_keys_that_left(name):
    """An option of the study in a recipe is an error that says where the study is."""
    with pytest.raises(ValueError, match=rf"^Key 'dreal\.{name}' left the product; benchmarks/study has it\.$"):
        load_config({'dreal': {name: 'x'}})


def test_options_that_contradict():
    """Options of the task that contradict each other are an error of the recipe."""
    with pytest.raises(ValueError, match='gamma must lie in'):
        load_config({'dreal': {'gamma': 2.0}})
    assert load_config({'dreal': {'gamma': 2.0, 'reward_clip': None}}).dreal.of_task(3) == DrealConfig(
        gamma=2.0, reward_clip=None, seed=3)
    assert load_config({'dreal': {'seed': 0}}).dreal.of_task(3).seed == 0
