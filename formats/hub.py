"""The Hub: publishing an adapter in one commit, and saying in one line, without the token, what it refused."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub.constants
from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from adapt_convert.formats.card import published_card
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.location import HUB_ID, read_json
from adapt_convert.formats.profiles import GGUF_WEIGHTS
from adapt_convert.formats.published import IMAGE, LATTE, PEFT, SHARED_LORA, Report, check_adapter, private_paths, without_paths
from adapt_convert.formats.validation_card import failed_validation

# A connection that breaks raises an error of the client's HTTP library, which differs between its releases.
FAILURES: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, OSError)
_REFUSALS: tuple[type[Exception], ...] = (*FAILURES, ValueError)  # with what it finds wrong with a card
REPORT, CARD, _VALIDATION = "conversion.json", "README.md", "validation.json"
# What a conversion and its validation write; anything else in the directory is its owner's business.
_WEIGHTS = (PEFT[0], LATTE[0], SHARED_LORA[0], GGUF_WEIGHTS, *IMAGE)
_SENT = (CARD, *PEFT, *LATTE, *SHARED_LORA, GGUF_WEIGHTS, *IMAGE, REPORT, _VALIDATION)
_ATTEMPTS = 3
_CONFLICTS = (409, 412)


@dataclass(frozen=True)
class Upload:
    """What would be sent: `files` by their path in the repository, and what a user should know first."""

    repo: str
    files: dict[str, Path | bytes]
    notes: tuple[str, ...]

    @property
    def card(self) -> str:
        content = self.files.get(CARD, b"")
        return content.decode() if isinstance(content, bytes) else ""

    def to_json(self) -> dict[str, Any]:
        sizes = {name: len(held) if isinstance(held, bytes) else held.stat().st_size for name, held in self.files.items()}
        return {"repo": self.repo, "files": sizes, "notes": list(self.notes)}


def push(
    directory: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """Publish an adapter directory as the Hub repository `repo` (`org/name`), which is made if need be.

    Everything goes up in one commit: either all of it is there afterwards or nothing. `revision` is the branch, made if need
    be; `create_pr` opens a pull request instead of changing it. The token is the Hub client's own (HF_TOKEN, or its login).
    `dry_run` asks nobody. Returns the repository, the files with their sizes, and unless `dry_run` the commit.

    Raises `AdaptError` for a directory without a report, one whose validation failed (unless `force`), or when the Hub
    refuses; a conflict with another commit, a server error or a lost connection is tried again first.
    """
    upload = prepare(Path(directory), repo, force)
    if create_pr and revision not in (None, "main"):
        raise AdaptError("--create-pr and --revision contradict each other; a pull request is made against main")
    if dry_run:
        return upload.to_json() | {"card": upload.card}
    check_login(repo)
    api, left = HfApi(), ""
    try:
        is_new = not api.repo_exists(repo)
        api.create_repo(repo, private=private or None, exist_ok=True)
        left = " (the repository was made, and is empty)" if is_new else ""
        if revision:
            api.create_branch(repo, branch=revision, exist_ok=True)
        commit = _commit(api, upload, revision, create_pr)
    except _REFUSALS as error:
        raise AdaptError(f"{repo}: nothing was published{left}: {hub_message(error)}") from None
    result = {"url": commit.commit_url, "commit": commit.oid, "pull_request": commit.pr_url}
    return upload.to_json() | {name: value for name, value in result.items() if value}


def prepare(directory: Path, repo: str, force: bool = False) -> Upload:
    """Check what is to be published, without any network. Raises `AdaptError`."""
    check_repo(repo)
    report_path = directory / REPORT
    if not directory.is_dir():
        raise AdaptError(f"{directory}: no such directory")
    if not report_path.is_file() and not force:
        raise AdaptError(f"{directory}: has no {REPORT}, so nobody can tell what it holds; --force pushes it all the same")
    found = {name: directory / name for name in _SENT if (directory / name).is_file()}
    report = Report.read(report_path) if REPORT in found else None
    check_adapter(directory, report)
    card = _read_text(found[CARD]) if CARD in found else ""
    validation = read_json(found[_VALIDATION]) if _VALIDATION in found else {}
    failed = failed_validation(card) or validation.get("passed") is False
    if failed and not force:
        raise AdaptError(f"{directory}: its validation failed; --force pushes it all the same")
    notes = [] if not failed else ["its validation failed"]
    if report is not None and report.base_is_local:
        notes.append("the base was a local path, so the card names no base_model")
    hidden = private_paths(report, validation)
    files: dict[str, Path | bytes] = dict(found)
    for name in found:
        if name not in _WEIGHTS:
            files[name] = without_paths(_read_text(found[name]), hidden).encode()
    if CARD in found:
        files[CARD] = published_card(without_paths(card, hidden), repo).encode()
    return Upload(repo, files, tuple(notes))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise AdaptError(f"{path}: is not text in UTF-8") from None
    except OSError as error:
        raise AdaptError(f"{path}: cannot be opened: {error.strerror}") from None


def check_repo(repo: str) -> None:
    """Refuse what is no Hub id of the form `org/name`, by the Hub's own rules for both."""
    if not HUB_ID.fullmatch(repo):
        raise AdaptError(f"{repo}: is no Hub id of the form org/name")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise AdaptError(f"{repo}: is no Hub id: {error}") from None


def check_token(origin: str) -> None:
    """Refuse a token that no HTTP header can carry; the client would fail over it."""
    token = get_token()
    if token is not None and not (token.isascii() and token.isprintable()):
        raise AdaptError(f"{origin}: the Hub token (HF_TOKEN) holds characters that no token has; copy it anew")


def check_login(repo: str) -> None:
    """Refuse, before any work, a push that cannot succeed: no network allowed, no token, or one that the Hub does not know."""
    check_repo(repo)
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise AdaptError(f"{repo}: HF_HUB_OFFLINE is set, so nothing can be pushed")
    if get_token() is None:
        raise AdaptError(f"{repo}: no Hub token; set HF_TOKEN or log in with `hf auth login`")
    check_token(repo)
    try:
        HfApi().whoami()
    except FAILURES as error:
        answered = getattr(error, "response", None) is not None
        what = "the Hub does not accept the token" if answered else "the Hub cannot be reached"
        raise AdaptError(f"{repo}: {what}: {hub_message(error)}") from None


def _commit(api: HfApi, upload: Upload, revision: str | None, create_pr: bool) -> Any:
    """One commit. Tried again where a second try may go better, but not for a pull request: that would open a second one."""
    for attempt in range(1, _ATTEMPTS + 1):
        # The client marks operations as used, so every attempt gets fresh ones; files that are there already are not sent again.
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in upload.files.items()]
        try:
            return api.create_commit(
                upload.repo, operations, commit_message="Upload by adapt-convert", revision=revision, create_pr=create_pr
            )
        except FAILURES as error:
            response = getattr(error, "response", None)
            final = response is not None and response.status_code < 500 and response.status_code not in _CONFLICTS
            if final or create_pr or attempt == _ATTEMPTS:
                raise
            time.sleep(attempt)
    raise AssertionError("unreachable")


def hub_message(error: Exception) -> str:
    """The first line of the client's error, without the token, should a server or proxy have sent it back."""
    token = get_token()
    text = str(error).replace(token, "***") if token else str(error)
    # The client puts what the server said into a paragraph of its own, after a line with the status and a request id.
    said = [line.strip() for line in text.strip().split("\n") if line.strip()] or [type(error).__name__]
    return " ".join(said)[:300]
