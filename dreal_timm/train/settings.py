"""The keys of a recipe: those of timm's args.yaml, with timm's meanings and defaults, and DREAL's own under `dreal:`

A key is one field. What its value is passed to stands in `build.py`, `datasets.py` and `loaders.py`.
"""
import json
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from dreal_timm.config import DrealConfig
from dreal_timm.options import Option, option, options_of

__all__ = [
    'LEFT', 'NOT_SUPPORTED', 'DrealBlock', 'HubOptions', 'ReidOptions', 'StartOptions', 'TrainConfig', 'blocks_of',
    'dotted_options', 'list_keys',
]

_INTERPOLATIONS = ('', 'nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')
_SCHEDULES = ('cosine', 'tanh', 'step', 'multistep', 'poly', 'wsd', 'rsqrt', 'constant', 'plateau', 'none')
_METRICS = ('top1', 'top5', 'loss', 'mAP', 'rank1', 'epoch')
_DECAYS = ('linear', '1-sqrt', 'cosine', 'power', 'exp')


@dataclass(frozen=True, kw_only=True)
class ReidOptions:
    """`dreal.reid:`, of re-identification alone: batches, loss and validation."""
    num_instances: int = option(8, 'images of an identity in a batch (K of P x K)', minimum=1)
    crop: str = option(
        'pad', "'pad' or 'enlarge' and crop, or 'timm': by timm's keys", choices=('pad', 'enlarge', 'timm'))
    margin: float = option(0.5, 'margin of the triplet loss', minimum=0)
    triplet_weight: float = option(1.0, 'weight of the triplet loss', minimum=0)
    dist_metric: str = option('cosine', 'distance of the validation', choices=('cosine', 'euclidean'))
    camera_rule: str = option(
        'exclude', "'exclude' answers of the query's own camera, or 'ignore' cameras", choices=('exclude', 'ignore'))
    flip_test: bool = option(True, 'validate means of features with those of the mirror image')


@dataclass(frozen=True, kw_only=True)
class StartOptions:
    """`dreal.start:`, what the network starts from, and what of it is trained."""
    backbone: str = option('', 'plain weights to start from: name of a timm model, folder or file; attention is fresh')
    gates: str = option('fresh', "'open' starts each gate near 1: features pass", choices=('fresh', 'open'))
    freeze: str = option('', "'backbone' trains attention modules and classifier alone", choices=('', 'backbone'))


@dataclass(frozen=True, kw_only=True)
class HubOptions:
    """`dreal.hub:`, where the network is sent to when the run ends."""
    push_to: str = option('', 'USER/NAME on the Hugging Face Hub that the network is sent to when the run ends')
    private: bool = option(False, 'create that repository as a private one')


@dataclass(frozen=True, kw_only=True)
class DrealBlock(DrealConfig):
    """`dreal:`, the options of the task and what DREAL's runs have beside them."""
    enabled: bool = option(True, 'false trains the plain network, with everything else equal')
    task: str = option(
        'classification', "'classification', or 'reid': identities, by images of several cameras",
        choices=('classification', 'reid'))
    reid: ReidOptions = field(default_factory=ReidOptions)
    start: StartOptions = field(default_factory=StartOptions)
    hub: HubOptions = field(default_factory=HubOptions)

    def of_task(self, seed: int) -> DrealConfig:
        """Return the options of `DrealTask`; the run's seed takes the place of none."""
        given = {each.name: getattr(self, each.name) for each in fields(DrealConfig)}
        return DrealConfig(**{**given, 'seed': seed if self.seed is None else self.seed})


@dataclass(kw_only=True)
class TrainConfig:
    """A configuration, as `load_config` makes it of a recipe: every key with its value."""
    # data
    data_dir: str | None = option(None, 'folder, or place of the shards, of the data set')
    dataset: str = option('', 'kind/name: torch/, hfds/, hfids/, wds/ or tfds/ and a name; empty is an image folder')
    train_split: str = option('train', 'split to train on')
    val_split: str = option('validation', 'split to validate on; empty validates nothing')
    train_num_samples: int | None = option(
        None, 'images of the training split, where a stream does not tell', minimum=1)
    val_num_samples: int | None = option(
        None, 'images of the validation split, where a stream does not tell', minimum=1)
    dataset_download: bool = option(False, 'let the library of the data set download it')
    dataset_trust_remote_code: bool = option(False, 'let a Hugging Face data set run its own code')
    class_map: str = option('', 'file that maps classes to indices')
    input_img_mode: str | None = option(None, "mode of the images, 'RGB' or 'L'; by the number of channels")
    input_key: str | None = option(None, 'field of a sample that holds the image (hfds, hfids, wds)')
    target_key: str | None = option(None, 'field of a sample that holds the label (hfds, hfids, wds)')
    # model
    model: str = option('dreal_se_resnet50', 'name of the model')
    pretrained: bool = option(False, 'start from pretrained weights')
    pretrained_path: str | None = option(None, 'file in place of the pretrained weights; the classifier starts anew')
    initial_checkpoint: str = option('', 'file with weights to start from')
    num_classes: int | None = option(None, 'number of classes; None is the default of the model', minimum=1)
    gp: str | None = option(None, "global pooling: 'avg', 'max', 'avgmax', 'catavgmax', 'fast'; None is the model's")
    in_chans: int | None = option(None, 'image channels; None is 3, or those of input_size', minimum=1)
    model_kwargs: dict[str, Any] = option({}, 'further arguments of the model')
    drop: float = option(0.0, 'dropout rate before the classifier', minimum=0, maximum=1)
    drop_path: float | None = option(None, 'stochastic depth rate', minimum=0, maximum=0.999)
    drop_block: float | None = option(None, 'rate of DropBlock, for models that have it', minimum=0, maximum=1)
    bn_momentum: float | None = option(None, 'momentum of batch norms, for models that take it', minimum=0, maximum=1)
    bn_eps: float | None = option(None, 'epsilon of batch norms, for models that take it', minimum=0)
    head_init_scale: float | None = option(None, 'factor on the weights that the classifier starts from')
    head_init_bias: float | None = option(None, 'bias that the classifier starts from')
    grad_checkpointing: bool = option(False, 'compute activations again in the backward pass, to save memory')
    # input
    img_size: int | None = option(None, 'side of the images, pixels', minimum=1)
    input_size: list[int] | None = option(None, 'channels, height and width of the images', minimum=1, length=3)
    crop_pct: float | None = option(None, 'share of the image that the validation keeps', minimum=0.001, maximum=1)
    mean: list[float] | None = option(None, 'mean of each channel, pixels in [0, 1]')
    std: list[float] | None = option(None, 'standard deviation of each channel', minimum=1e-12)
    interpolation: str = option('', 'interpolation of the resize', choices=_INTERPOLATIONS)
    batch_size: int = option(128, 'images a step and process', minimum=1)
    validation_batch_size: int | None = option(None, 'images a validation step; None is batch_size', minimum=1)
    # optimizer
    opt: str = option('sgd', 'name of the optimizer')
    opt_eps: float | None = option(None, 'epsilon of the optimizer')
    opt_betas: list[float] | None = option(None, 'betas of the optimizer')
    opt_kwargs: dict[str, Any] = option({}, 'further arguments of the optimizer')
    momentum: float = option(0.9, 'momentum of the optimizer', minimum=0, maximum=1)
    weight_decay: float = option(2e-5, 'weight decay', minimum=0)
    clip_grad: float | None = option(None, 'bound of the gradients; None does not clip', minimum=0)
    clip_mode: str = option('norm', 'what clip_grad bounds', choices=('norm', 'value', 'agc'))
    layer_decay: float | None = option(None, 'factor on the learning rate of the layer below', minimum=0, maximum=1)
    layer_decay_min_scale: float = option(0.0, 'lowest factor of layer_decay', minimum=0, maximum=1)
    layer_decay_no_opt_scale: float | None = option(None, 'layers with a factor below this are not trained', minimum=0)
    # schedule
    sched: str = option('cosine', 'learning rate schedule', choices=_SCHEDULES)
    sched_on_updates: bool = option(False, 'step the schedule with each update, not each epoch')
    lr: float | None = option(None, 'learning rate; None scales lr_base by the global batch size', minimum=0)
    lr_base: float = option(0.1, 'learning rate for a batch of lr_base_size', minimum=0)
    lr_base_size: int = option(256, 'batch size that lr_base is meant for', minimum=1)
    lr_base_scale: str = option('', 'scaling of lr_base; by the optimizer if empty', choices=('', 'linear', 'sqrt'))
    lr_noise: list[float] | None = option(
        None, 'where noise is on: one or two shares of the epochs', minimum=0, maximum=1)
    lr_noise_pct: float = option(0.67, 'largest noise, share of the learning rate', minimum=0)
    lr_noise_std: float = option(1.0, 'standard deviation of the noise', minimum=0)
    lr_cycle_mul: float = option(1.0, 'factor on the length of each cycle', minimum=0)
    lr_cycle_decay: float = option(0.5, 'factor on the learning rate of each cycle', minimum=0)
    lr_cycle_limit: int = option(1, 'number of cycles', minimum=1)
    lr_k_decay: float = option(1.0, 'k of the k-decay (cosine, poly)', minimum=1e-6)
    lr_decay_fn: str | None = option(None, 'shape of the last decay (wsd, rsqrt)', choices=_DECAYS)
    lr_stable_timescale: float | None = option(None, 'time scale in epochs (rsqrt); None is warmup_epochs', minimum=0)
    min_lr: float = option(0.0, 'lowest learning rate', minimum=0)
    epochs: int = option(300, 'epochs to train', minimum=1)
    stop_epoch: int | None = option(
        None, 'stop after so many epochs, on the schedule of all; resume goes on', minimum=1)
    start_epoch: int | None = option(
        None, 'number of the first epoch, from 0, in place of the checkpoint\'s', minimum=0)
    epoch_repeats: float = option(0.0, 'passes over a stream that make an epoch (hfids, tfds)', minimum=0)
    decay_milestones: list[int] = option([90, 180, 270], 'epochs of decay (multistep)')
    decay_epochs: float | None = option(None, 'epochs between decays (step: 90); length of it (wsd: 0.2)', minimum=1e-3)
    decay_rate: float = option(0.1, 'factor of a decay; power (poly)', minimum=0)
    patience_epochs: int = option(10, 'epochs without a better metric before a decay (plateau)', minimum=0)
    warmup_lr: float = option(1e-5, 'learning rate at the start of the warm-up', minimum=0)
    warmup_epochs: int = option(5, 'epochs of warm-up', minimum=0)
    warmup_prefix: bool = option(False, 'add the warm-up to the epochs')
    cooldown_epochs: int = option(0, 'epochs at min_lr after the schedule', minimum=0)
    # augmentation and regularisation
    no_aug: bool = option(False, 'no augmentation at all')
    train_crop_mode: str | None = option(None, 'crop mode of training', choices=('rrc', 'rkrc', 'rkrr'))
    scale: list[float] = option([0.08, 1.0], 'range of the random crop, share of the area', length=2, minimum=1e-6)
    ratio: list[float] = option([3. / 4., 4. / 3.], 'range of aspect ratios', length=2, minimum=1e-6)
    hflip: float = option(0.5, 'probability of a horizontal flip', minimum=0, maximum=1)
    vflip: float = option(0.0, 'probability of a vertical flip', minimum=0, maximum=1)
    color_jitter: float = option(0.4, 'strength of the colour jitter')
    color_jitter_prob: float | None = option(None, 'probability of the colour jitter', minimum=0, maximum=1)
    grayscale_prob: float | None = option(None, 'probability of a grey image', minimum=0, maximum=1)
    gaussian_blur_prob: float | None = option(None, 'probability of a blurred image', minimum=0, maximum=1)
    aa: str | None = option(None, 'AutoAugment policy')
    aug_repeats: float = option(0, 'repeats of an image in a batch of several processes', minimum=0)
    reprob: float = option(0.0, 'probability of random erasing', minimum=0, maximum=1)
    remode: str = option('pixel', 'mode of random erasing', choices=('const', 'rand', 'pixel'))
    recount: int = option(1, 'number of erased areas', minimum=1)
    resplit: bool = option(False, 'erase nothing in the first half of a batch')
    train_interpolation: str = option('random', 'interpolation of crops', choices=(*_INTERPOLATIONS, 'random'))
    mixup: float = option(0.0, 'alpha of mixup, which is on above 0', minimum=0)
    cutmix: float = option(0.0, 'alpha of cutmix, which is on above 0', minimum=0)
    cutmix_minmax: list[float] | None = option(
        None, 'range of the side of a cut, turns cutmix on', length=2, minimum=0, maximum=1)
    mixup_prob: float = option(1.0, 'probability of mixup or cutmix where one is on', minimum=0, maximum=1)
    mixup_switch_prob: float = option(0.5, 'probability of cutmix where both are on', minimum=0, maximum=1)
    mixup_mode: str = option('batch', 'what shares one mixing ratio', choices=('batch', 'pair', 'elem', 'half'))
    mixup_off_epoch: int = option(0, 'number of the epoch, from 0, from which nothing is mixed; 0 is never', minimum=0)
    smoothing: float = option(0.1, 'label smoothing', minimum=0, maximum=1)
    bce_loss: bool = option(False, 'binary cross-entropy in place of the softmax\'s')
    bce_sum: bool = option(False, 'sum the binary cross-entropy over the classes')
    bce_target_thresh: float | None = option(None, 'soft targets above this are 1, the others 0 (bce_loss)')
    bce_pos_weight: float | None = option(None, 'weight of the true class (bce_loss)', minimum=0)
    # batch norm and moving average
    sync_bn: bool = option(False, 'batch norm over all processes (needs GPUs)')
    dist_bn: str = option('reduce', 'how processes join batch norm statistics', choices=('broadcast', 'reduce', ''))
    no_ddp_bb: bool = option(False, 'do not broadcast buffers with each step')
    model_ema: bool = option(False, 'keep a moving average of the weights, validate it and export it')
    model_ema_decay: float = option(0.9998, 'decay of the moving average', minimum=0, maximum=1)
    model_ema_warmup: bool = option(False, 'let the decay grow')
    model_ema_force_cpu: bool = option(False, 'keep the moving average on the CPU; it is not validated')
    # precision and speed
    amp: bool = option(False, 'automatic mixed precision')
    amp_dtype: str = option('float16', 'its type', choices=('float16', 'bfloat16'))
    channels_last: bool = option(False, 'memory layout (B, H, W, C)')
    torchcompile: str | None = option(None, "compile with this backend, such as 'inductor'")
    torchcompile_mode: str | None = option(None, 'mode of torch.compile')
    fast_norm: bool = option(False, "timm's low-precision layer and group norms under amp")
    grad_accum_steps: int = option(1, 'steps whose gradients are joined in one update', minimum=1)
    # run
    seed: int = option(42, 'seed of everything that is random', minimum=0)
    worker_seeding: str = option('all', 'how loader processes are seeded', choices=('all', 'part'))
    workers: int = option(4, 'loader processes', minimum=0)
    pin_mem: bool = option(False, 'pin the memory of batches')
    no_prefetcher: bool = option(False, 'load without the prefetcher')
    device: str | None = option(None, "device; None takes an accelerator where there is one, 'cpu' forbids it")
    device_modules: list[str] | None = option(None, 'modules to import first')
    ddp_timeout: int | None = option(None, "seconds that processes wait for each other; None is torch's", minimum=1)
    resume: str = option('', "checkpoint to go on from, or 'auto': the last of the run's folder, if there is one")
    no_resume_opt: bool = option(False, 'resume without the state of the optimizer')
    log_interval: int = option(50, 'steps between lines of the log', minimum=1)
    log_with: list[str] | None = option(None, 'trackers, through Accelerate: tensorboard, wandb, trackio, ...')
    log_kwargs: dict[str, Any] = option({}, 'arguments of each tracker, by its name')
    val_interval: int = option(1, 'epochs between validations and checkpoints', minimum=1)
    eval_metric: str = option('top1', "metric of the best checkpoint; 'epoch' keeps the last", choices=_METRICS)
    checkpoint_hist: int = option(10, 'number of the best checkpoints to keep', minimum=1)
    save_epochs: list[int] | None = option(None, 'epochs done after which a checkpoint is kept for good', minimum=1)
    output: str = option('', "folder of the runs; empty is 'output/train'")
    experiment: str = option('', "name of the run's folder; empty is date, model and image size")

    # DREAL's own
    dreal: DrealBlock = field(default_factory=DrealBlock)


def blocks_of(cls: type) -> dict[str, type]:
    """Return the dataclasses that the keys of a block are blocks of themselves, by the name of the key."""
    return {each.name: each.type for each in fields(cls) if isinstance(each.type, type) and is_dataclass(each.type)}


def dotted_options(cls: type = TrainConfig, where: str = '') -> dict[str, Option]:
    """Return all options of a block and of the blocks in it, by their names with dots: 'dreal.start.backbone'."""
    found = {where + each.name: each for each in options_of(cls)}
    for name, block in blocks_of(cls).items():
        found |= dotted_options(block, f'{where}{name}.')
    return found


def list_keys() -> list[str]:
    """Return a line for each key: name, default, and what it means, with its choices."""
    lines = []
    for name, key in dotted_options().items():
        named = all(choice in key.help for choice in key.choices)
        choices = '' if named else f" ({', '.join(choice or repr(choice) for choice in key.choices)})"
        lines.append(f'{name:26} {json.dumps(key.default):22} {key.help}{choices}')
    return lines


# keys of `dreal:` that benchmarks/study has now
LEFT = (
    'reward_form', 'reward_standardized', 'wrong_samples', 'critic_standardized', 'taylor_sites', 'actor',
    'actor_start', 'actor_share')

_SIZES = 'one input_size holds for the whole run'
_NAFLEX = 'images have one size: set input_size'
_DISTILLATION = 'distillation is a task of its own'

# keys of timm's train.py without a meaning here: its default, and what to do instead. A recipe may carry the default.
NOT_SUPPORTED: dict[str, tuple[Any, str]] = {
    'task': ('classification', 'a reward needs one true class a sample, so that only classification is trained'),
    'fuser': ('', 'use torchcompile'),
    'torchscript': (False, 'use torchcompile'),
    'model_dtype': (None, 'weights are float32: use amp and amp_dtype'),
    'synchronize_step': (False, 'steps are never synchronised'),
    'local_rank': (0, 'the launcher sets it'),
    'drop_connect': (None, 'use drop_path'),
    'aug_splits': (0, 'they are for losses over splits, which have no loss a sample'),
    'jsd_loss': (False, 'it has no loss a sample: use bce_loss or smoothing'),
    'split_bn': (False, 'a probe cannot replay it: use sync_bn'),
    'recovery_interval': (0, 'a run resumes from the end of its last epoch: use resume=auto'),
    'save_images': (False, 'trackers get numbers alone'),
    'tta': (0, 'the validation sees each image once'),
    'use_multi_epochs_loader': (False, 'loaders start anew with each epoch, for a resumed run to see the same'),
    'log_wandb': (False, 'use log_with: wandb'),
    'wandb_project': (None, 'use log_kwargs: {wandb: {project: NAME}}'),
    'wandb_tags': ([], 'use log_kwargs: {wandb: {tags: [...]}}'),
    'wandb_resume_id': ('', 'a resumed run goes on with its own; or use log_kwargs: {wandb: {id: ID}}'),
    'train_img_sizes': (None, _SIZES),
    'train_batch_sizes': (None, _SIZES),
    'train_size_probs': (None, _SIZES),
    'train_size_schedule': ('constant', _SIZES),
    'train_size_schedule_spread': (0.65, _SIZES),
    'train_size_random_mix': (0.1, _SIZES),
    'train_batches_per_epoch': (None, 'an epoch is one pass; of a stream, train_num_samples'),
    'variable_batch_loss_scale': ('none', _SIZES),
    'naflex_loader': (False, _NAFLEX),
    'naflex_train_seq_lens': ([128, 256, 576, 784, 1024], _NAFLEX),
    'naflex_max_seq_len': (576, _NAFLEX),
    'naflex_patch_sizes': (None, _NAFLEX),
    'naflex_patch_size_probs': (None, _NAFLEX),
    'naflex_loss_scale': ('linear', _NAFLEX),
    'naflex_patchify_channels_first': (False, _NAFLEX),
    'kd_model_name': (None, _DISTILLATION),
    'kd_distill_type': ('logit', _DISTILLATION),
    'kd_loss_type': ('kl', _DISTILLATION),
    'distill_loss_weight': (None, _DISTILLATION),
    'task_loss_weight': (None, _DISTILLATION),
    'kd_temperature': (4.0, _DISTILLATION),
    'kd_student_feature_dim': (None, _DISTILLATION),
    'kd_teacher_feature_dim': (None, _DISTILLATION),
    'kd_token_distill_type': ('soft', _DISTILLATION),
}
