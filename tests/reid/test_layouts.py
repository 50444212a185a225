"""Data sets of person re-identification: every layout, its rules, and what is found before a training"""
import csv
import json

import pytest
from reid.pictures import PEOPLE, SPLIT, market, rows, save

from dreal_timm.cli import main
from dreal_timm.reid import check_reid, layouts, open_reid, unanswered


def counted(data):
    return {split: sorted((image.pid, image.camid) for image in getattr(data, split)) for split in layouts.SPLITS}


def expected():
    return {
        SPLIT[folder]: sorted((pid, camid) for pid, camid, count in people for _ in range(count) if pid >= 0)
        for folder, people in PEOPLE.items()}


def table(root, names=False, **changes):
    """A table of the same images, which are written too."""
    for path, pid, camid, _ in rows():
        save(root / path, pid, camid, 0)
    with (root / 'images.csv').open('w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(changes.get('columns', ['path', 'pid', 'camid', 'split']))
        writer.writerows([*rows(names), *changes.get('more', ())])
    return root


def msmt(root):
    """Lists and folders of MSMT17."""
    lists = {'train': [], 'val': [], 'query': [], 'gallery': []}
    for name, pid, camid, count in (
        ('train', 0, 1, 3), ('train', 1, 15, 2), ('val', 1, 2, 1), ('query', 0, 1, 1), ('gallery', 0, 12, 2),
        ('gallery', 1, 3, 1),
    ):
        for _ in range(count):
            relative = f'{pid:04}/{pid:04}_{len(lists[name]):03}_{camid:02}_0303morning_0008_0.jpg'
            folder = 'train' if name in ('train', 'val') else 'test'
            save(root / folder / relative, pid, camid, 0)
            lists[name].append(f'{relative} {pid}\n')
    for name, lines in lists.items():
        (root / f'list_{name}.txt').write_text(''.join(lines))
    return root


def test_market1501(tmp_path):
    """Junk is dropped, distractors stay in the gallery, cameras come from the names, labels from sorted identities."""
    data = open_reid(market(tmp_path))
    assert data.layout == 'market1501'
    assert counted(data) == expected()
    assert data.junk == 3
    assert sum(image.pid == 0 for image in data.gallery) == 2
    assert data.identities() == [2, 7, 10]
    assert data.train[0].path.name == '0002_c1s1_000000_01.jpg'
    assert 'train 18 (published: 12,936)' in data.notes[0]


def test_extra_images_of_multi_query(tmp_path):
    """gt_bbox gives the images of the queries' identities and cameras."""
    market(tmp_path)
    for number, (pid, camid) in enumerate(((1, 1), (1, 1), (1, 3), (4, 3), (9, 1))):
        save(tmp_path / 'gt_bbox' / f'{pid:04}_c{camid}s1_{number:06}_00.jpg', pid, camid, 0)
    assert sorted((image.pid, image.camid) for image in open_reid(tmp_path).extra) == [(1, 1), (1, 1), (4, 3)]


def test_dukemtmc(tmp_path):
    """Duke's names are told from Market's, and its counts are compared."""
    for folder, people in PEOPLE.items():
        for pid, camid, count in people:
            for number in range(count if pid > 0 else 0):
                save(tmp_path / folder / f'{pid:04}_c{camid}_f{number:07}.jpg', pid, camid, number)
    data = open_reid(tmp_path)
    assert data.layout == 'dukemtmc'
    assert len(data.train) == 18
    assert '16,522' in data.notes[0]
    assert open_reid(tmp_path, 'market1501').layout == 'market1501'


def test_msmt17(tmp_path):
    """Lists are read, validation is trained on, and the identities of the test, which begin at 0 too, are others."""
    data = open_reid(msmt(tmp_path))
    assert data.layout == 'msmt17'
    assert [len(getattr(data, split)) for split in layouts.SPLITS] == [6, 1, 3]
    assert data.identities() == [0, 1]
    assert {image.camid for image in data.train} == {1, 15, 2}
    assert data.query[0].pid in {image.pid for image in data.gallery}
    assert not {0, 1} & {image.pid for image in (*data.query, *data.gallery)}
    assert all(image.path.is_file() for split in layouts.SPLITS for image in getattr(data, split))


@pytest.mark.parametrize('layout', ['', 'csv'])
def test_table(tmp_path, layout):
    """A table with numbers keeps their meaning, junk and distractors included."""
    data = open_reid(table(tmp_path), layout)
    assert counted(data) == expected()
    assert data.junk == 3
    assert counted(open_reid(tmp_path / 'images.csv')) == counted(data)


def test_names_in_place_of_numbers(tmp_path):
    """Identities and cameras of a table may have any names: the same name is the same identity in every split."""
    data = open_reid(table(tmp_path, names=True))
    assert len({image.pid for image in data.query} & {image.pid for image in data.gallery}) == 3
    assert min(image.pid for split in layouts.SPLITS for image in getattr(data, split)) == 1  # none is a distractor
    assert {image.camid for image in data.train} == {0, 1, 2}


def test_folders(tmp_path):
    """SPLIT/IDENTITY/CAMERA/IMAGE."""
    for number, (_, pid, camid, split) in enumerate(rows()):
        save(tmp_path / split / str(pid) / f'c{camid}' / f'{number}.png', pid, camid, number)
    data = open_reid(tmp_path)
    assert data.layout == 'folders'
    # cameras are numbered from 0 by their names
    assert counted(data) == {split: [(pid, camid - 1) for pid, camid in pairs] for split, pairs in expected().items()}


@pytest.mark.parametrize(('change', 'message'), [
    ('nowhere', "No folder '"), ('empty', 'has none of the layouts'), ('layout', "Unknown layout 'cuhk03'"),
    ('no query', "query' is missing"), ('no images', "the split 'query' has no image"),
    ('name', 'does not begin with identity and camera'), ('column', "has no column 'camid'"),
    ('split', "split must be one of train, query, gallery, got 'test'"), ('outside', "'../other.png' is outside of"),
    ('blank', 'path, pid, camid or split is empty'), ('two tables', 'has 2 tables'),
    ('no camera', 'lies in no folder of an identity and a camera'),
])
def test_errors(tmp_path, capsys, change, message):
    """What is not of the layout is one line, with the file or the line of the table, and the code 2."""
    root, layout = tmp_path / 'data', []
    root.mkdir()
    if change == 'nowhere':
        root = tmp_path / 'nowhere'
    elif change == 'layout':
        layout = ['--layout', 'cuhk03']
    elif change in ('no query', 'no images', 'name'):
        market(root)
        for path in (root / 'query').iterdir():
            path.unlink()
        if change == 'no query':
            (root / 'query').rmdir()
        elif change == 'name':
            save(root / 'query' / 'photo.jpg', 1, 1, 1)
    elif change == 'no camera':
        for split in layouts.SPLITS:
            save(root / split / '1' / '1.png', 1, 1, 1)
    elif change != 'empty':
        more = {'split': [('a.png', 1, 1, 'test')], 'outside': [('../other.png', 1, 1, 'query')],
                'blank': [('a.png', '', 1, 'query')]}.get(change, [])
        columns = ['path', 'pid', 'camera' if change == 'column' else 'camid', 'split']
        table(root, more=more, columns=columns)
        if change == 'two tables':
            (root / 'more.csv').write_text('')
    try:
        code = main(['reid', 'check', str(root), *layout])
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    error = capsys.readouterr().err
    assert message in error or (change == 'layout' and 'invalid choice' in error)


def test_check(tmp_path, capsys):
    """Queries that nothing answers, few images, known identities and broken files are named."""
    market(tmp_path)
    (tmp_path / 'query' / '0003_c1s1_000000_01.jpg').write_bytes(b'\xff\xd8\xff no image')
    save(tmp_path / 'bounding_box_test' / '0007_c2s1_000000_01.jpg', 7, 2, 0)
    check = check_reid(open_reid(tmp_path), images_per_identity=8)
    assert check.counts == {
        'train': {'identities': 3, 'images': 18, 'cameras': 3}, 'query': {'identities': 3, 'images': 4, 'cameras': 3},
        'gallery': {'identities': 5, 'images': 12, 'cameras': 3}}
    lost, few, known, broken = check.problems
    assert '1 of 4 queries have no image of another camera' in lost and '0004_c3s1_000000_01.jpg' in lost
    assert '2 of 3 identities' in few and few.endswith(': 2, 7')
    assert '1 identities are in the training split and in the test' in known and known.endswith(': 7')
    assert '1 images cannot be used' in broken and '0003_c1s1_000000_01.jpg' in broken
    assert main(['reid', 'check', str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert all(f'problem: {problem}' in out for problem in check.problems)
    assert '3 images of identity -1 (junk) are left out' in out
    assert main(['reid', 'check', str(tmp_path), '--json']) == 1
    told = json.loads(capsys.readouterr().out)
    assert told['problems'] == list(check.problems)
    assert told['counts'] == check.counts


def test_nothing_is_wrong(tmp_path, capsys):
    """A data set without a problem ends with 0."""
    people = {
        'bounding_box_train': [(1, 1, 4), (2, 2, 4)], 'query': [(3, 1, 1)], 'bounding_box_test': [(3, 2, 1)]}
    market(tmp_path, people)
    assert main(['reid', 'check', str(tmp_path), '--images', '4']) == 0
    assert 'problem' not in capsys.readouterr().out


def test_one_camera(tmp_path):
    """With one camera the answer is the other rule, by which the queries have answers."""
    people = {
        'bounding_box_train': [(1, 1, 4), (2, 1, 4)], 'query': [(3, 1, 1), (4, 1, 1)],
        'bounding_box_test': [(3, 1, 1)]}
    data = open_reid(market(tmp_path, people))
    assert 'use --camera-rule ignore' in check_reid(data, 4).problems[0]
    assert [image.pid for image in unanswered(data, 'ignore')] == [4]
    assert '1 of 2 queries have no image in the gallery' in check_reid(data, 4, 'ignore').problems[0]


@pytest.mark.parametrize('layout', ['csv', 'folders'])
def test_junk_and_distractors_among_names(tmp_path, layout):
    """-1 is junk and 0 a distractor also where other identities have names."""
    names = {'-1': -1, '0': 0, '1': 'anna', '3': 'bert', '4': 'carl'}
    changed = [(path, names.get(str(pid), f'p{pid}'), camid, split) for path, pid, camid, split in rows()]
    for number, (path, pid, camid, split) in enumerate(changed):
        where = path if layout == 'csv' else f'{split}/{pid}/{camid}/{number}.png'
        save(tmp_path / where, 1, 1, number)
    if layout == 'csv':
        lines = [','.join(map(str, row)) for row in changed]
        (tmp_path / 'images.csv').write_text('\n'.join(['path,pid,camid,split', *lines]))
    data = open_reid(tmp_path)
    assert (data.layout, data.junk) == (layout, 3)
    assert sum(image.pid == 0 for image in data.gallery) == 2
    assert min(image.pid for image in (*data.train, *data.query)) == 1
    assert len(data.gallery) == len(expected()['gallery'])


def test_numbers_with_a_point(tmp_path):
    """pandas writes whole numbers of a column with gaps as 7.0; they are the numbers."""
    table(tmp_path)
    text = (tmp_path / 'images.csv').read_text().splitlines()
    points = [','.join([path, f'{pid}.0', camid, split]) for path, pid, camid, split in (
        line.split(',') for line in text[1:])]
    (tmp_path / 'images.csv').write_text('\n'.join([text[0], *points]))
    data = open_reid(tmp_path)
    assert data.junk == 3
    assert counted(data) == expected()


def test_files_beside_the_images(tmp_path):
    """Hidden files of a file manager, and tables of attributes, are no images and change no layout."""
    market(tmp_path)
    for folder in ('bounding_box_train', 'query', 'bounding_box_test'):
        (tmp_path / folder / '._0001_c1s1_000000_01.jpg').write_bytes(b'of a file manager')
        (tmp_path / folder / '.DS_Store').write_bytes(b'too')
    (tmp_path / 'attributes.csv').write_text('name,hair\n')
    data = open_reid(tmp_path)
    assert data.layout == 'market1501'
    assert counted(data) == expected()


@pytest.mark.parametrize(('content', 'message'), [
    (b'path,pid,camid,split\n\xe4.png,1,1,train\n', 'is not in UTF-8'),
    (b'path,pid,camid,split\na\x00.png,1,1,train\n', 'no path|NUL'),
])
def test_bytes_that_are_no_table(tmp_path, content, message):
    """A table in another encoding, or with bytes that no path has, is one line that names it."""
    (tmp_path / 'images.csv').write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        open_reid(tmp_path)
    assert 'images.csv' in str(caught.value)


def test_numbers_beyond_an_integer(tmp_path):
    """Identities such as those of a payment system are names."""
    table(tmp_path)
    file = tmp_path / 'images.csv'
    file.write_text('\n'.join(
        line.replace(',2,', ',99999999999999999999,', 1) for line in file.read_text().splitlines()))
    data = open_reid(tmp_path)
    assert max(image.pid for image in data.train) < 100
    assert data.junk == 3


def test_repeated_files(tmp_path, capsys):
    """A file that is listed twice, or in two splits, is said, all of them with --all and in the JSON."""
    data = open_reid(table(tmp_path))
    file = tmp_path / 'images.csv'
    more = [f'{image.path.relative_to(tmp_path)},{image.pid},{image.camid},gallery' for image in data.query]
    file.write_text('\n'.join([*file.read_text().splitlines(), *more]))
    check = check_reid(open_reid(tmp_path), 1, read_images=False)
    assert any('4 files are listed more than once' in problem for problem in check.problems)
    assert main(['reid', 'check', str(tmp_path), '--all']) == 1
    out = capsys.readouterr().out
    assert all(str(image.path) in out for image in data.query)
    assert main(['reid', 'check', str(tmp_path), '--json']) == 1
    assert json.loads(capsys.readouterr().out)['details']['repeated'] == [str(image.path) for image in data.query]


def test_queries_of_identity_0(tmp_path):
    """Identities that are counted from 0 have a query that nothing may answer, which is said."""
    people = {
        'bounding_box_train': [(5, 1, 4), (6, 2, 4)], 'query': [(0, 1, 1), (3, 1, 1)],
        'bounding_box_test': [(0, 2, 1), (3, 2, 1)]}
    data = open_reid(market(tmp_path, people))
    assert [image.pid for image in unanswered(data)] == [0]
    assert any('1 queries are of identity 0' in problem for problem in check_reid(data, 4).problems)


def test_wrong_numbers_of_the_check(tmp_path, capsys):
    """Numbers below 1 are refused by their name."""
    market(tmp_path)
    for option in ('--workers', '--images'):
        assert main(['reid', 'check', str(tmp_path), option, '0']) == 2
        assert f'{option}: expected 1 or more' in capsys.readouterr().err


def named_folders(root, names, split='train'):
    for number, name in enumerate(names):
        save(root / split / name / 'c1' / f'{number}.png', 1, 1, number)


def spelled(tmp_path, layout, first, second, column):
    """A data set of a layout whose training split has an identity or a camera written in two ways."""
    other, camera = ('1', 'c01') if layout == 'msmt17' else ('0001', 'c1')
    texts = [(first, camera), (second, camera)] if column == 'pid' else [(other, first), (other, second)]
    if layout == 'folders':
        for number, (pid, camera) in enumerate(texts):
            save(tmp_path / 'train' / pid / camera / f'{number}.png', 1, 1, number)
        for split in ('query', 'gallery'):
            named_folders(tmp_path, ['5'], split)
        return tmp_path
    if layout == 'csv':
        lines = [f'{pid}_{camera}_{number}.png,{pid},{camera},train' for number, (pid, camera) in enumerate(texts)]
        (tmp_path / 'images.csv').write_text('\n'.join(
            ['path,pid,camid,split', *lines, 'q.png,5,c1,query', 'g.png,5,c1,gallery']))
        return tmp_path
    texts = [(pid, camera.removeprefix('c')) for pid, camera in texts]
    if layout == 'msmt17':
        msmt(tmp_path)
        with (tmp_path / 'list_train.txt').open('a') as file:
            file.writelines(f'new/{pid}_{i}_{camera}_x.jpg {pid}\n' for i, (pid, camera) in enumerate(texts))
        return tmp_path
    market(tmp_path)
    for number, (pid, camera) in enumerate(texts):
        save(tmp_path / 'bounding_box_train' / f'{pid}_c{camera}s1_{number}.jpg', 1, 1, number)
    return tmp_path


@pytest.mark.parametrize('layout', list(layouts.LAYOUTS))
@pytest.mark.parametrize(('first', 'second', 'same'), [
    ('0007777', '7777', True), ('7777', '7778', False), ('0088', '88', True),
])
@pytest.mark.parametrize('column', ['pid', 'camid'])
def test_numbers_that_are_written_in_two_ways(tmp_path, layout, first, second, same, column):
    """007 and 7 do not silently become one person or one camera, in no layout; other numbers are two."""
    root = spelled(tmp_path, layout, first, second, column)
    if same:
        with pytest.raises(ValueError, match=f"'{first}' is also written '{second}'"):
            open_reid(root, layout)
    else:
        images = [image for image in open_reid(root, layout).train if '777' in str(image.path.relative_to(root))]
        assert len({image.pid if column == 'pid' else image.camid for image in images}) == len(images) == 2


@pytest.mark.parametrize('names', [
    ('7', '7.0'), ('anna', '007', '7'), ('Zo\u00e9', 'Zoe\u0301'), ('9' * 20, '0' + '9' * 20), ('anna', '0', '00'),
])
def test_other_ways_of_writing(tmp_path, names):
    """Numbers with a point, numbers among names, beyond an integer, and accents in two encodings."""
    named_folders(tmp_path, names)
    for split in ('query', 'gallery'):
        named_folders(tmp_path, ['b'], split)
    with pytest.raises(ValueError, match='is also written'):
        open_reid(tmp_path)


def test_identity_names(tmp_path):
    """Names tell which label is whom: numbers whatever their zeros, names also where others shift their numbers."""
    assert open_reid(market(tmp_path / 'market')).identity_names() == ['2', '7', '10']
    assert open_reid(msmt(tmp_path / 'msmt')).identity_names() == ['0', '1']
    assert open_reid(msmt(tmp_path / 'msmt')).identity_names('gallery') == ['0', '1']
    root = tmp_path / 'folders'
    named_folders(root, ['zoe', 'bert', '7'])
    for split in ('query', 'gallery'):
        named_folders(root, ['carl'], split)
    data = open_reid(root)
    labels = {pid: label for label, pid in enumerate(data.identities())}
    names = data.identity_names()
    assert names == ['7', 'bert', 'zoe']
    assert all(names[labels[image.pid]] == image.path.parts[-3] for image in data.train)
    before = data.identities()
    named_folders(root, ['anna'], 'gallery')
    assert open_reid(root).identity_names() == names
    assert open_reid(root).identities() != before
    (root / 'train' / 'bert').rename(root / 'train' / 'yves')
    assert open_reid(root).identity_names() == ['7', 'yves', 'zoe']


def test_identities_below_junk(tmp_path):
    """An identity of -2 is no junk without a word."""
    table(tmp_path, more=[('train/2_1_0.png', -2, 1, 'train')])
    with pytest.raises(ValueError, match='identity -2'):
        open_reid(tmp_path)


@pytest.mark.parametrize('value', ['nan', 'None', ''])
@pytest.mark.parametrize('column', [1, 2])
def test_values_that_are_missing(tmp_path, value, column):
    """Images without an identity or a camera in a table do not become those of a person or a camera 'nan'."""
    row = ['train/2_1_0.png', 2, 1, 'train']
    row[column] = value
    table(tmp_path, more=[row])
    with pytest.raises(ValueError, match='is empty'):
        open_reid(tmp_path)


def test_two_columns_of_one_name(tmp_path):
    """A table with two columns pid does not take one of them."""
    (tmp_path / 'images.csv').write_text('path,pid,camid,split,pid\na.png,1,1,train,2\n')
    with pytest.raises(ValueError, match="two columns 'pid'"):
        open_reid(tmp_path)
