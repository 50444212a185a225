"""Files of the Hub: fetched into the client's cache, compared with their hash, and errors in one form

The client retries each file for 23 seconds where there is no network, and timm asks for two. Here one request decides
whether the Hub can be reached, before a request that would be retried.
"""
import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from dreal_timm.errors import WeightsError, reason

__all__ = ['WEIGHTS_FILES', 'digest', 'explain', 'fetch']

WEIGHTS_FILES = ('model.safetensors', 'pytorch_model.bin')  # in timm's order
_TIMEOUT = 10.0  # seconds


def digest(path: str | Path) -> str:
    """Return the SHA-256 of a file."""
    sha256 = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(1 << 20):
            sha256.update(block)
    return sha256.hexdigest()


def explain(error: BaseException, repo: str) -> str:
    """Return why a request to the Hub failed, and what to do.

    Args:
        error: What the client raised.
        repo: Id of the repository.
    """
    chain, cause = [], error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
    kinds: list[tuple[Any, str]] = [
        (OfflineModeIsEnabled, 'the Hub is switched off (HF_HUB_OFFLINE): unset it, or fill the cache elsewhere'),
        (GatedRepoError, f'it is gated: ask for access at {constants.ENDPOINT}/{repo}, and log in (hf auth login)'),
        (RevisionNotFoundError, 'there is no such revision: look at its branches and tags'),
        (RepositoryNotFoundError, 'there is no such repository, or it is private: check its name, or log in'),
    ]
    for kind, text in kinds:
        if any(isinstance(item, kind) for item in chain):
            return text
    for item in chain:
        if isinstance(item, EntryNotFoundError) and not isinstance(item, LocalEntryNotFoundError):
            return 'the repository has no such file'
        if isinstance(item, HfHubHTTPError):
            status = getattr(item.response, 'status_code', None)
            texts = {
                401: 'the token is not valid: log in (hf auth login), or set HF_TOKEN',
                403: 'the token does not allow it: log in with one that may',
                404: 'the Hub has no such address: check the name, and HF_ENDPOINT if it is set',
                412: 'the repository changed meanwhile: try again',
                429: 'too many requests: wait, or log in',
            }
            if status in texts:
                return texts[status]
            if status is not None and status >= 500:
                return f'the Hub answers with an error ({status}): try again later'
            return reason(item)
    if isinstance(error, HFValidationError):
        return reason(error)
    if isinstance(error, OSError) and error.errno and not isinstance(error, (ConnectionError, TimeoutError)):
        return f'{error.strerror}: {error.filename or constants.HF_HUB_CACHE}'
    why = reason(chain[-1])
    return f'{constants.ENDPOINT} cannot be reached ({why}): check the network, or fill the cache elsewhere'


def _verify(path: str, repo: str, file: str, sha256: str) -> None:
    """Compare a file of the cache with the hash that it is stored under, as large files are, and with a known one."""
    blob = os.path.realpath(path)
    expected = os.path.basename(blob)
    actual = digest(blob)
    if sha256 and expected == actual != sha256:
        raise WeightsError(f"'{repo}', {file}: it is not what was released (wrong SHA-256): tell its maintainers.")
    if (re.fullmatch('[0-9a-f]{64}', expected) and actual != expected) or (sha256 and actual != sha256):
        raise WeightsError(f"'{repo}', {file}: the copy in the cache is broken (wrong SHA-256): delete {blob}")


def _cached(repo: str, revision: str | None, files: Sequence[str]) -> str | None:
    """The first of these files that is in the cache, by its name."""
    for file in files:
        if isinstance(try_to_load_from_cache(repo, file, revision=revision), str):
            return file
    return None


def _download(repo: str, file: str, revision: str | None) -> str:
    """The client's download; a kept connection that the Hub has ended meanwhile is tried once more."""
    try:
        return hf_hub_download(repo, file, revision=revision)
    except Exception as error:  # of the library that the client sends requests with
        if type(error).__module__.split('.')[0] not in ('httpx', 'httpx2', 'requests'):
            raise
    return hf_hub_download(repo, file, revision=revision)


def fetch(source: str, config: bool, weights: Sequence[str] = WEIGHTS_FILES, sha256: str = '') -> None:
    """Bring what timm loads from a repository into the client's cache, and compare it with its hash.

    A commit that the cache has asks nothing of the Hub; of a branch it asks whether there is a newer one.

    Args:
        source: Id of the repository, with `@REVISION` where one is meant.
        config: Whether config.json is wanted too.
        weights: Names of the file with the weights, the first that there is; none for the config alone.
        sha256: Of the weights, where it is known.

    Raises:
        WeightsError: Offline, no such repository, revision or file, no access, or a broken copy in the cache.
    """
    repo, _, revision = source.partition('@')
    file = 'config.json' if config else weights[0]
    try:
        needed = ['config.json'] if config else []
        chosen = _cached(repo, revision or None, weights)
        if (weights and chosen is None) or (config and _cached(repo, revision or None, needed) is None):
            if constants.HF_HUB_OFFLINE:
                raise OfflineModeIsEnabled(f'{repo} is not in the cache.')
            info = HfApi().model_info(repo, revision=revision or None, timeout=_TIMEOUT)
            names = {sibling.rfilename for sibling in info.siblings or ()}
            chosen = next((name for name in weights if name in names), weights[0]) if weights else None
        for file in (*needed, *([chosen] if chosen else [])):
            path = _download(repo, file, revision or None)
        if chosen:
            _verify(path, repo, chosen, sha256)
    except WeightsError:
        raise
    except Exception as error:  # the client's own, and those of the two libraries that it sends requests with
        raise WeightsError(f"'{source}', {file}: {explain(error, repo)}.") from error
