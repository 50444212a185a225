"""Links in data sets and in folders that are searched: followed, ended where they go round, no file counted twice"""
import csv
import os

import pytest
import torch
from reid.pictures import market, rows, save

from dreal_timm.cli import main
from dreal_timm.reid import check_reid, open_reid, rank_queries, unanswered
from dreal_timm.reid.evaluation import evaluate_features
from dreal_timm.reid.files import image_files
from dreal_timm.reid.layouts import SPLITS

PEOPLE = [('train', 'anna', 'c1'), ('train', 'bert', 'c2'), ('query', 'carl', 'c1'), ('gallery', 'carl', 'c2')]


def counts(data):
    return [len(getattr(data, split)) for split in SPLITS]


def folders(root, people=PEOPLE):
    """Two images in each SPLIT/IDENTITY/CAMERA."""
    for number, (split, name, camera) in enumerate(people):
        for view in range(2):
            save(root / split / name / camera / f'{number}_{view}.png', number, 1, view)
    return root


@pytest.mark.parametrize('what', ['train', 'train/anna', 'train/anna/c1', 'query/carl/c1/2_0.png'])
def test_linked_parts_of_folders(tmp_path, what):
    """A split, an identity, a camera or an image that is a link to another place counts as if it lay there."""
    expected = counts(open_reid(folders(tmp_path / 'plain')))
    root = folders(tmp_path / 'linked')
    (tmp_path / 'disk').mkdir()
    os.rename(root / what, tmp_path / 'disk' / 'moved')
    (root / what).symlink_to(tmp_path / 'disk' / 'moved')
    data = open_reid(root)
    assert counts(data) == expected == [4, 2, 2]
    assert data.identity_names() == ['anna', 'bert']
    assert not check_reid(data, 2).details['broken']


@pytest.mark.parametrize(('place', 'target'), [
    ('train/loop', '.'), ('train/anna/loop', '..'), ('train/anna/c1/loop', '..'), ('train/anna/c1/loop', '../../../..'),
    ('train/anna/c1/loop', '.'), ('loop', '.'), ('train/anna/c1/more', '../../bert'),
])
def test_links_that_go_round(tmp_path, place, target):
    """A link to a folder that holds it, or to one that is there already, ends and adds nothing."""
    root = folders(tmp_path / 'data')
    (root / place).symlink_to(target)
    assert counts(open_reid(root)) == [4, 2, 2]
    found = image_files(root, deep=True)
    assert len(found) == len({path.resolve() for path in found}) == 8


def test_folders_that_lead_to_each_other(tmp_path):
    """Twelve folders with links to all others, which have 12! ways through them, give each image once."""
    for number in range(12):
        save(tmp_path / str(number) / 'image.png', 1, 1, number)
        for other in range(12):
            if other != number:
                (tmp_path / str(number) / f'to{other}').symlink_to(f'../{other}')
    assert image_files(tmp_path, deep=True) == sorted(tmp_path / str(number) / 'image.png' for number in range(12))


@pytest.mark.parametrize('split', ['train', 'gallery'])
def test_one_folder_as_two_identities(tmp_path, split):
    """A link to the folder of another identity would make two people of one, and is refused."""
    root = folders(tmp_path / 'data')
    (root / split / 'dora').symlink_to('anna' if split == 'train' else 'carl')
    with pytest.raises(ValueError, match='one file') as caught:
        open_reid(root)
    assert 'dora' in str(caught.value)


@pytest.mark.parametrize('place', ['train/gone', 'train/anna/gone', 'gone.png'])
def test_links_that_lead_nowhere(tmp_path, capsys, place):
    """What a link of a lost disk stood for is not left out silently: an error that names it."""
    root = folders(tmp_path / 'data')
    path = root / (f'gallery/carl/c2/{place}' if place.endswith('png') else place)
    path.symlink_to(tmp_path / 'lost')
    assert main(['reid', 'check', str(root)]) == (1 if place.endswith('png') else 2)
    captured = capsys.readouterr()
    assert str(path) in captured.out + captured.err


def test_tables_and_lists_through_links(tmp_path):
    """A table may name files in a linked folder, and Market-1501's folders may be links; names lead out of none."""
    disk, root = tmp_path / 'disk', tmp_path / 'data'
    root.mkdir()
    for path, pid, camid, _ in rows():
        save(disk / path, pid, camid, 0)
    (root / 'big').symlink_to(disk)
    with (root / 'images.csv').open('w', newline='') as file:
        csv.writer(file).writerow(('path', 'pid', 'camid', 'split'))
        csv.writer(file).writerows((f'big/{path}', *row) for path, *row in rows())
    assert counts(open_reid(root)) == [18, 4, 11]
    market(tmp_path / 'there')
    (tmp_path / 'here').mkdir()
    for name in ('bounding_box_train', 'query', 'bounding_box_test'):
        (tmp_path / 'here' / name).symlink_to(tmp_path / 'there' / name)
    assert counts(open_reid(tmp_path / 'here')) == [18, 4, 11]
    (root / 'images.csv').write_text('path,pid,camid,split\nbig/../../disk/x.png,1,1,train\n')
    with pytest.raises(ValueError, match='outside'):
        open_reid(root)


def linked(path, target, kind):
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == 'hard':
        os.link(target, path)
    else:
        path.symlink_to(target)


@pytest.mark.parametrize('kind', ['soft', 'hard'])
def test_a_file_counts_once(tmp_path, kind):
    """A gallery with the same files twice, by links, gives the numbers of the gallery without them, and says so."""
    people = [('train', 'x', 'c1'), *(('query', str(i), 'c1') for i in range(4)),
              *(('gallery', str(i), 'c2') for i in range(4))]
    data = open_reid(folders(tmp_path / 'data', people))
    torch.manual_seed(0)
    query, gallery = torch.randn(8, 4), torch.randn(8, 4)
    expected = evaluate_features(query, gallery, data)
    for image in data.gallery[::2]:
        linked(image.path.with_name(f'again_{image.path.name}'), image.path, kind)
    again = open_reid(tmp_path / 'data')
    assert len(again.gallery) == 8
    assert evaluate_features(query, gallery, again) == expected
    assert len(check_reid(again, 1).details['repeated']) == 4


@pytest.mark.parametrize('kind', ['soft', 'hard'])
@pytest.mark.parametrize('multi_query', [False, True])
def test_a_linked_query_does_not_answer_itself(tmp_path, kind, multi_query):
    """The rule 'ignore' leaves out a query's own file also where the gallery has it by a link, pooled queries too."""
    root = folders(tmp_path / 'data', [
        ('train', 'x', 'c1'), *((split, name, 'c1') for split in ('query', 'gallery') for name in 'abc')])
    data = open_reid(root)
    torch.manual_seed(0)
    query, gallery = torch.randn(6, 4), torch.randn(6, 4)
    for image in data.query:
        linked(root / 'gallery' / image.path.parts[-3] / 'c1' / f'q{image.path.name}', image.path, kind)
    more = open_reid(root)
    place = {image.path: row for images, features in ((data.query, query), (data.gallery, gallery))
             for image, row in zip(images, features, strict=True)}
    both = torch.stack([place[image.path] for image in more.gallery])
    assert len(both) == 12
    found = evaluate_features(query, both, more, camera_rule='ignore', multi_query=multi_query)
    # by hand: all images but the query's own, or those of its identity's queries
    precisions = []
    for name in 'abc':
        own = [i for i, image in enumerate(more.query) if image.path.parts[-3] == name]
        asked = [(query[own].mean(0), own)] if multi_query else [(query[i], [i]) for i in own]
        for feature, out in asked:
            kept = [i for i, image in enumerate(more.gallery) if image.path not in {more.query[o].path for o in out}]
            order = sorted(kept, key=lambda i: -torch.cosine_similarity(feature, both[i], dim=0).item())
            hits = [rank for rank, i in enumerate(order, 1) if more.gallery[i].path.parts[-3] == name]
            precisions.append(sum(n / rank for n, rank in enumerate(hits, 1)) / len(hits))
    assert found['mAP'] == pytest.approx(100 * sum(precisions) / len(precisions), abs=1e-9)
    assert not unanswered(more, 'ignore')
    assert more.query[0].path not in rank_queries(query, both, more, [0], 99, camera_rule='ignore')[0].found


def test_files_of_other_kinds_are_said(tmp_path, caplog):
    """Image files that are not read, and folders that are not looked into, are counted in a warning."""
    root = market(tmp_path / 'data')
    save(root / 'query' / '0001_c1s1_000009_01.tif', 1, 1, 0)
    save(root / 'bounding_box_test' / 'more' / '0001_c1s1_000009_01.jpg', 1, 1, 0)
    assert counts(open_reid(root)) == [18, 4, 11]
    assert '1 .tif' in caplog.text and "'more'" in caplog.text
