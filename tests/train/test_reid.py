"""Re-identification in a run: batches, losses, validation, resume, and what is refused"""
import copy
import csv
import json
import logging
import random
from types import SimpleNamespace

import pytest
import timm
import torch
import yaml
from PIL import Image
from reid.pictures import market
from small_run import SE, assert_close, copied, recipe

from dreal_timm import DrealTask
from dreal_timm.cli import main
from dreal_timm.hub import export_run, load
from dreal_timm.reid import IdentityLoss, evaluate_reid, open_reid
from dreal_timm.train import load_config, run
from dreal_timm.train.loop import fit
from dreal_timm.train.reid import Reidentification
from dreal_timm.train.runner import describe
from dreal_timm.train.setup import set_up


def reid(people, output, dreal=None, **values):
    """A recipe of identities: batches of 2 x 4."""
    network = {'backbone': 'test_resnet', 'backbone_args': SE}
    return recipe(people, output, **{
        'model': 'dreal_reid', 'model_kwargs': network, 'num_classes': None, 'input_size': [3, 32, 16],
        'mean': [0.5] * 3, 'std': [0.25] * 3, 'opt': 'adam', 'lr': 1e-3, 'eval_metric': 'mAP', 'batch_size': 8,
        'hflip': 0.5, **values, 'dreal': {'task': 'reid', 'reid': {'num_instances': 4}, **(dreal or {})}})


@pytest.fixture(scope='module')
def people(tmp_path_factory):
    """A data set in Market-1501's layout; one of four queries has no answer. Not to be changed."""
    return market(tmp_path_factory.mktemp('people') / 'data')


@pytest.fixture(scope='module')
def finished(people, tmp_path_factory):
    path = tmp_path_factory.mktemp('output')
    return run(reid(people, path, epochs=3, model_ema=True, model_ema_decay=0.5, reprob=0.5)), path / 'run'


def test_results(finished):
    """A run is ranked by mAP of the moving average, and tells losses and metrics of each epoch."""
    results, directory = finished
    assert results['metrics'] == max((row['validation_ema'] for row in results['epochs']), key=lambda row: row['mAP'])
    assert (results['metrics']['queries'], results['metrics']['skipped']) == (3, 1)
    assert 0 < results['metrics']['mAP'] <= 100
    train = results['epochs'][-1]['train']
    assert train['class_loss'] == pytest.approx(train['id_loss'] + train['triplet_loss'], abs=1e-5)
    pushed = train['class_loss'] + 0.1 * train['actor_loss'] + train['critic_loss']  # actor_weight
    assert train['loss'] == pytest.approx(pushed, abs=1e-5)
    rows = list(csv.DictReader((directory / 'summary.csv').open()))
    assert {'train_triplet_loss', 'eval_mAP', 'eval_rank1', 'eval_ema_mINP'} <= set(rows[0])
    assert f"mAP {results['metrics']['mAP']:.2f} %, rank-1 {results['metrics']['rank1']:.2f} %" in describe(results)


def test_export(finished, people):
    """What is exported are the embeddings of the best epoch, which evaluate to what the run told."""
    results, directory = finished
    model = timm.create_model(f'local-dir:{directory}/model', pretrained=True).eval()
    assert (model.num_classes, model(torch.zeros(2, 3, 32, 16)).shape) == (0, (2, model.num_features))
    best = torch.load(directory / 'model_best.pth.tar', weights_only=True)['state_dict_ema']
    assert not [name for name, value in model.state_dict().items() if not torch.equal(value, best[name])]
    for source in (directory, directory / 'model'):
        found = evaluate_reid(source, people, workers=0, batch_size=5)[0]
        assert {name: found[name] for name in results['metrics']} == pytest.approx(results['metrics'], abs=1e-6)
    assert found['training']['dreal']['task'] == 'reid'
    config = json.loads((directory / 'model' / 'config.json').read_text())
    assert config['model_args']['backbone'] == 'test_resnet'
    assert 'label_names' not in config


def batch_hard(features, labels, margin):
    """The triplet loss by the book: for each anchor its farthest positive and its nearest negative."""
    losses = []
    for i, anchor in enumerate(features):
        far = [(anchor - other).norm() for j, other in enumerate(features) if j != i and labels[j] == labels[i]]
        near = [(anchor - other).norm() for j, other in enumerate(features) if labels[j] != labels[i]]
        losses.append((max(far) - min(near) + margin).clamp(min=0))
    return torch.stack(losses).mean()


def network(**kwargs):
    torch.manual_seed(0)
    return timm.create_model('dreal_reid', backbone='test_resnet', backbone_args=SE, num_classes=3, **kwargs)


@pytest.mark.parametrize(('margin', 'weight'), [(0.5, 1.0), (0.1, 0.3)])
def test_loss_is_the_books(margin, weight):
    """The loss is smoothed cross-entropy of the logits and batch-hard triplets of what enters the neck."""
    model = network().train()
    loss = IdentityLoss(model, smoothing=0.2, margin=margin, triplet_weight=weight)
    input, target = torch.randn(8, 3, 32, 16), torch.tensor([0, 0, 1, 1, 2, 2, 0, 1])
    seen = []
    model.neck.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    output = model(input)
    total = loss(output, target)
    log_probs = output.log_softmax(1)
    smooth = -(0.8 * log_probs.gather(1, target[:, None])[:, 0] + 0.2 * log_probs.mean(1)).mean()
    triplet = batch_hard(seen[0], target.tolist(), margin)
    torch.testing.assert_close(total, smooth + weight * triplet)
    assert {name: float(value) for name, value in loss.parts.items()} == pytest.approx(
        {'id_loss': smooth.item(), 'triplet_loss': triplet.item()})
    expected = torch.autograd.grad(smooth + weight * triplet, list(model.backbone.parameters()), retain_graph=True)
    actual = torch.autograd.grad(total, list(model.backbone.parameters()))
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_loss_without_a_pass():
    """A loss without a pass of its own network, or with features of another batch, is an error; evaluation is none."""
    model = network().train()
    loss = IdentityLoss(model)
    output, target = model(torch.randn(4, 3, 32, 16)), torch.tensor([0, 0, 1, 1])
    loss(output, target)
    with pytest.raises(RuntimeError, match='without a pass'):
        loss(output, target)
    model(torch.randn(6, 3, 32, 16))
    with pytest.raises(RuntimeError, match='without a pass'):
        loss(output, target)
    with torch.no_grad():
        assert loss(output, target).isfinite()


@pytest.mark.parametrize('probe', ['exact', 'split'])
def test_counterfactual_passes_are_not_the_loss_features(probe):
    """The triplets of a reinforced step are those of the judged pass: with actor_weight 0 the plain gradients."""
    input, target = torch.randn(8, 3, 32, 16), torch.tensor([0, 0, 1, 1, 2, 2, 0, 1])
    gradients = []
    for reinforced in (False, True):
        model = network().train()
        loss = IdentityLoss(model)
        if reinforced:
            task = DrealTask(
                model, criterion=loss, verbose=False, input_size=(3, 32, 16), probe=probe, actor_weight=0)
            task.get_trainable_module().train()
            task(input, target)['loss'].backward()
        else:
            loss(model(input), target).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, value in gradients[0].items():
        assert torch.equal(value, gradients[1][name]), name


def test_taylor_is_refused(people, tmp_path):
    """First-order rewards need a loss that is a mean over samples, which triplets are not."""
    with pytest.raises(ValueError, match=r"taylor.*IdentityLoss.*'split' work with any loss"):
        run(reid(people, tmp_path, {'probe': 'taylor'}))
    assert not (tmp_path / 'run').exists()


def loader(people, process=0, processes=1, **values):
    config = load_config(reid(people, '', **values))
    data = {
        'input_size': (3, 32, 16), 'mean': (0.5,) * 3, 'std': (0.25,) * 3, 'interpolation': 'bilinear'}
    place = SimpleNamespace(device=torch.device('cpu'), process_index=process, num_processes=processes)
    return Reidentification(config, place).train_loader(data, None)


@pytest.mark.parametrize('prefetch', [True, False])
def test_batches(people, prefetch):
    """A batch has 4 images of each of 2 identities, normalised; epochs differ, and repeat by their number."""
    batches = {}
    train = loader(people, no_prefetcher=not prefetch)
    for epoch in (0, 1, 0):
        train.batch_sampler.set_epoch(epoch)
        torch.manual_seed(0)
        random.seed(0)
        found = list(train)
        for images, labels in found:
            assert images.shape == (8, 3, 32, 16)
            assert sorted(labels.bincount().tolist())[-2:] == [4, 4]
            assert images.min() >= -2.01 and images.max() <= 2.01 and images.std() > 0.05
        if epoch in batches:
            for (images, labels), (others, same) in zip(found, batches[epoch], strict=True):
                assert torch.equal(images, others) and torch.equal(labels, same)
        batches[epoch] = found
    assert len(batches[0]) == len(train) == 2
    assert any(not torch.equal(a[0], b[0]) for a, b in zip(*batches.values(), strict=True))


@pytest.mark.parametrize(('crop', 'said'), [
    ('pad', ['Resize(size=(32, 16)', 'Pad(padding=1', 'RandomCrop(size=(32, 16)', 'RandomHorizontalFlip(p=0.5)']),
    ('enlarge', ['Resize(size=(36, 18)', 'RandomCrop(size=(32, 16)', 'RandomHorizontalFlip(p=0.5)']),
    ('timm', ['RandomResizedCropAndInterpolation(size=(32, 16), scale=(0.5, 1.0)', 'RandomHorizontalFlip(p=0.5)']),
])
def test_crops(people, crop, said):
    """The crop is one of three, and flip, colour and all else stay those of timm's keys."""
    options = {'reid': {'num_instances': 4, 'crop': crop}}
    transform = str(loader(people, dreal=options, scale=[0.5, 1.0], color_jitter=0.3).dataset.transform)
    places = [transform.find(part) for part in [*said, 'ColorJitter(brightness=(0.7']]
    assert -1 not in places and places == sorted(places), transform


def test_no_augmentation(people):
    """With no_aug images are resized and nothing else."""
    transform = str(loader(people, no_aug=True).dataset.transform)
    assert 'Random' not in transform and 'Resize(size=(32, 16)' in transform


@pytest.mark.parametrize('workers', [0, 2])
def test_resume_to_the_bit(people, tmp_path, workers):
    """A run that was stopped ends where one that was not does: weights, average, critic, optimizer."""
    values = dict(epochs=4, workers=workers, model_ema=True, reprob=0.5, color_jitter=0.3, sched='step', decay_epochs=2)
    run(reid(people, tmp_path, experiment='whole', **values))
    run(reid(people, tmp_path, experiment='parts', stop_epoch=2, **values))
    run(reid(people, tmp_path, experiment='parts', resume='auto', **values))
    whole, parts = (
        torch.load(tmp_path / name / 'last.pth.tar', weights_only=True) for name in ('whole', 'parts'))
    for key in ('state_dict', 'state_dict_ema'):
        assert all(torch.equal(value, parts[key][name]) for name, value in whole[key].items())
    assert all(
        torch.equal(value, parts['task_state']['critic'][name])
        for name, value in whole['task_state']['critic'].items())
    assert whole['history'] == parts['history']


def test_without_reinforcement(people, tmp_path):
    """With actor_weight 0 the network ends bit for bit where plain training of it does."""
    states = []
    for name, dreal in (('plain', {'enabled': False}), ('zero', {'actor_weight': 0})):
        run(reid(people, tmp_path, dreal, experiment=name, epochs=2))
        states.append(torch.load(tmp_path / name / 'last.pth.tar', weights_only=True)['state_dict'])
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_the_last_epoch(people, tmp_path):
    """With eval_metric 'epoch' the last one is exported, whatever its mAP, and the last ones are kept."""
    results = run(reid(people, tmp_path, epochs=3, eval_metric='epoch', checkpoint_hist=2, lr=0.5))
    assert results['best_epoch'] == 2
    assert results['metrics'] == results['epochs'][-1]['validation']
    assert {path.name for path in (tmp_path / 'run').glob('checkpoint-*')} == {
        'checkpoint-1.pth.tar', 'checkpoint-2.pth.tar'}
    unvalidated = run(reid(people, tmp_path, experiment='none', epochs=2, val_split='', eval_metric='epoch'))
    assert unvalidated['best_epoch'] == 1


def test_frozen_backbone(people, tmp_path):
    """freeze: backbone trains attention modules, neck and classifier; the neck's bias stays 0."""
    state = set_up(load_config(reid(people, tmp_path, {'start': {'freeze': 'backbone'}}, epochs=1)))
    state.directory.mkdir(parents=True)
    before = copied(state.model)
    fit(state)
    changed = {name for name, value in state.model.state_dict().items() if not torch.equal(value, before[name])}
    assert {'neck.weight', 'fc.weight', 'neck.running_mean'} <= changed
    assert all(name.split('.')[0] in ('neck', 'fc') or '.se.' in name for name in changed)
    assert 'neck.bias' not in changed


def test_warm_start(people, tmp_path, caplog):
    """dreal.start.backbone starts the backbone alone, with fresh attention, and lists what has no place."""
    torch.manual_seed(1)
    plain = timm.create_model('test_resnet', num_classes=10)
    weights = plain.state_dict()
    weights |= {f'stray{i}': torch.zeros(1) for i in range(5)}
    torch.save(weights, tmp_path / 'plain.pth')
    with caplog.at_level(logging.INFO):
        state = set_up(load_config(reid(people, tmp_path, {'start': {'backbone': str(tmp_path / 'plain.pth')}})))
    own = state.model.backbone.state_dict()
    assert all('.se.' in name or torch.equal(value, weights[name]) for name, value in own.items())
    assert any('stray4' in record.getMessage() and 'fc.weight' in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize('values', [
    {'amp': True, 'amp_dtype': 'bfloat16'}, {'grad_accum_steps': 2, 'clip_grad': 1.0},
    {'channels_last': True, 'no_prefetcher': True}, {'grad_checkpointing': True},
    {'val_split': '', 'eval_metric': 'top1'},
])
def test_settings(people, tmp_path, values):
    """Runs with the settings of the core end with finite losses."""
    results = run(reid(people, tmp_path, epochs=1, **values))
    assert results['epochs'][-1]['train']['triplet_loss'] < 50
    assert load(str(tmp_path / 'run' / 'model')).num_classes == 0


@pytest.mark.filterwarnings('ignore')  # of the compiler's own
@pytest.mark.parametrize('enabled', [True, False])
def test_compiled_run(people, tmp_path, enabled):
    """A compiled run has the losses and the weights of an eager one."""
    ends = []
    for backend in (None, 'eager'):
        results = run(reid(
            people, tmp_path, {'enabled': enabled}, experiment=f'{backend}', torchcompile=backend, epochs=1))
        state = torch.load(tmp_path / f'{backend}' / 'last.pth.tar', weights_only=True)['state_dict']
        ends.append((results['epochs'][0]['train'], state))
    for name in ('id_loss', 'triplet_loss'):
        assert ends[1][0][name] == pytest.approx(ends[0][0][name], rel=1e-4)
    assert_close(ends[1][1], ends[0][1], 1e-3)


def test_grey_images(people, tmp_path):
    """Networks of one channel see grey images."""
    results = run(reid(people, tmp_path, epochs=1, input_size=[1, 32, 16], mean=[0.5], std=[0.25]))
    assert load(results['model']).eval()(torch.zeros(1, 1, 32, 16)).shape[0] == 1


def write_csv(folder, rows):
    folder.mkdir()
    Image.new('RGB', (8, 16)).save(folder / 'a.png')
    (folder / 'table.csv').write_text('\n'.join(rows))
    return folder


def one_pixel(root):
    Image.new('RGB', (1, 1)).save(market(root) / 'query' / '0001_c1s1_000000_01.jpg')
    return root


def no_image(root):
    (market(root) / 'bounding_box_train' / '0002_c1s1_000000_01.jpg').write_bytes(b'no image')
    return root


def no_query(root):
    for path in (market(root) / 'query').iterdir():
        path.unlink()
    return root


def one_camera(root):
    return market(root, {
        'bounding_box_train': [(2, 1, 4), (7, 1, 4), (10, 1, 4)], 'query': [(1, 1, 1)],
        'bounding_box_test': [(1, 1, 3), (3, 1, 3)]})


def one_identity(root):
    return market(root, {
        'bounding_box_train': [(2, 1, 4)], 'query': [(1, 1, 1)], 'bounding_box_test': [(1, 2, 3)]})


@pytest.mark.parametrize(('make', 'values', 'message'), [
    (one_pixel, {}, 'is 1 x 1 pixels'),
    (no_image, {}, 'cannot be read'),
    (no_query, {}, "the split 'query' has no image"),
    (one_camera, {}, "of the query's own camera alone, which the rule 'ignore' lets count"),
    (one_identity, {}, 'A batch has 2 identities, and the training split has 1'),
    (lambda root: write_csv(root, ['path,pid,split', 'a.png,1,train']), {}, 'camid'),
    (lambda root: write_csv(root, ['path,pid,camid,split', '../a.png,1,1,train']), {}, 'outside of'),
    (market, {'eval_metric': 'top1'}, "eval_metric: with dreal.task=reid one of mAP, rank1, epoch, got 'top1'"),
    (market, {'mixup': 0.2}, 'mixup, cutmix: means nothing with dreal.task=reid'),
    (market, {'bce_loss': True}, 'bce_loss: means nothing'),
    (market, {'batch_size': 6}, 'batch_size: 6 is no number of identities times dreal.reid.num_instances=4'),
    (market, {'num_classes': 7}, 'num_classes: 7, but there are 3 identities'),
    (market, {'dataset': 'reid/market'}, "did you mean 'reid/market1501'"),
    (market, {'model': 'test_resnet', 'model_kwargs': SE}, 'set model=dreal_reid model_kwargs.backbone=test_resnet'),
    (market, {'sched': 'plateau', 'eval_metric': 'epoch'}, 'needs a metric that can stop improving'),
    (lambda root: root, {}, 'No folder'),
])
def test_errors(tmp_path, capsys, make, values, message):
    """What cannot be trained gets one line and exit code 2, and leaves no folder."""
    path = tmp_path / 'recipe.yaml'
    path.write_text(yaml.safe_dump(reid(make(tmp_path / 'data'), tmp_path / 'output', **values)))
    assert main(['train', str(path)]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if 'error' in line]
    assert len(error) == 1 and message in error[0], error
    assert not (tmp_path / 'output').exists()


def test_one_image_of_an_identity(tmp_path):
    """An identity with one image is trained on: its batch has it four times."""
    people = market(tmp_path / 'data', {
        'bounding_box_train': [(2, 1, 1), (7, 1, 1)], 'query': [(1, 1, 1)], 'bounding_box_test': [(1, 2, 3)]})
    results = run(reid(people, tmp_path, epochs=1))
    assert results['epochs'][-1]['train']['triplet_loss'] < 50


@pytest.mark.parametrize(('folder', 'pid'), [('bounding_box_train', '0010'), ('query', '0003')])
def test_an_image_that_is_cut_off(tmp_path, capsys, folder, pid):
    """An image whose end is missing, behind a header that is whole, stops the run before anything is written."""
    people = market(tmp_path / 'data')
    for path in (people / folder).glob(f'{pid}*.jpg'):
        path.write_bytes(path.read_bytes()[:-200])
    path = tmp_path / 'recipe.yaml'
    path.write_text(yaml.safe_dump(reid(people, tmp_path / 'output')))
    assert main(['train', str(path)]) == 2
    assert f'{pid}_c' in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / 'output').exists()


@pytest.mark.parametrize('workers', [0, 2])
def test_an_image_that_breaks_while_it_trains(tmp_path, capsys, workers, monkeypatch):
    """An image that cannot be read any more stops the run with its name: a batch without it would not be P x K."""
    people = market(tmp_path / 'data')
    path = tmp_path / 'recipe.yaml'
    path.write_text(yaml.safe_dump(reid(people, tmp_path / 'output', workers=workers)))

    def broken(config, data, processes):
        for image in (people / 'bounding_box_train').glob('0010*.jpg'):
            image.write_bytes(image.read_bytes()[:-200])

    monkeypatch.setattr('dreal_timm.train.reid._read_all', broken)
    assert main(['train', str(path)]) == 2
    assert '0010_c' in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(('values', 'found'), [
    ({'model_kwargs': {'global_pool': 'gem'}}, 'gem'), ({'gp': 'max'}, 'max'),
    ({'gp': 'max', 'model_kwargs': {'global_pool': 'avg'}}, 'avg')])
def test_pooling_of_a_recipe(people, tmp_path, values, found):
    """Pooling is a key of timm, or an argument of the network, which comes first."""
    kwargs = {'backbone': 'test_resnet', 'backbone_args': SE, **values.pop('model_kwargs', {})}
    assert set_up(load_config(reid(people, tmp_path, model_kwargs=kwargs, **values))).model.pool_type == found


def test_keys_that_reach_the_backbone(people, tmp_path):
    """Stochastic depth and batch norms are the backbone's, the scale of the classifier is its own."""
    kwargs = {'backbone': 'test_efficientnet'}
    model = set_up(load_config(reid(
        people, tmp_path, model_kwargs=kwargs, drop_path=0.3, bn_momentum=0.05, bn_eps=0.01, head_init_scale=0.0,
    ))).model
    norms = [module for module in model.backbone.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert {(norm.momentum, norm.eps) for norm in norms} == {(0.05, 0.01)}
    assert any(getattr(module, 'drop_prob', 0.0) for module in model.backbone.modules())
    assert not model.fc.weight.any()
    with pytest.raises(ValueError, match='head_init_bias: the classifier has no bias'):
        set_up(load_config(reid(people, tmp_path, head_init_bias=0.1)))
    with pytest.raises(ValueError, match=r'pretrained: dreal_reid has no weights.*dreal\.start\.backbone'):
        set_up(load_config(reid(people, tmp_path, pretrained=True)))


@pytest.mark.parametrize('kind', ['model.safetensors', 'model_best.pth.tar'])
def test_warm_start_from_an_embedding_network(finished, people, tmp_path, kind):
    """dreal.start.backbone takes an embedding network of one's own too: the backbone inside of it is the network."""
    _, directory = finished
    path = directory / kind if 'best' in kind else directory / 'model' / kind
    model = set_up(load_config(reid(people, tmp_path, {'start': {'backbone': str(path)}}))).model
    exported = load(str(directory / 'model')).state_dict()
    assert torch.equal(model.backbone.conv1[0].weight, exported['backbone.conv1.0.weight'])


def test_the_loss_is_no_hindrance_to_copies():
    """A network whose loss has seen a pass can be copied, as a moving average does."""
    model = network().train()
    loss = IdentityLoss(model)
    output = model(torch.randn(4, 3, 32, 16))
    copied = copy.deepcopy(model)
    loss(output, torch.tensor([0, 0, 1, 1])).backward()
    assert copied.fc.weight.grad is None


def test_export_measures_as_the_run_did(tmp_path):
    """A run on one camera, without flips, is measured on data by its own rule; elsewhere the card says where."""
    people = market(tmp_path / 'data', {
        'bounding_box_train': [(1, 1, 4), (2, 1, 4)], 'query': [(3, 1, 1), (4, 1, 1)],
        'bounding_box_test': [(3, 1, 2), (4, 1, 2)]})
    own = {'reid': {
        'num_instances': 4, 'camera_rule': 'ignore', 'flip_test': False, 'dist_metric': 'euclidean'}}
    run(reid(people, tmp_path, own, epochs=1))
    assert main(['export', str(tmp_path / 'run'), str(tmp_path / 'own'), '--data', str(people)]) == 0
    told = json.loads((tmp_path / 'own' / 'training' / 'results.json').read_text())
    assert told['settings'] == {
        'metric': 'euclidean', 'camera_rule': 'ignore', 'flip': False, 'rerank': False, 'multi_query': False}
    card = (tmp_path / 'own' / 'README.md').read_text()
    assert 'trained on Market-1501' in card or 'trained on market1501' in card
    assert 'The epoch was chosen' in card
    rows = ['path,pid,camid,split'] + [
        f'{path.relative_to(people)},{int(path.name[:4])},1,{split}' for folder, split in (
            ('bounding_box_train', 'train'), ('query', 'query'), ('bounding_box_test', 'gallery'))
        for path in sorted((people / folder).glob('*.jpg'))]
    (people / 'other.csv').write_text('\n'.join(rows))
    assert main(['export', str(tmp_path / 'run'), str(tmp_path / 'far'), '--data', str(people / 'other.csv')]) == 0
    card = (tmp_path / 'far' / 'README.md').read_text()
    assert 'trained on Market-1501' in card or 'trained on market1501' in card
    assert '2 queries in 6 images of a set of identities of its own' in card
    assert 'The epoch was chosen' not in card


def test_layouts_are_one_key(people, tmp_path):
    """A table of the same images gives the same batches and the same metrics."""
    rows = ['path,pid,camid,split']
    data = open_reid(people)
    for split in ('train', 'query', 'gallery'):
        for image in getattr(data, split):
            path = image.path.relative_to(people)
            rows.append(f'{path},{image.pid},{image.camid},{split}')
            target = tmp_path / 'copy' / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(image.path.read_bytes())
    (tmp_path / 'copy' / 'table.csv').write_text('\n'.join(rows))
    first = run(reid(people, tmp_path, experiment='market', epochs=1))
    second = run(reid(tmp_path / 'copy', tmp_path, experiment='csv', epochs=1, dataset='reid/csv'))
    assert first['metrics'] == second['metrics']
    assert first['epochs'] == second['epochs']


@pytest.fixture(scope='module')
def control(finished, people, tmp_path_factory):
    """The plain network of the same settings."""
    path = tmp_path_factory.mktemp('control')
    run(reid(people, path, {'enabled': False}, epochs=3, model_ema=True, model_ema_decay=0.5, reprob=0.5))
    return path / 'run'


def test_card(finished, control, people, tmp_path, capsys):
    """The card of an exported run has mAP and rank-1 of these weights beside the plain network's, and says how."""
    results, directory = finished
    for name, folder in (('own', directory), ('plain', control)):
        assert main([
            'reid', 'eval', str(folder / 'model'), '--data', str(people), '--workers', '0', '--results',
            str(tmp_path / f'{name}.json')]) == 0
    told = {name: json.loads((tmp_path / f'{name}.json').read_text()) for name in ('own', 'plain')}
    assert main([
        'export', str(directory), str(tmp_path / 'given'), '--results', str(tmp_path / 'own.json'), '--control',
        str(tmp_path / 'plain.json')]) == 0
    card = (tmp_path / 'given' / 'README.md').read_text()
    front = yaml.safe_load(card.split('---')[1])
    assert front['pipeline_tag'] == 'image-feature-extraction'
    assert 'person-re-identification' in front['tags']
    values = {metric['type']: metric['value'] for metric in front['model-index'][0]['results'][0]['metrics']}
    assert values == {'mAP': results['metrics']['mAP'], 'rank1': results['metrics']['rank1']}
    for row, name in (('this network', 'own'), ('plain, the same settings', 'plain')):
        numbers = ' | '.join(f'{told[name][key]:.2f}' for key in ('mAP', 'rank1', 'rank5', 'mINP'))
        assert f'| {row} | {numbers} |' in card
    for line in (
        'for re-identification, by the network `test_resnet`', 'metric cosine, camera_rule exclude, flip True',
        'normalize(model(image))', 'The epoch was chosen', '3 queries in 15 images',
    ):
        assert line in card, line
    assert 'top-1' not in card and 'softmax' not in card
    assert main(['export', str(directory), str(tmp_path / 'measured'), '--data', str(people), '--half']) == 0
    card = (tmp_path / 'measured' / 'README.md').read_text()
    assert 'In float32, before the weights were rounded' in card
    assert load(str(tmp_path / 'measured')).num_classes == 0
    capsys.readouterr()


@pytest.mark.parametrize(('change', 'message'), [
    ({'settings': {}}, 'its settings is'), ({'dataset': 'reid/csv'}, 'its dataset is'),
    ({'mAP': 'high'}, "has no 'mAP': write it with dreal-timm reid eval --results"),
    ({'weights_sha256': '0'}, 'of other weights'),
])
def test_results_that_are_not_its_own(finished, control, people, tmp_path, change, message):
    """Results of other weights, and a control that was measured otherwise, are refused."""
    _, directory = finished
    names = {'results': directory, 'control': control}
    for name, folder in names.items():
        told = evaluate_reid(folder / 'model', people, workers=0)[0]
        if name == ('results' if 'weights_sha256' in change else 'control'):
            told |= change
        (tmp_path / f'{name}.json').write_text(json.dumps(told))
    with pytest.raises(ValueError, match=message):
        export_run(
            directory, tmp_path / 'out', results=tmp_path / 'results.json', control=tmp_path / 'control.json')
    assert not (tmp_path / 'out').exists()


def test_push_to(people, tmp_path, hub):
    """dreal.hub.push_to sends the embedding network with its measured card."""
    results = run(reid(people, tmp_path, {'hub': {'push_to': 'user/people'}}, epochs=1))
    assert results['pushed']
    card = (tmp_path / 'run' / 'hub' / 'README.md').read_text()
    assert f"{results['metrics']['mAP']:.2f}" in card
    assert load('hf-hub:user/people').num_classes == 0
