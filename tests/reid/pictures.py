"""Small data sets of person re-identification in each layout"""
from pathlib import Path

from PIL import Image

# split: (identity, camera, number of images)
PEOPLE = {
    'bounding_box_train': [(2, 1, 3), (2, 2, 2), (7, 1, 4), (7, 3, 1), (10, 2, 4), (10, 3, 4)],
    'query': [(1, 1, 1), (1, 2, 1), (3, 1, 1), (4, 3, 1)],
    'bounding_box_test': [(1, 1, 2), (1, 2, 2), (3, 2, 3), (4, 3, 2), (0, 1, 2), (-1, 2, 3)],
}
SPLIT = {'bounding_box_train': 'train', 'query': 'query', 'bounding_box_test': 'gallery'}


def save(path: Path, pid: int, camid: int, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (16, 32), (20 * (pid % 11) + 20, 60 * camid, 10 * number)).save(path)


def market(root: Path, people=PEOPLE) -> Path:
    """Market-1501's folders; the query 4 has no answer from another camera, 3 images are junk."""
    for folder, rows in people.items():
        for pid, camid, count in rows:
            name = '-1' if pid < 0 else f'{pid:04}'
            for number in range(count):
                save(root / folder / f'{name}_c{camid}s1_{number:06}_01.jpg', pid, camid, number)
        (root / folder / 'Thumbs.db').write_bytes(b'of a file manager')
    return root


def rows(names: bool = False):
    """Rows of the same for a table: path, pid, camid, split."""
    for folder, people in PEOPLE.items():
        for pid, camid, count in people:
            for number in range(count):
                path = f'{SPLIT[folder]}/{pid}_{camid}_{number}.png'
                yield (path, f'p{pid}', f'cam{camid}', SPLIT[folder]) if names else (path, pid, camid, SPLIT[folder])
