"""`dreal-timm push`: an exported folder to the Hugging Face Hub, in one commit"""
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from dreal_timm.errors import WeightsError, printable, reason
from dreal_timm.hub.export import check_export
from dreal_timm.hub.fetch import explain
from dreal_timm.hub.files import check_front_matter, check_place, read_bytes
from dreal_timm.hub.folder import SUMS, UNLISTED, check_folder, read_checksums
from dreal_timm.hub.shapes import read_shapes

__all__ = ['Plan', 'Pushed', 'check_target', 'prepare', 'push']

CARD = 'README.md'
_BESIDE = ('.gitattributes', '.cache', '.DS_Store')  # of the Hub, its client and a Mac; none of it is sent
_OWN = ('.eval_results/', 'test/', 'training/')  # what the repository has there, and the folder has not, is removed
_TENSORS = 'test/rand_tensors.safetensors'
# what an export writes, and nothing else is sent
_SENT = re.compile(
    r'config\.json|model\.safetensors|README\.md|SHA256SUMS|test/rand_tensors\.safetensors|training/(args\.yaml|'
    r'summary\.csv|(run|checkpoint|results|control|float32)\.json)|\.eval_results/[A-Za-z0-9_-][A-Za-z0-9_.-]*\.yaml')
# the largest card, notes of a training and random tensors in bytes, and the numbers of a random input
_CARD_BYTES, _NOTES, _RANDOM, _NUMBERS = 2 ** 17, 2 ** 24, 2 ** 28, 2 ** 23
_FOREIGN = "'{}' holds {}, which was not exported: take it away, or export again."


@dataclass(frozen=True)
class Plan:
    """What would be sent.

    Attributes:
        directory: The exported folder.
        repo: Id of the repository.
        files: Size in bytes of each file, by its path in the repository.
    """
    directory: Path
    repo: str
    files: dict[str, int]

    def __str__(self) -> str:
        rows = [f'  {size:>12,}  {name}' for name, size in self.files.items()]
        total = f'{len(rows)} files, {sum(self.files.values()):,} bytes, in one commit to {self.repo}:'
        return '\n'.join([
            total, *rows, f"Files of the repository in {', '.join(_OWN)} that are not among these are removed."])


@dataclass(frozen=True)
class Pushed:
    """What a push came to.

    Attributes:
        url: Address of the commit, or of the pull request.
        revision: Hash of the commit; the repository's newest where nothing had changed.
        changed: Whether there was anything to send.
    """
    url: str
    revision: str
    changed: bool


def _check_name(repo: str) -> None:
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"'{repo}': {reason(error)}") from error
    if repo.count('/') != 1:
        raise ValueError(f"Name the repository as USER/NAME, got '{repo}'.")


def check_target(repo: str) -> None:
    """Check what can be known of a push without a network.

    Args:
        repo: USER/NAME.

    Raises:
        ValueError: The name is none of a repository.
        WeightsError: There is no token, or the Hub is switched off.
    """
    _check_name(repo)
    if constants.HF_HUB_OFFLINE:
        raise WeightsError(f"'{repo}': {explain(OfflineModeIsEnabled(), repo)}.")
    if get_token() is None:
        raise WeightsError(f"'{repo}': there is no token: log in (hf auth login), or set HF_TOKEN.")


def _names(directory: Path) -> Iterator[str]:
    """Paths of what would be sent; an error at the first thing that is something else."""
    for place in ('', *_OWN):
        if place and not os.path.lexists(directory / place.rstrip('/')):
            continue
        with os.scandir(directory / place) as entries:
            for entry in entries:
                name = place + entry.name
                if name in _BESIDE:
                    continue
                folder = f'{name}/' in _OWN
                if not folder and not _SENT.fullmatch(name):
                    raise WeightsError(_FOREIGN.format(directory, printable(name)))
                if not (entry.is_dir(follow_symlinks=False) if folder else entry.is_file(follow_symlinks=False)):
                    raise WeightsError(
                        f"'{directory}', {name}: it is not what was exported, but a link or a special file.")
                if not folder:
                    yield name


def _check_card(directory: Path) -> None:
    """Raise a WeightsError if there is no card whose front matter says that timm loads the network."""
    what = f"'{directory}', {CARD}"
    if not (directory / CARD).is_file():
        raise WeightsError(f'{what}: the folder has no card: export the network again.')
    try:
        text = read_bytes(directory / CARD, _CARD_BYTES).decode('utf-8')
        check_front_matter(text)
        card = ModelCard(text)
    except Exception as error:  # of the YAML parser, the decoder, or the client's own
        raise WeightsError(f'{what}: its front matter cannot be read ({reason(error)}).') from error
    if card.data.get('library_name') != 'timm':
        raise WeightsError(f"{what}: its front matter must say 'library_name: timm'.")


def prepare(directory: str | Path, repo: str) -> Plan:
    """Check an exported folder as a whole, and return what would be sent of it; no network is needed.

    Sent are plain files that an export writes, by their names, and nothing else. They are compared with `SHA256SUMS`,
    which must name each of them but the card; the network is loaded, and must repeat the logits that lie beside it; the
    card's front matter is read.

    Args:
        directory: An exported folder.
        repo: USER/NAME.

    Raises:
        FileNotFoundError: No such folder.
        ValueError: The name is none of a repository.
        WeightsError: The folder is not what was exported, holds more than that, or has no card.
    """
    directory = Path(directory)
    _check_name(repo)
    if not directory.is_dir():
        raise FileNotFoundError(f"No folder '{directory}'.")
    names = sorted(_names(directory))
    listed = read_checksums(directory)
    foreign = [name for name in listed if not _SENT.fullmatch(name) or name in UNLISTED]
    if foreign:
        raise WeightsError(f"'{directory}', {SUMS}: it names {foreign[0]}, which no export writes: export again.")
    foreign = [name for name in names if name not in listed and name not in UNLISTED]
    if foreign:
        raise WeightsError(_FOREIGN.format(directory, foreign[0]))
    for name in names:
        if name.startswith(_OWN) and (directory / name).stat().st_size > (_RANDOM if name == _TENSORS else _NOTES):
            raise WeightsError(f"'{directory}', {name}: it is larger than what an export writes: export again.")
    check_folder(directory, everything=True)
    _check_card(directory)
    check_place(directory, _TENSORS)
    try:
        size = read_shapes(directory / _TENSORS)['input'][1]
        if math.prod(size) > _NUMBERS:
            raise ValueError(f'{_TENSORS} has an input of {size}, which is too large to try')
        check_export(directory)
    except Exception as error:  # of any kind, since the tensors come from a file
        raise WeightsError(f"'{directory}': {reason(error)}") from error
    sizes = {name: (directory / name).stat().st_size for name in names}
    sizes[CARD] = len(_card(directory, repo))
    return Plan(directory, repo, sizes)


def _card(directory: Path, repo: str) -> bytes:
    """The card, whose lines of use name the repository."""
    return read_bytes(directory / CARD, _CARD_BYTES).replace(b'hf-hub:USER/NAME', f'hf-hub:{repo}'.encode())


def _additions(plan: Plan) -> list[CommitOperationAdd]:
    return [
        CommitOperationAdd(name, _card(plan.directory, plan.repo) if name == CARD else plan.directory / name)
        for name in plan.files]


def _stale(plan: Plan, present: set[str]) -> list[CommitOperationDelete]:
    return [CommitOperationDelete(name) for name in sorted(present - plan.files.keys()) if name.startswith(_OWN)]


def _create(api: HfApi, repo: str, private: bool) -> bool:
    """Create the repository; return whether it is new."""
    try:
        api.create_repo(repo, private=private or None)
    except HfHubHTTPError as error:
        if getattr(error.response, 'status_code', None) == 409:
            return False
        raise
    return True


def _remove(api: HfApi, repo: str) -> str:
    """Remove a repository that this push created, if no commit of it has arrived; return what became of it."""
    try:
        info = api.model_info(repo, timeout=10)
        if any(sibling.rfilename != '.gitattributes' for sibling in info.siblings or ()):
            return f' ({repo} holds files by now, and was left)'
        api.delete_repo(repo)
    except Exception:  # whatever it is: the first error is the one to tell
        return f' ({repo} was created, is empty, and could not be removed)'
    return f' ({repo}, which was created for this, was removed)'


def push(
        directory: str | Path,
        repo: str,
        private: bool = False,
        create_pr: bool = False,
        tag: str = '',
        message: str = '',
) -> Pushed:
    """Send an exported folder to a repository of the Hub, which is created where there is none, in one commit.

    Everything is checked before the first request (see `prepare`). Files that have not changed are not sent, and where
    none has there is no commit. The token is that of `hf auth login` or of the environment (HF_TOKEN).

    Args:
        directory: An exported folder.
        repo: USER/NAME.
        private: Create the repository as a private one; one that exists stays what it is.
        create_pr: Open a pull request at a repository that exists.
        tag: Name of a tag to give to the commit.
        message: Message of the commit.

    Raises:
        FileNotFoundError: No such folder.
        ValueError: The name is none of a repository, or the folder holds what was not exported.
        WeightsError: The folder is not what was exported, or the Hub refused or could not be reached. A repository that
            was created and is still empty is removed; one that existed never is.
    """
    if create_pr and tag:
        raise ValueError('A pull request has no commit of the repository yet that could get a tag: give it later.')
    plan = prepare(directory, repo)
    check_target(repo)
    api, created, added = HfApi(), False, _additions(plan)
    try:
        created = not create_pr and _create(api, repo, private)
        info = api.model_info(repo, timeout=10)
        if tag and any(known.name == tag for known in api.list_repo_refs(repo).tags):
            raise WeightsError(f"'{repo}' has a tag '{tag}' already: nothing was sent.")
        present = {sibling.rfilename for sibling in info.siblings or ()}
        commit = api.create_commit(
            repo, [*added, *_stale(plan, present)], commit_message=message or f'Upload {plan.directory.name}',
            create_pr=create_pr, parent_commit=info.sha)
    except Exception as error:  # the client's own, and those of the two libraries that it sends requests with
        left = _remove(api, repo) if created else ''
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"'{repo}': it was not sent: {explain(error, repo)}{left}.") from error
    except KeyboardInterrupt:
        if created:
            _remove(api, repo)
        raise
    if tag:
        try:
            api.create_tag(repo, tag=tag, revision=commit.oid)
        except Exception as error:
            raise WeightsError(
                f"'{repo}': it was sent, as {commit.oid}, but has no tag '{tag}': {explain(error, repo)}.") from error
    return Pushed(str(commit.pr_url or commit.commit_url), commit.oid, commit.oid != info.sha)
