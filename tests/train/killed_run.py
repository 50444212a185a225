"""Run a recipe and kill it with SIGKILL, again and again, then to its end; a script of test_kill.py

Packages are imported once, in a parent that does no arithmetic; each attempt is a fork of it.
"""
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

import dreal_timm.train.checkpoint as checkpoint
import dreal_timm.train.classification as classification
import dreal_timm.train.loop as loop
from dreal_timm.train import run


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_call(owner, name: str, number: int, after: bool = False) -> None:
    """Die at the n-th call of a function, before it or after."""
    original, calls = getattr(owner, name), [0]

    def wrapper(*args, **kwargs):
        calls[0] += 1
        if calls[0] == number and not after:
            die()
        result = original(*args, **kwargs)
        if calls[0] == number:
            die()
        return result

    setattr(owner, name, wrapper)


def die_in_write(number: int) -> None:
    """Die when half of the n-th checkpoint is on the disk."""
    original, calls = torch.save, [0]

    def save(state, file):
        calls[0] += 1
        original(state, file)
        if calls[0] == number:
            file.truncate(file.tell() // 2)
            file.flush()
            die()

    torch.save = save


PLACES = {
    'step': lambda: die_at_call(loop, '_step', 3),
    'validation': lambda: die_at_call(classification, 'evaluate', 1),
    'validation of the average': lambda: die_at_call(classification, 'evaluate', 2, after=True),
    'half a write': lambda: die_in_write(1),
    'before last is replaced': lambda: die_at_call(checkpoint.os, 'replace', 3),
    'after last is replaced': lambda: die_at_call(checkpoint.Checkpoints, '_copy', 1),
    'before a copy': lambda: die_at_call(checkpoint.shutil, 'copyfile', 1),
    'after a copy': lambda: die_at_call(checkpoint.shutil, 'copyfile', 1, after=True),
    'before a link': lambda: die_at_call(checkpoint.os, 'link', 1),
    'after a link': lambda: die_at_call(checkpoint.os, 'link', 1, after=True),
    'after all files': lambda: die_at_call(loop, 'write_summary', 1),
    'after the summary': lambda: die_at_call(loop, 'write_summary', 1, after=True),
}


def attempt(recipe: dict, place, seconds: float) -> bool:
    """Run in a fork until it is killed or done; return whether it was killed."""
    pid = os.fork()
    if pid == 0:
        try:
            if place is not None:
                PLACES[place]()
            run(recipe)
            os._exit(0)
        except BaseException as error:
            print(f'{type(error).__name__}: {error}', file=sys.stderr, flush=True)
            os._exit(1)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        time.sleep(0.005)
    else:
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit(f'an attempt failed ({place})')
    return os.WIFSIGNALED(status)


def main() -> None:
    recipe = json.loads(Path(sys.argv[1]).read_text())
    kills, longest = int(sys.argv[2]), float(sys.argv[3])
    last = Path(recipe['output'], recipe['experiment'], 'last.pth.tar')
    moments = random.Random(0)
    places, done = list(PLACES) if sys.argv[4] == 'all' else [], 0
    while done < kills:
        place = places.pop(0) if places else None
        killed = attempt(recipe, place, 60.0 if place else moments.uniform(0.0, longest))
        if not killed:
            break  # it came to its end
        done += 1
        left = recipe['epochs']
        if last.exists():  # it is whole at any moment
            left -= torch.load(last, weights_only=True)['epoch'] + 1
        if left <= kills - done:  # or it would end before it was killed so often
            longest *= 0.7
    finished = not attempt(recipe, None, 600.0)
    print(json.dumps({'kills': done, 'finished': finished}))


if __name__ == '__main__':
    main()
