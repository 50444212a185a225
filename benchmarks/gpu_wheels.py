"""A folder of wheels of what a machine with torch, torchvision, numpy and Pillow lacks to run `gpu.py --wheels DIR`

    python benchmarks/gpu_wheels.py DIR --python 3.12

For Linux on x86-64. Needs the package index, pip and packaging; the machine with the GPU then needs neither. What torch
and torchvision bring is left out.
"""
import argparse
import re
import subprocess
import sys
import zipfile
from email.parser import HeaderParser
from pathlib import Path

from gpu_parts.table import REQUIRED
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LIMIT = 60  # MB, 10**6 bytes: it has to travel
WITH_TORCH = {
    'torch', 'torchvision', 'numpy', 'pillow', 'filelock', 'fsspec', 'jinja2', 'markupsafe', 'mpmath', 'networkx',
    'setuptools', 'sympy', 'triton', 'typing-extensions'}


def needs(wheel: Path, python: str) -> list[Requirement]:
    """Return what a wheel needs on Linux with this Python, without its extras."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith('.dist-info/METADATA'))
        metadata = HeaderParser().parsestr(archive.read(name).decode())
    place = {
        'python_version': python, 'python_full_version': f'{python}.0', 'sys_platform': 'linux', 'extra': '',
        'platform_system': 'Linux', 'platform_machine': 'x86_64', 'platform_python_implementation': 'CPython'}
    found = [Requirement(text) for text in metadata.get_all('Requires-Dist') or ()]
    return [each for each in found if each.marker is None or each.marker.evaluate(place)]


def download(requirement: str, folder: Path, python: str) -> Path:
    """Download the wheel of a requirement for Linux on x86-64."""
    before = set(folder.glob('*.whl'))
    platforms = [f'manylinux_2_{minor}_x86_64' for minor in (34, 31, 28, 27, 24, 17)] + ['manylinux2014_x86_64']
    done = subprocess.run(
        [sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', '--only-binary=:all:', '--dest', str(folder),
         '--python-version', python, '--implementation', 'cp',
         *(word for platform in platforms for word in ('--platform', platform)), requirement],
        capture_output=True, text=True)
    new = set(folder.glob('*.whl')) - before
    if done.returncode or len(new) != 1:
        sys.exit(f'gpu_wheels.py: error: no wheel of {requirement} for Python {python}:\n{done.stderr[-800:]}')
    return new.pop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path, metavar='DIR', help='folder to make')
    parser.add_argument('--python', default=f'{sys.version_info[0]}.{sys.version_info[1]}',
                        help="version of the machine's Python (this one's)")
    args = parser.parse_args()
    if not re.fullmatch(r'3\.\d+', args.python):
        parser.error(f"--python takes a version such as 3.12, got '{args.python}'")
    try:
        args.folder.mkdir(parents=True, exist_ok=True)
        if any(args.folder.iterdir()):
            parser.error(f'{args.folder} is not empty')
    except OSError as error:
        parser.error(f'{args.folder} cannot be made: {error}')
    todo = [Requirement(name if oldest is None else f'{name}>={oldest}') for name, oldest in REQUIRED.items()]
    done = set(WITH_TORCH)
    while todo:
        requirement = todo.pop(0)
        name = canonicalize_name(requirement.name)
        if name in done:
            continue
        done.add(name)
        wheel = download(f'{requirement.name}{requirement.specifier}', args.folder, args.python)
        print(f'{wheel.stat().st_size / 1e6:6.1f} MB  {wheel.name}', flush=True)
        todo += needs(wheel, args.python)
    size = sum(wheel.stat().st_size for wheel in args.folder.glob('*.whl')) / 1e6
    print(f'{size:6.1f} MB in {args.folder}')
    if size > LIMIT:
        sys.exit(f'gpu_wheels.py: error: more than {LIMIT} MB')


if __name__ == '__main__':
    main()
