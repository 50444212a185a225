"""`dreal-timm push`: an exported folder to the Hugging Face Hub, in one commit"""
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from dreal_timm.errors import WeightsError
from dreal_timm.hub.export import check_export
from dreal_timm.hub.fetch import explain
from dreal_timm.hub.folder import UNLISTED, check_folder, read_checksums

__all__ = ['Plan', 'Pushed', 'check_target', 'prepare', 'push']

CARD = 'README.md'
_OWN = ('.eval_results/', 'test/', 'training/')  # what the repository has there, and the folder has not, is removed


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
        raise ValueError(f"'{repo}': {' '.join(str(error).split())}") from error
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


def prepare(directory: str | Path, repo: str) -> Plan:
    """Check an exported folder as a whole, and return what would be sent of it; no network is needed.

    All files are compared with `SHA256SUMS`, which must name each of them but the card; the network is loaded, and must
    repeat the logits that lie beside it; the card's front matter is read.

    Args:
        directory: An exported folder.
        repo: USER/NAME.

    Raises:
        FileNotFoundError: No such folder.
        ValueError: The name is none of a repository, or the folder holds what was not exported.
        WeightsError: The folder is not what was exported.
    """
    directory = Path(directory)
    _check_name(repo)
    if not directory.is_dir():
        raise FileNotFoundError(f"No folder '{directory}'.")
    check_folder(directory, everything=True)
    listed = read_checksums(directory)
    names = sorted(path.relative_to(directory).as_posix() for path in directory.rglob('*') if not path.is_dir())
    names = [name for name in names if name != '.gitattributes']  # the Hub's own, in a folder that came from there
    foreign = [name for name in names if name not in listed and name not in UNLISTED]
    if foreign:
        raise ValueError(f"'{directory}' holds {foreign[0]}, which was not exported: take it away, or export again.")
    try:
        check_export(directory)
    except Exception as error:  # of any kind, since the tensors come from a file
        raise WeightsError(f"'{directory}': {' '.join(str(error).split())[:200]}") from error
    if CARD in names:
        try:
            card = ModelCard((directory / CARD).read_text(encoding='utf-8'))
        except Exception as error:  # of the YAML parser, the decoder, or the client's own
            reason = ' '.join(str(error).split())[:150]
            raise WeightsError(f"'{directory}', {CARD}: its front matter cannot be read ({reason}).") from error
        if card.data.get('library_name') != 'timm':
            raise WeightsError(f"'{directory}', {CARD}: its front matter must say 'library_name: timm'.")
    sizes = {name: (directory / name).stat().st_size for name in names}
    if CARD in sizes:
        sizes[CARD] = len(_card(directory, repo))
    return Plan(directory, repo, sizes)


def _card(directory: Path, repo: str) -> bytes:
    """The card, whose lines of use name the repository."""
    return (directory / CARD).read_bytes().replace(b'hf-hub:USER/NAME', f'hf-hub:{repo}'.encode())


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
    """Remove a repository that this push created, if no commit of it has arrived; return what is to be told."""
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
    added = [
        CommitOperationAdd(name, _card(plan.directory, repo) if name == CARD else plan.directory / name)
        for name in plan.files]
    api, created = HfApi(), False
    try:
        created = not create_pr and _create(api, repo, private)
        info = api.model_info(repo, timeout=10)
        if tag and any(known.name == tag for known in api.list_repo_refs(repo).tags):
            raise WeightsError(f"'{repo}' has a tag '{tag}' already: nothing was sent.")
        present = {sibling.rfilename for sibling in info.siblings or ()}
        done = api.create_commit(
            repo, [*added, *_stale(plan, present)], commit_message=message or f'Upload {plan.directory.name}',
            create_pr=create_pr, parent_commit=info.sha)
    except Exception as error:  # the client's own, and those of the two libraries that it sends requests with
        told = _remove(api, repo) if created else ''
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"'{repo}': it was not sent: {explain(error, repo)}{told}.") from error
    except KeyboardInterrupt:
        if created:
            _remove(api, repo)
        raise
    if tag:
        try:
            api.create_tag(repo, tag=tag, revision=done.oid)
        except Exception as error:
            raise WeightsError(
                f"'{repo}': it was sent, as {done.oid}, but has no tag '{tag}': {explain(error, repo)}.") from error
    changed = done.oid != info.sha
    return Pushed(str(done.pr_url or done.commit_url), done.oid, changed)
