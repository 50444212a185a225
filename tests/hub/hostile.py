"""Folders of strangers, for `test_hostile.py`: each is opened in this process, whose memory is limited

`python tests/hub/hostile.py FOLDER fuzz 17` looks at the seventeenth mutation of the exported FOLDER alone, and
`python tests/hub/hostile.py FOLDER cases NAME` at one case. What is wrong is printed, as JSON.
"""
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dreal_timm.hub import load, prepare
from dreal_timm.hub.folder import checksums

MB = 2 ** 20
CLEAN = (FileExistsError, FileNotFoundError, ValueError)  # WeightsError is a ValueError


class Hang(BaseException):
    """Thirty seconds have gone."""


def stop(*_):
    raise Hang


def sign(folder):
    """Give a folder the list of checksums that its files ask for, as a stranger would."""
    (folder / 'SHA256SUMS').write_text(checksums(folder))


def edit(folder, **values):
    """Change values of the config: of the table before `__`, or of the whole."""
    config = json.loads((folder / 'config.json').read_text())
    for key, value in values.items():
        table, _, name = key.rpartition('__')
        (config[table] if table else config)[name] = value
    (folder / 'config.json').write_text(json.dumps(config))
    sign(folder)


def replaced(folder, name, make):
    """Put something else in the place of a file."""
    path = folder / name
    if path.is_file() or path.is_symlink():
        path.unlink()
    path.parent.mkdir(exist_ok=True)
    make(path)


def sparse(size):
    def make(path):
        with open(path, 'wb') as file:
            file.truncate(size)
    return make


def table(path, rows):
    """A safetensors file with so many tensors of a number each, all in the right place."""
    header = json.dumps({
        f't{i}': {'dtype': 'F32', 'shape': [1], 'data_offsets': [4 * i, 4 * i + 4]} for i in range(rows)}).encode()
    path.write_bytes(struct.pack('<Q', len(header)) + header + bytes(4 * rows))


def bin_file(folder, content, compression=zipfile.ZIP_STORED, storage=b'\0' * 8):
    """A pickle of this content, in the zip that torch.save writes, in place of the weights."""
    (folder / 'model.safetensors').unlink()
    with zipfile.ZipFile(folder / 'pytorch_model.bin', 'w', compression) as archive:
        archive.writestr('a/data.pkl', content)
        archive.writestr('a/byteorder', 'little')
        archive.writestr('a/data/0', storage)
        archive.writestr('a/version', '3\n')
    sign(folder)


def tensor_pickle(numel, shape, strides):
    """The pickle of one tensor `fc.bias`, of a storage that promises so many numbers."""
    def text(value):
        return b'X' + struct.pack('<I', len(value)) + value.encode()

    def number(value):
        return b'\x8a\x08' + struct.pack('<q', value)

    storage = b'(' + text('storage') + b'ctorch\nFloatStorage\n' + text('0') + text('cpu') + number(numel) + b'tQ'
    sizes = b'(' + b''.join(map(number, shape)) + b't' + b'(' + b''.join(map(number, strides)) + b't'
    ordered = b'ccollections\nOrderedDict\n)R'
    rebuilt = b'ctorch._utils\n_rebuild_tensor_v2\n(' + storage + number(0) + sizes + b'\x89' + ordered + b'tR'
    return b'\x80\x02}(' + text('fc.bias') + rebuilt + b'u.'


def legacy_bin(folder):
    """torch's format before the zip, whose storage promises 4 TB before any of it is there."""
    (folder / 'model.safetensors').unlink()
    saved = io.BytesIO()
    torch.save({'fc.bias': torch.zeros(7)}, saved, _use_new_zipfile_serialization=False)
    content = saved.getvalue().replace(b'K\x07', b'\x8a\x06' + struct.pack('<q', 10 ** 12)[:6])
    (folder / 'pytorch_model.bin').write_bytes(content)
    sign(folder)


def nested_key():
    """A pickle whose key is a tuple of tuples, forty deep, which share their parts: 2 ** 40 steps to hash."""
    key: tuple = ()
    for _ in range(40):
        key = (key, key)
    stream = io.BytesIO()
    pickler = pickle._Pickler(stream, 2)
    pickler.write(b'\x80\x02}(')
    pickler.save(key)
    pickler.save(1)
    return stream.getvalue() + b'u.'


def huge_input(folder):
    """A random input of 50 million numbers, to be tried with the network."""
    header = json.dumps({'input': {'dtype': 'F32', 'shape': [1, 3, 4096, 4096], 'data_offsets': [0, 12 * 4096 ** 2]}})
    path = folder / 'test' / 'rand_tensors.safetensors'
    path.write_bytes(struct.pack('<Q', len(header)) + header.encode())
    with open(path, 'r+b') as file:
        file.truncate(8 + len(header) + 12 * 4096 ** 2)
    sign(folder)


LAUGHS = 'a: &a [1,1,1,1,1,1,1,1,1]\n' + ''.join(
    f'{chr(98 + i)}: &{chr(98 + i)} [{",".join([f"*{chr(97 + i)}"] * 9)}]\n' for i in range(12))
MERGES = 'a: &a {x: 1, y: 2}\n' + ''.join(
    f'{chr(98 + i)}: &{chr(98 + i)}\n  <<: [{",".join([f"*{chr(97 + i)}"] * 9)}]\n' for i in range(12))


def card(head):
    return lambda folder: (folder / 'README.md').write_text(f'---\nlibrary_name: timm\n{head}\n---\n# A\n')


CASES = {
    **{f'layers-{i}': lambda f, v=value: edit(f, model_args__layers=v) for i, value in enumerate((
        [10 ** 9, 1, 1, 1], [10 ** 4] * 4, [2 ** 13, 1, 1, 1], [1] * 10 ** 6, 10 ** 18, [10 ** 400] * 4, -1, 'x'))},
    'widths': lambda f: edit(f, model_args__channels=[2 ** 40] * 4),
    'stem': lambda f: edit(f, model_args__stem_width=2 ** 14, model_args__stem_type='deep'),
    'base-width': lambda f: edit(f, model_args__base_width=2 ** 14, model_args__cardinality=2 ** 10),
    'classes': lambda f: edit(f, num_classes=10 ** 12, model_args__num_classes=10 ** 12),
    'many-classes': lambda f: edit(f, num_classes=2 ** 24, model_args__num_classes=2 ** 24),
    'channels-of-images': lambda f: edit(f, model_args__in_chans=10 ** 7),
    'size-of-images': lambda f: edit(f, pretrained_cfg__input_size=[3, 10 ** 6, 10 ** 6]),
    'crop': lambda f: edit(f, pretrained_cfg__crop_pct=1e-9),
    'labels': lambda f: edit(f, label_names=['a'] * 2 * 10 ** 6),
    'labels-nested': lambda f: edit(f, label_names=[[]] * 10 ** 6),
    'labels-table': lambda f: edit(f, label_descriptions={str(i): str(i) for i in range(10 ** 6)}),
    'deep': lambda f: (f / 'config.json').write_text('[' * 10 ** 6),
    'deep-arguments': lambda f: (f / 'config.json').write_text((f / 'config.json').read_text().replace(
        '"model_args": {', '"model_args": {"block_args": ' + '{"a":' * 900 + '1' + '}' * 900 + ',')),
    'reid': lambda f: edit(f, architecture='dreal_reid', model_args={
        'backbone': 'test_resnet', 'backbone_args': {'layers': [2 ** 13] * 4}}),
    **{f'table-{rows}': lambda f, n=rows: (table(f / 'model.safetensors', n), sign(f)) for rows in (20000, 10 ** 6)},
    'table-length': lambda f: (
        (f / 'model.safetensors').write_bytes(struct.pack('<Q', 2 ** 27) + b'{"a":' + b' ' * 2 ** 27), sign(f)),
    'bin-legacy': legacy_bin,
    'bin-terabytes': lambda f: bin_file(f, tensor_pickle(10 ** 12, [10 ** 12], [1])),
    'bin-shape': lambda f: bin_file(f, tensor_pickle(2, [10 ** 12], [1])),
    'bin-stride': lambda f: bin_file(f, tensor_pickle(2, [10 ** 6, 10 ** 6], [0, 0])),
    'bin-negative': lambda f: bin_file(f, tensor_pickle(-1, [-1], [-1])),
    'bin-compressed': lambda f: bin_file(
        f, tensor_pickle(10 ** 9, [10 ** 9], [1]), zipfile.ZIP_DEFLATED, bytes(4 * 10 ** 8)),
    'bin-bytearray': lambda f: bin_file(f, b'\x80\x02c__builtin__\nbytearray\n\x8a\x06' + struct.pack(
        '<q', 10 ** 12)[:6] + b'\x85R.'),
    'bin-keys': lambda f: bin_file(f, nested_key()),
    'bin-opcodes': lambda f: bin_file(f, b'\x80\x02' + b']' * 3 * MB + b'.'),
    'bin-memory': lambda f: bin_file(f, pickle.dumps(OrderedDict(a=1), 2).replace(b'q\0', b'r\xff\xff\xff\x7f', 1)),
    'huge-input': huge_input,
    'card-laughs': card(LAUGHS), 'card-merges': card(MERGES), 'card-long': card('a:\n' + '- b\n' * 10 ** 6),
    'card-deep': card('a: ' + '[' * 5000),
    'many-files': lambda f: [(f / 'test' / f'{i}.txt').write_text('') for i in range(300)],
}
SENT = {'config.json', 'model.safetensors', 'SHA256SUMS', 'README.md', 'test/rand_tensors.safetensors'}
FILES = (
    'config.json', 'model.safetensors', 'SHA256SUMS', 'README.md', 'test/rand_tensors.safetensors', 'training/run.json',
    'test', '.eval_results')


def kinds(outside):
    """What can stand in the place of a file."""
    return {
        'zero': lambda path: path.symlink_to('/dev/zero'),
        'pipe': os.mkfifo,
        'link': lambda path: path.symlink_to(outside / path.name),
        'loop': lambda path: path.symlink_to(path.name),
        'folder': lambda path: path.mkdir(),
        'sparse': sparse(2 ** 40),
    }


def used(key):
    """A line of this process's status, in bytes."""
    return int(next(line for line in open('/proc/self/status') if line.startswith(key)).split()[1]) * 1024


def exhausted(error):
    """Whether memory was asked for in vain."""
    while error is not None:
        if isinstance(error, MemoryError) or 'allocate' in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def holds(model, folder):
    """Whether a network's tensors are those of the folder's file."""
    file = folder / 'model.safetensors'
    state = load_file(file) if file.exists() else torch.load(folder / 'pytorch_model.bin', weights_only=True)
    state, own = state.get('state_dict', state), model.state_dict()
    return own.keys() == state.keys() and all(
        torch.equal(own[name].nan_to_num(), tensor.to(own[name].dtype).nan_to_num()) for name, tensor in state.items())


def attempt(call, limit):
    """What a call returns, and what is wrong with how it ended."""
    resource.setrlimit(resource.RLIMIT_AS, (used('VmSize') + limit, resource.RLIM_INFINITY))
    signal.alarm(30)
    start, result, wrong = time.process_time(), None, ''
    try:
        result = call()
    except CLEAN as error:
        if exhausted(error):
            wrong = f'memory: {error}'
        elif '\n' in str(error) or len(str(error)) > 800:
            wrong = f'message: {str(error)[:1000]}'
    except BaseException as error:
        wrong = f'{type(error).__name__}: {str(error)[:300]}'
    signal.alarm(0)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    if time.process_time() - start > 5:
        wrong += f' {time.process_time() - start:.1f} s'
    return result, wrong


def size(folder):
    """Bytes on the disk, which holes of a file do not count as."""
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob('*'))


def look(folder, limit, refused=()):
    """What is wrong with how a folder is loaded and prepared, and whether it was loaded."""
    found, loaded = [], False
    for call in (load, prepare):
        result, wrong = attempt(
            lambda: call(str(folder)) if call is load else call(folder, 'user/name'), limit + 3 * size(folder))
        loaded |= call is load and result is not None
        if wrong:
            found.append(f'{call.__name__}: {wrong}')
        elif result is not None and call.__name__ in refused:
            found.append(f'{call.__name__}: it was not refused')
        elif result is not None and call is load and not holds(result, folder):
            found.append('load: other weights')
        elif call is prepare and result is not None and {*result.files} != SENT:
            found.append(f'prepare: {sorted(result.files)}')
    return found, loaded


def cases(source, names):
    """Look at the cases; return what is wrong, by their names."""
    wrong = {}
    with tempfile.TemporaryDirectory() as scratch:
        outside = shutil.copytree(source, Path(scratch) / 'outside')
        for path in [*outside.rglob('*')]:  # by their names alone
            if path.is_file() and path.parent != outside:
                shutil.copy(path, outside)
        ways = {
            **CASES,
            **{f'{name} {kind}': lambda f, n=name, m=make: (
                replaced(f, n, m) if n not in ('test',) else (shutil.rmtree(f / n), replaced(f, n, m)))
                for name in FILES for kind, make in kinds(outside).items()
                if (name, kind) not in (('test', 'folder'), ('.eval_results', 'folder'))}}
        for name in names or ways:
            folder = shutil.copytree(source, Path(scratch) / 'net')
            (folder / 'training').mkdir(exist_ok=True)
            ways[name](folder)
            found, _ = look(folder, 300 * MB, ('prepare',))
            if found:
                wrong[name] = found
            shutil.rmtree(folder)
    return wrong


def value(draw):
    """Some value of JSON."""
    return draw.choice((
        None, True, False, 0, 1, -1, 7, 9, 10 ** 3, 2 ** 31, 10 ** 30, 0.5, -1e300, float('nan'), float('inf'), '',
        'x', 'se', 'cbam', 'resnet18', '../../etc/passwd', 'hf-hub:user/other', 'http://127.0.0.1:9/a.pth', '\x1b[31m',
        [], {}, [1], [3, 64, 64], ['a'] * 7, {'a': 1}, [[[]]], {'pretrained': True}, {'attn_layer': 'eca'},
        'x' * 10 ** 4, [0] * 10 ** 4))


def mutate_json(draw, text):
    """Give some place of a JSON text another value, or take it away, or add one."""
    told = json.loads(text)
    for _ in range(draw.choice((1, 1, 2, 4))):
        part = told
        while True:
            keys = list(part) if isinstance(part, dict) else list(range(len(part)))
            if not keys:
                break
            key = draw.choice(keys)
            if isinstance(part[key], (dict, list)) and part[key] and draw.random() < 0.7:
                part = part[key]
                continue
            break
        kind = draw.randrange(4)
        if not keys or kind == 0:
            name = draw.choice((
                'layers', 'channels', 'pretrained', 'features_only', 'pruned', 'drop_rate', 'global_pool', 'block',
                'pretrained_strict', 'output_stride', 'in_chans', 'label_offset', 'hf_hub_filename', 'a'))
            if isinstance(part, dict):
                part[name] = value(draw)
            else:
                part.append(value(draw))
        elif kind == 1:
            del part[key]
        else:
            part[key] = value(draw)
    return json.dumps(told)


def mutate(draw, folder, outside):
    """Break a folder in one of many ways; half of them come with a list of checksums that fits."""
    names = ('config.json', 'model.safetensors', 'SHA256SUMS', 'README.md', 'test/rand_tensors.safetensors')
    kind, path = draw.randrange(8), folder / draw.choice(names)
    weights, config = folder / 'model.safetensors', folder / 'config.json'
    if kind == 0:  # bytes
        content = bytearray(path.read_bytes())
        for _ in range(draw.choice((1, 1, 8, 100))):
            content[draw.randrange(min(len(content), draw.choice((16, 4096, len(content)))))] = draw.randrange(256)
        path.write_bytes(content)
    elif kind == 1:
        path.write_bytes(path.read_bytes()[:draw.randrange(path.stat().st_size)])
    elif kind in (2, 3):
        config.write_text(mutate_json(draw, config.read_text()))
    elif kind == 4:  # the table of the weights
        content = weights.read_bytes()
        length = int.from_bytes(content[:8], 'little')
        header = mutate_json(draw, content[8:8 + length]).encode()
        weights.write_bytes(struct.pack('<Q', len(header)) + header + content[8 + length:])
    elif kind == 5:  # other tensors
        tensors = load_file(weights)
        name = draw.choice(sorted(tensors))
        tensor = tensors.pop(name)
        tensors[draw.choice((name, f'{name}.x', '../x', 'critic.weight'))] = draw.choice((
            tensor, tensor.reshape(-1)[:1].repeat(3, 3), tensor.unsqueeze(0), tensor.long(), tensor.half(),
            tensor.to(torch.complex64), tensor * float('nan')))
        save_file(tensors, weights)
    elif kind == 6:
        replaced(folder, path.relative_to(folder).as_posix(), draw.choice(list(kinds(outside).values())))
    else:
        state = load_file(weights)
        weights.unlink()
        torch.save(draw.choice((state, {'state_dict': state}, list(state.values()), {'a': 1}, state['fc.bias'])), (
            folder / 'pytorch_model.bin'))
    sums = draw.randrange(3)
    plain = all(part.is_file() and not part.is_symlink() and part.stat().st_size < 100 * MB
                for part in folder.rglob('*') if part.name not in ('test', 'training'))
    if sums == 0 and plain:
        sign(folder)
    elif sums == 1 and (folder / 'SHA256SUMS').is_file():
        (folder / 'SHA256SUMS').unlink()


def fuzz(source, numbers):
    """Look at mutations by their numbers; return what is wrong, and how many were loaded."""
    wrong, loaded = {}, 0
    with tempfile.TemporaryDirectory() as scratch:
        outside = shutil.copytree(source, Path(scratch) / 'outside')
        shutil.copy(outside / 'test' / 'rand_tensors.safetensors', outside)
        for number in numbers:
            folder = shutil.copytree(source, Path(scratch) / 'net')
            mutate(random.Random(number), folder, outside)
            found, read = look(folder, 300 * MB)
            loaded += read
            if found:
                wrong[str(number)] = found
            shutil.rmtree(folder)
    return {'wrong': wrong, 'loaded': loaded}


if __name__ == '__main__':
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, stop)
    folder, what, *names = sys.argv[1:]
    prepare(folder, 'user/name')  # what is loaded once is loaded now
    if what == 'fuzz':
        told = fuzz(folder, [int(name) for name in names] or range(200))
    else:
        told = {'wrong': cases(folder, names)}
    json.dump(told, sys.stdout)
