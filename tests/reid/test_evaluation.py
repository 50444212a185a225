"""Features, the commands eval and search, and the pictures of ranked lists"""
import json

import pytest
import timm
import torch
from PIL import Image
from reid.pictures import market, save
from timm.data import resolve_model_data_config
from torch.nn import functional as F

from dreal_timm.cli import main
from dreal_timm.hub import export
from dreal_timm.reid import (
    draw_rankings,
    embed,
    evaluate_reid,
    open_reid,
    rank_queries,
    rerank,
    retrieve,
    score,
    search,
)
from dreal_timm.reid.evaluation import evaluate_network, extract_features, feature_loader
from dreal_timm.reid.pictures import Ranking

CPU = torch.device('cpu')
SIZE = {'input_size': (3, 32, 16), 'crop_pct': 1.0, 'crop_mode': 'squash', 'interpolation': 'bilinear'}


@pytest.fixture(scope='module')
def people(tmp_path_factory):
    return market(tmp_path_factory.mktemp('people') / 'data')


def network(**kwargs):
    torch.manual_seed(0)
    model = timm.create_model(
        'dreal_reid', backbone='test_resnet', backbone_args={'block_args': {'attn_layer': 'se'}}, **kwargs)
    model.pretrained_cfg |= SIZE
    return model


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """An exported embedding network of random weights."""
    model = network().train()
    for _ in range(3):  # statistics, so that features differ
        model(torch.randn(16, 3, 32, 16))
    folder = tmp_path_factory.mktemp('exported') / 'model'
    export(model, folder, data_config={**resolve_model_data_config(model), **SIZE})
    return folder


def load_images(images):
    """The images as the network takes them, by hand."""
    transform = timm.data.create_transform(
        **SIZE, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), is_training=False)
    return torch.stack([transform(Image.open(image.path).convert('RGB')) for image in images])


@pytest.mark.parametrize('flip', [False, True])
@pytest.mark.parametrize('workers', [0, 2])
def test_features(people, exported, flip, workers):
    """Features are the network's embeddings in the order of the images, the mean with the mirror image's if asked."""
    model = timm.create_model(f'local-dir:{exported}', pretrained=True)
    images = open_reid(people).gallery
    loader = feature_loader(images, resolve_model_data_config(model), CPU, batch_size=3, workers=workers)
    found = extract_features(model, loader, CPU, flip)
    inputs = load_images(images)
    with torch.no_grad():
        expected = model(inputs)
        if flip:
            expected = (expected + model(inputs.flip(3))) / 2
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not model.training


def test_embeddings_of_any_network():
    """A classifier of timm is embedded by its pooled features, and one with identities by what its classifier sees."""
    plain = timm.create_model('test_resnet').eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(plain.get_classifier()(embed(plain, images)), plain(images))
        model = network(num_classes=5).eval()
        torch.testing.assert_close(model.fc(embed(model, images)), model(images))


def test_features_that_are_not_finite(people):
    """A network that has diverged is an error, and no ranking of NaN."""
    model = network()
    with torch.no_grad():
        model.backbone.conv1[0].weight.fill_(float('nan'))
    loader = feature_loader(open_reid(people).query, SIZE | {'mean': (0.5,) * 3, 'std': (0.5,) * 3}, CPU, workers=0)
    with pytest.raises(FloatingPointError, match='not finite'):
        extract_features(model, loader, CPU)


@pytest.mark.parametrize('metric', ['cosine', 'euclidean'])
def test_results(people, exported, metric):
    """The numbers of a data set are those of its features by the ranking."""
    results, data, query, gallery = evaluate_reid(exported, people, metric=metric, workers=0)
    numbers = [torch.tensor([getattr(image, name) for image in split]) for name in ('pid', 'camid')
               for split in (data.query, data.gallery)]
    expected = retrieve(query, gallery, *numbers, metric=metric).summary()
    assert {name: results[name] for name in expected} == expected
    assert (results['dataset'], results['samples'], results['split']) == ('reid/market1501', 15, 'query')
    assert results['settings'] == {
        'metric': metric, 'camera_rule': 'exclude', 'flip': True, 'rerank': False, 'multi_query': False}
    assert len(results['weights_sha256']) == 64


def test_multi_query(people, exported, tmp_path):
    """Queries of an identity and camera are pooled: of gt_bbox, where it is there, or of the queries themselves."""
    target = tmp_path / 'data'
    for path in people.rglob('*.jpg'):
        (target / path.parent.name).mkdir(parents=True, exist_ok=True)
        (target / path.parent.name / path.name).write_bytes(path.read_bytes())
    single = evaluate_reid(exported, target, workers=0)[0]
    assert evaluate_reid(exported, target, workers=0, multi_query=True)[0]['mAP'] == pytest.approx(single['mAP'])
    (target / 'gt_bbox').mkdir()
    for number, path in enumerate(sorted((target / 'bounding_box_test').glob('000[134]*'))):
        (target / 'gt_bbox' / path.name.replace('_01', f'_{number:02}')).write_bytes(path.read_bytes())
    data = open_reid(target)
    results, _, query, gallery = evaluate_reid(exported, target, workers=0, multi_query=True)
    model = timm.create_model(f'local-dir:{exported}', pretrained=True)
    extra = extract_features(model, feature_loader(data.extra, resolve_model_data_config(model), CPU), CPU)
    pooled = {}
    for image, row in zip(data.extra, extra, strict=True):
        pooled.setdefault((image.pid, image.camid), []).append(row)
    assert len(pooled) == 3
    for image, row in zip(data.query, query, strict=True):  # those that gt_bbox has nothing of
        if (image.pid, image.camid) not in {(one.pid, one.camid) for one in data.extra}:
            pooled.setdefault((image.pid, image.camid), []).append(row)
    keys = sorted(pooled)
    assert len(keys) == 4
    expected = retrieve(
        torch.stack([torch.stack(pooled[key]).mean(0) for key in keys]), gallery,
        torch.tensor([pid for pid, _ in keys]), torch.tensor([image.pid for image in data.gallery]),
        torch.tensor([camid for _, camid in keys]), torch.tensor([image.camid for image in data.gallery])).summary()
    assert results['mAP'] == pytest.approx(expected['mAP'])
    assert (results['queries'], results['skipped']) == (expected['queries'], expected['skipped'])


def test_command(people, exported, tmp_path, capsys):
    """eval prints a table with a row for each data set, writes JSON and draws the lists, and overwrites nothing."""
    results, picture = tmp_path / 'results.json', tmp_path / 'lists.png'
    command = ['reid', 'eval', str(exported), '--data', str(people), '--workers', '0', '--no-flip']
    assert main([*command, '--results', str(results), '--picture', str(picture), '--lists', '3']) == 0
    table = capsys.readouterr().out.splitlines()
    told = json.loads(results.read_text())
    assert table[0].split() == ['data', 'mAP', 'rank-1', 'rank-5', 'rank-10', 'rank-20', 'mINP', 'queries', 'skipped']
    assert table[1].split()[:3] == [str(people), f"{told['mAP']:.2f}", f"{told['rank1']:.2f}"]
    assert told['settings']['flip'] is False
    assert Image.open(picture).size[1] == 6 + 3 * (128 + 8 + 6)
    assert main([*command, '--results', str(results)]) == 2
    assert 'exists' in capsys.readouterr().err
    assert main([*command, '--rerank']) == 2
    assert 'k1: 20 neighbours of each of 15 images' in capsys.readouterr().err
    assert main([*command, '--k1', '14']) == 2
    assert 'go with --rerank' in capsys.readouterr().err
    small = ['--rerank', '--k1', '7', '--k2', '3', '--lambda', '0.5']
    assert main([*command, *small, '--json']) == 0
    told = json.loads(capsys.readouterr().out)
    _, data, query, gallery = evaluate_reid(exported, people, workers=0, flip=False)
    numbers = [torch.tensor([getattr(image, name) for image in split]) for name in ('pid', 'camid')
               for split in (data.query, data.gallery)]
    expected = score(rerank(query, gallery, 7, 3, 0.5), *numbers).summary()
    assert told['mAP'] == pytest.approx(expected['mAP'], abs=1e-9)
    assert told['settings'] == {
        'metric': 'cosine', 'camera_rule': 'exclude', 'flip': False, 'rerank': True, 'k1': 7, 'k2': 3, 'lambda': 0.5,
        'multi_query': False}
    more = market(tmp_path / 'more', {
        'bounding_box_train': [(2, 1, 1)], 'query': [(1, 1, 1)], 'bounding_box_test': [(1, 2, 12), (3, 1, 12)]})
    assert main(['reid', 'eval', str(exported), '--data', str(more), str(more), '--rerank', '--json']) == 0
    both = json.loads(capsys.readouterr().out)
    assert len(both) == 2 and both[0]['settings']['rerank'] is True


@pytest.mark.parametrize(('arguments', 'message'), [
    (['--lists', '0', '--picture', 'x.png'], '--lists'),
    (['--picture', 'x.nothing'], 'must end with one of .png'),
    (['--picture', '/nowhere/x.png'], 'its folder does not'),
    (['--data', '/nowhere'], 'No folder'),
    (['--layout', 'msmt17'], 'list_train.txt'),
    (['--rerank', '--k1', '0', '--k2', '1'], 'k1 of 1 or more'), (['--rerank', '--k1', '4'], 'got 4 and 6'),
    (['--rerank', '--k1', '9', '--lambda', '1.5'], 'lambda'), (['--rerank', '--k1', '9', '--lambda', 'nan'], 'lambda'),
    (['--rerank', '--k1', '15'], '15 images'),
])
def test_errors_of_the_command(people, exported, tmp_path, capsys, monkeypatch, arguments, message):
    """What eval cannot do is one line, exit code 2, and no file."""
    monkeypatch.chdir(tmp_path)
    assert main(['reid', 'eval', str(exported), '--data', str(people), '--workers', '0', *arguments]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if 'error' in line]
    assert len(error) == 1 and message in error[0]
    assert not list(tmp_path.iterdir())


def test_lists(people):
    """A ranked list leaves out the query's own camera, is ascending, and marks what is right."""
    data = open_reid(people)
    torch.manual_seed(0)
    query, gallery = torch.randn(len(data.query), 8), torch.randn(len(data.gallery), 8)
    lists = rank_queries(query, gallery, data, [2, 0], top=5)
    assert [ranking.query for ranking in lists] == [data.query[2].path, data.query[0].path]
    for ranking, number in zip(lists, (2, 0), strict=True):
        asked = data.query[number]
        distances = 1 - F.cosine_similarity(query[number][None], gallery)
        kept = [i for i, image in enumerate(data.gallery) if (image.pid, image.camid) != (asked.pid, asked.camid)]
        order = sorted(kept, key=lambda i: distances[i].item())[:5]
        assert list(ranking.found) == [data.gallery[i].path for i in order]
        assert list(ranking.right) == [data.gallery[i].pid == asked.pid for i in order]
        assert list(ranking.distances) == pytest.approx(distances[order].tolist(), abs=1e-5)
    ignored = rank_queries(query, gallery, data, [0], top=100, camera_rule='ignore')[0]
    assert len(ignored.found) == len(data.gallery)


def test_picture(people, tmp_path):
    """Frames are green around what is right, and red with a white cross around what is wrong."""
    paths = [image.path for image in open_reid(people).gallery[:3]]
    draw_rankings([Ranking(paths[0], paths[1:], (0.1, 0.2), (True, False))], tmp_path / 'new' / 'lists.png')
    sheet = Image.open(tmp_path / 'new' / 'lists.png').convert('RGB')
    width = 64 + 8 + 6  # images are 16 x 32
    frames = [sheet.getpixel((x, 7)) for x in (7, 6 + width + 13, 6 + 2 * width + 13)]
    assert frames == [(90, 90, 90), (0, 150, 60), (205, 20, 20)]
    corner = sheet.crop((6 + 2 * width + 12 + 50, 6, 6 + 2 * width + 12 + 72, 26))
    assert (255, 255, 255) in set(corner.getdata())
    assert (255, 255, 255) not in set(sheet.crop((6 + width + 12, 6, 6 + width + 12 + 72, 26)).getdata())


def test_search(people, exported, tmp_path, capsys):
    """search finds an image itself first, in a folder with folders, and draws grey frames."""
    asked = open_reid(people).gallery[3].path
    command = [
        'reid', 'search', str(exported), '--query', str(asked), '--gallery', str(people), '--top', '4',
        '--workers', '0', '--picture', str(tmp_path / 'found.png')]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(asked) and lines[1].split()[0] == '1' and lines[1].endswith(str(asked))
    assert len(lines) == 5
    assert Image.open(tmp_path / 'found.png').size[1] == 148
    rankings = search(exported, [people / 'query'], people / 'bounding_box_test', top=1000, workers=0)
    assert len(rankings) == 4 and len(rankings[0].found) == 14  # junk is an image here like any other
    assert list(rankings[0].distances) == sorted(rankings[0].distances)
    assert main(['reid', 'search', str(exported), '--query', 'nothing.png', '--gallery', str(people)]) == 2
    assert "query: no file or folder 'nothing.png'" in capsys.readouterr().err
    assert main(['reid', 'search', str(exported), '--query', str(asked), '--gallery', str(exported)]) == 2
    assert 'no image in' in capsys.readouterr().err


def noisy(root, identities=12, cameras=3, views=3, seed=0):
    """Market's layout with images of noise that have something of their identity, so that lists have an order."""
    generator = torch.Generator().manual_seed(seed)
    for pid in range(1, identities + 1):
        own = torch.rand(32, 16, 3, generator=generator)
        for camid in range(1, cameras + 1):
            for view in range(views):
                pixels = 0.4 * own + 0.6 * torch.rand(32, 16, 3, generator=generator)
                split = 'bounding_box_train' if pid < 3 else 'query' if view == 0 else 'bounding_box_test'
                path = root / split / f'{pid:04}_c{camid}s1_{view:06}_00.png'
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray((255 * pixels).byte().numpy()).save(path)
    return root


@pytest.fixture(scope='module')
def crowd(tmp_path_factory):
    return noisy(tmp_path_factory.mktemp('crowd') / 'data')


@pytest.mark.parametrize('metric', ['cosine', 'euclidean'])
def test_reranked_by_its_metric(crowd, exported, metric):
    """Re-ranking begins with the distance that was asked for, by the command too."""
    results, data, query, gallery = evaluate_reid(exported, crowd, workers=0, metric=metric, reranked=True)
    pids, camids = ([torch.tensor([getattr(image, name) for image in images]) for images in (data.query, data.gallery)]
                    for name in ('pid', 'camid'))
    found = {name: score(rerank(query, gallery, metric=name), *pids, *camids).summary()
             for name in ('cosine', 'euclidean')}
    assert results['mAP'] == pytest.approx(found[metric]['mAP'], abs=1e-9)
    assert found['cosine']['mAP'] != pytest.approx(found['euclidean']['mAP'], abs=1e-3)


def test_picture_of_reranked_lists(crowd, exported, tmp_path, monkeypatch):
    """The picture shows the lists that were measured: those of re-ranking where it was asked for."""
    drawn = {}
    monkeypatch.setattr(
        'dreal_timm.cli.reid.draw_rankings', lambda rankings, path: drawn.setdefault(path, rankings))
    for name, options in (('plain.png', []), ('reranked.png', ['--rerank'])):
        assert main(['reid', 'eval', str(exported), '--data', str(crowd), '--workers', '0',
                     '--picture', str(tmp_path / name), '--lists', '30', *options]) == 0
    plain, reranked = drawn.values()
    _, data, query, gallery = evaluate_reid(exported, crowd, workers=0)
    rows = torch.cat(list(rerank(query, gallery)))
    for number, ranking in enumerate(reranked):
        asked = data.query[number]
        expected = [
            data.gallery[i].path for i in rows[number].sort(stable=True).indices.tolist()
            if (data.gallery[i].pid, data.gallery[i].camid) != (asked.pid, asked.camid)]
        assert list(ranking.found) == expected[:10]
    assert [one.found for one in plain] != [one.found for one in reranked]


def test_a_query_does_not_answer_itself(tmp_path, exported):
    """With one camera, a query whose file is in the gallery too is measured as if it were not there."""
    noisy(tmp_path / 'data', cameras=1, views=4)
    plain = evaluate_reid(exported, tmp_path / 'data', workers=0, camera_rule='ignore')[0]
    rows = [
        f'{path.relative_to(tmp_path)},{int(path.name[:4])},1,{split}'
        for folder, split in (('bounding_box_train', 'train'), ('query', 'query'), ('bounding_box_test', 'gallery'),
                              ('query', 'gallery'))
        for path in sorted((tmp_path / 'data' / folder).iterdir())]
    (tmp_path / 'own.csv').write_text('\n'.join(['path,pid,camid,split', *rows]))
    results, data, query, gallery = evaluate_reid(exported, tmp_path / 'own.csv', workers=0, camera_rule='ignore')
    assert results['rank1'] < 100
    # queries of other identities are in the gallery now, too: they are wrong answers, and answers less the own file
    by_hand = []
    distances = 1 - F.normalize(query, dim=1) @ F.normalize(gallery, dim=1).T
    for asked, row in zip(data.query, distances, strict=True):
        order = [data.gallery[i] for i in row.sort(stable=True).indices.tolist() if data.gallery[i].path != asked.path]
        hits = [image.pid == asked.pid for image in order]
        ranks = [rank for rank, hit in enumerate(hits, 1) if hit]
        by_hand.append(sum((n + 1) / rank for n, rank in enumerate(ranks)) / len(ranks))
    assert results['mAP'] == pytest.approx(100 * sum(by_hand) / len(by_hand), abs=1e-6)
    assert plain['queries'] == results['queries']
    ranking = rank_queries(query, gallery, data, [0], camera_rule='ignore')[0]
    assert data.query[0].path not in ranking.found


def test_all_data_is_opened_before_the_work(crowd, exported, tmp_path, capsys):
    """A second data set that is missing, or broken, ends the command before the first is measured."""
    bad = noisy(tmp_path / 'bad')
    next((bad / 'query').iterdir()).write_bytes(b'no image')
    for other in (tmp_path / 'nowhere', bad):
        results = tmp_path / 'results.json'
        assert main(['reid', 'eval', str(exported), '--data', str(crowd), str(other), '--results', str(results)]) == 2
        captured = capsys.readouterr()
        assert str(other) in captured.err
        assert 'mAP' not in captured.out
        assert not results.exists()


@pytest.mark.parametrize(('options', 'message'), [
    (['--picture', 'x.psd'], 'must end with one of'), (['--picture', 'x.h5'], 'must end with one of'),
    (['--picture', 'x.png', '--multi-query'], 'leave out --multi-query'),
    (['--picture', 'x.png', '--results', 'x.png'], 'two names'), (['--batch-size', '0'], '--batch-size'),
])
def test_more_errors_of_the_command(crowd, exported, tmp_path, monkeypatch, capsys, options, message):
    """What could not be written, or would mean nothing, is refused before the work."""
    monkeypatch.chdir(tmp_path)
    assert main(['reid', 'eval', str(exported), '--data', str(crowd), *options]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_search_in_a_folder_of_all_sorts(crowd, exported, tmp_path, caplog):
    """Other files and hidden ones are no images; an image that is broken is left out, and said; a query must not be."""
    folder = tmp_path / 'photos'
    folder.mkdir()
    for number, path in enumerate(sorted((crowd / 'bounding_box_test').iterdir())[:4]):
        (folder / f'{number}.png').write_bytes(path.read_bytes())
    (folder / 'notes.pdf').write_bytes(b'%PDF')
    (folder / '._0.png').write_bytes(b'of a file manager')
    (folder / '.thumbs').mkdir()
    (folder / '.thumbs' / '0.png').write_bytes((folder / '0.png').read_bytes())
    (folder / 'broken.png').write_bytes((folder / '0.png').read_bytes()[:200])
    found = search(exported, [folder / '0.png'], folder, workers=0)
    assert sorted(path.name for path in found[0].found) == ['0.png', '1.png', '2.png', '3.png']
    assert 'broken.png' in caplog.text
    with pytest.raises(ValueError, match=r'broken\.png'):
        search(exported, [folder / 'broken.png'], folder, workers=0)


def test_a_network_measured_elsewhere(crowd, people, exported, tmp_path, capsys):
    """An embedding network has no classes to validate, and is exported to ONNX beside images of its queries."""
    assert main(['validate', str(exported), '--data', str(crowd)]) == 2
    assert 'reid eval' in capsys.readouterr().err
    options = ['--format', 'torch-export', '--data', str(crowd)]
    assert main(['export', str(exported), str(tmp_path / 'other'), *options]) == 0
    assert 'images' in capsys.readouterr().out


def test_search_in_a_linked_album(crowd, exported, tmp_path, caplog):
    """Links to folders are searched, one that goes round ends, and an image with several paths is found once."""
    album = tmp_path / 'album'
    album.mkdir()
    (album / 'linked').symlink_to(crowd / 'bounding_box_test')
    (album / 'alias').symlink_to(crowd / 'bounding_box_test')
    (album / 'round').symlink_to('.')
    (album / 'up').symlink_to('..')
    first, *_, last = sorted((crowd / 'bounding_box_test').iterdir())
    (album / 'one.png').symlink_to(first)
    (tmp_path / 'query.png').write_bytes(last.read_bytes())
    (album / 'gone.png').symlink_to(tmp_path / 'lost.png')
    found = search(exported, [tmp_path / 'query.png'], album, top=1000, workers=0)[0].found
    expected = sorted(path.name for path in (crowd / 'bounding_box_test').iterdir())
    assert sorted(path.resolve().name for path in found) == expected
    assert found[0].name == last.name
    assert 'gone.png' in caplog.text


def test_a_distractor_answers_no_distractor(tmp_path):
    """A query of identity 0 has no right answer in its list, as it has none in the numbers."""
    data = open_reid(market(tmp_path, {
        'bounding_box_train': [(5, 1, 1)], 'query': [(0, 1, 1), (3, 1, 1)],
        'bounding_box_test': [(0, 2, 2), (3, 2, 1)]}))
    torch.manual_seed(0)
    lists = rank_queries(torch.randn(2, 4), torch.randn(3, 4), data, [0, 1])
    assert [sum(ranking.right) for ranking in lists] == [0, 1]


@pytest.mark.parametrize(('bias', 'weight', 'message'), [
    (1.0, 0.0, 'the same features'), (0.0, 1e-30, 'features of zero'), (0.0, 1e25, 'not finite'),
])
def test_a_network_that_has_collapsed(people, bias, weight, message):
    """Features that are all equal, of zero, or of a length beyond float32 are no number by the order of the files."""
    class Mean(torch.nn.Module):
        """The mean colour of an image."""
        pretrained_cfg = {**SIZE, 'architecture': 'mean'}

        def forward_features(self, images):
            return bias + weight * images.mean((2, 3))

        def forward_head(self, features, pre_logits):
            return features

    with pytest.raises(FloatingPointError, match=message):
        evaluate_network(Mean(), open_reid(people), workers=0)


def test_pooled_queries_that_nothing_answers(tmp_path, exported):
    """Two queries that answer each other are one pooled query that nothing answers: an error, and no NaN."""
    for split, pid, name in (('train', 'x', '0'), ('query', 'a', '1'), ('query', 'a', '2'), ('gallery', 'b', '3')):
        save(tmp_path / split / pid / 'c1' / f'{name}.png', 1, 1, int(name))
    (tmp_path / 'gallery' / 'a').symlink_to('../query/a')
    options = {'camera_rule': 'ignore', 'workers': 0}
    assert evaluate_reid(exported, tmp_path, **options)[0]['queries'] == 2
    with pytest.raises(ValueError, match='no image of the gallery answers'):
        evaluate_reid(exported, tmp_path, multi_query=True, **options)
