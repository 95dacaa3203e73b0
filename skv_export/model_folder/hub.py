"""Exported folders on the Hugging Face hub: fetching into huggingface_hub's cache, and pushing.

Native code is neither fetched nor pushed: a fetched model runs with the installed library.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is httpx's, or requests' in old versions
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from skv_export import __version__
from skv_export.checkpoints.checkpoint import hub_endpoint
from skv_export.errors import SkvError
from skv_export.model_folder.card import licence_of, model_card
from skv_export.model_folder.names import CARD_FILE, CHAT_TEMPLATES_FOLDER, RECIPE_FILE, SKV_CONFIG_FILE
from skv_export.model_folder.skv_config import ModelConfig
from skv_export.paths import looks_like_path, to_path
from skv_export.spec.recipe import Recipe

logger = logging.getLogger(__name__)
PATTERNS = ("*.json", "*.jinja", "*.toml", "*.txt", "*.onnx*", "*.data", "tokenizer.model", "README.md")
"""The files of an exported folder; external data of a rewritten model may be named in any of these ways."""
_ERRORS = (OSError, ValueError, HTTPError)


def fetch(
    model: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """Returns the folder of an exported model: a local one as it is, one of the hub after downloading it.

    A snapshot in huggingface_hub's cache, whose files are links, becomes a folder of files beside it either way.

    Args:
        model: A folder, or a hub id such as ``org/name``. HF_ENDPOINT names another hub.
        revision: Branch, tag or commit of a hub id; ``main`` if not given.
        token: Of the hub; the stored one if not given.
        cache_dir: Where downloads are kept; huggingface_hub's cache if not given.
        local_files_only: Take what is there already, and ask no server.

    Raises:
        SkvError: No such folder or repository, no exported model in it, or the hub can't be reached.
    """
    path, name = to_path(model, "exported model"), str(model)
    if path.is_dir():
        return _without_links(path) if _is_snapshot(path) else path
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise _no_folder(name) from None
    if looks_like_path(name):
        raise _no_folder(name)
    api = _api(token)
    try:
        # First the file that tells an exported model from others, before gigabytes of something else.
        config = api.hf_hub_download(
            name, SKV_CONFIG_FILE, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only
        )
        commit = Path(config).parent.name
        folder = api.snapshot_download(
            name,
            revision=commit,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            allow_patterns=list(PATTERNS),
        )
        logger.info("%s at %s: %s", name, commit, folder)
        return _without_links(Path(folder))
    except _ERRORS as error:
        absent = isinstance(error, EntryNotFoundError) and isinstance(error, HfHubHTTPError)
        what = f"no {SKV_CONFIG_FILE} in this repository" if absent else "no such folder, and the hub does not give it"
        raise SkvError(
            f"{name}: {what}",
            got=_brief(error),
            expected="a model exported by skv_export",
            fix="Export it: skv-export model." if absent else "Check the name, the revision and the connection.",
        ) from error


def _no_folder(name: str) -> SkvError:
    return SkvError(f"{name}: no such folder", expected="a folder written by skv_export, or a hub id such as org/name")


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload exported model",
    create_pr: bool = False,
    replaced: Mapping[str, bytes] | None = None,
) -> str:
    """Uploads an exported folder as one commit, with a model card if the repository has none; makes the repository.

    Args:
        folder: What ``skv-export model`` wrote.
        repo_id: ``org/name``, or ``name`` in the user's own space.
        private: Of a new repository; None = the organization's default.
        token: Of the hub; the stored one if not given.
        revision: Branch to commit to; ``main`` if not given.
        commit_message: Title of the commit.
        create_pr: Open a pull request in place of a commit on the branch.
        replaced: Contents by file name that go up in place of the folder's.

    Returns:
        The commit's URL.

    Raises:
        SkvError: The folder is not an exported model, or the hub refuses.
    """
    folder = Path(folder)
    config = ModelConfig.load(folder)
    contents: dict[str, str | bytes] = {name: str(folder / name) for name in _files(folder) if name != CARD_FILE}
    contents |= replaced or {}
    operations = [CommitOperationAdd(name, content) for name, content in sorted(contents.items())]
    api = _api(token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if not api.file_exists(repo_id, CARD_FILE, revision=revision):
            operations.append(CommitOperationAdd(CARD_FILE, _card(folder, repo_id, config).encode()))
        commit = api.create_commit(
            repo_id, operations, commit_message=commit_message, revision=revision, create_pr=create_pr
        )
    except _ERRORS as error:
        raise SkvError(
            f"hub: {repo_id} can't be written", got=_brief(error), fix="Check the name and `hf auth login`."
        ) from error
    return str(commit.commit_url)


def _is_snapshot(folder: Path) -> bool:
    """Whether a folder is what huggingface_hub's ``snapshot_download`` returns: ``models--NAME/snapshots/COMMIT``."""
    folder = folder.resolve()
    return folder.parent.name == "snapshots" and (folder.parents[1] / "blobs").is_dir()


def _without_links(snapshot: Path) -> Path:
    """A folder with the same files as hard links: huggingface_hub's are symbolic links into its cache.

    ONNX Runtime reads no external data from outside the model's folder, links resolved. Hard links take no space.
    """
    names = _files(snapshot)
    if not any((snapshot / name).is_symlink() for name in names):
        return snapshot
    folder = snapshot.resolve().parents[1] / "skv_export" / snapshot.resolve().name
    if folder.is_dir() and _files(folder) == names:
        return folder
    folder.parent.mkdir(exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        for name in names:
            (made / name).parent.mkdir(exist_ok=True)
            _link_or_copy((snapshot / name).resolve(), made / name)
        made.chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder


def _files(folder: Path) -> list[str]:
    """The names of an exported folder's files that a hub holds, chat templates in their folder included."""
    places = [*folder.iterdir(), *(folder / CHAT_TEMPLATES_FOLDER).glob("*.jinja")]
    found = [path for path in places if path.is_file() and any(fnmatch(path.name, p) for p in PATTERNS)]
    return sorted(path.relative_to(folder).as_posix() for path in found)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _api(token: str | bool | None) -> HfApi:
    return HfApi(endpoint=hub_endpoint(), token=token, library_name="skv_export", library_version=__version__)


def _card(folder: Path, repo_id: str, config: ModelConfig) -> str:
    """The card of a repository: the folder's own names a folder, not a hub id."""
    recipe = folder / RECIPE_FILE
    evidence = Recipe.load(recipe).description if recipe.is_file() else ""
    return model_card(config, repo_id, licence=licence_of(folder), evidence=evidence)
