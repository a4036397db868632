"""Which code made a row, and which model: release, commit, and a fingerprint of edits that were not committed."""

from __future__ import annotations

import hashlib
import subprocess
from functools import cache
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

import addiff_env
from addiff_env.storage.paths import PACKAGE_PREFIX

CODE = ("addiff_env", "configs", "evaluate.py")  # what can change a row; documentation and tests cannot


def code_version(root: Path | None = None) -> str:
    """``0.1.0``, in a checkout ``0.1.0+<commit>``, with uncommitted edits ``0.1.0+<commit>.dirty-<hash>``.

    The hash covers the edits' content (changed, deleted and new files that git does not ignore), so rows made before
    and after another edit do not pass as one measurement. A package installed elsewhere, even inside somebody else's
    repository, is named by its release alone.

    Args:
        root: the checkout; by default the one this package lies in.
    """
    root = root or Path(addiff_env.__file__).resolve().parent.parent
    if _git(root, "ls-files", "--error-unmatch", "addiff_env/__init__.py") is None:
        return addiff_env.__version__
    commit = _git(root, "rev-parse", "--short=10", "HEAD")
    if commit is None:
        return addiff_env.__version__
    version = f"{addiff_env.__version__}+{commit.decode().strip()}"
    edits = _edits(root)
    return f"{version}.dirty-{hashlib.sha256(edits).hexdigest()[:10]}" if edits else version


def _edits(root: Path) -> bytes:
    """Everything that stands between the commit and the files, as bytes; empty where nothing does."""
    paths = [name for name in CODE if (root / name).exists()]
    plain = ("--no-ext-diff", "--no-textconv", "--no-color", "--full-index")
    parts = [_git(root, "diff", *plain, "HEAD", "--", *CODE) or b""]
    new = _git(root, "ls-files", "-z", "--others", "--exclude-standard", "--", *paths) or b""
    for name in sorted(filter(None, new.split(b"\0"))):
        content = (root / name.decode("utf-8", "surrogateescape")).read_bytes()
        parts.append(name + b"\0" + hashlib.sha256(content).digest())
    return b"".join(parts)


def _git(root: Path, *arguments: str) -> bytes | None:
    """Output of a git command in ``root``; None where it fails or git is not installed."""
    try:
        result = subprocess.run(["git", *arguments], cwd=root, capture_output=True)
    except OSError:
        return None
    return result.stdout if result.returncode == 0 else None


@cache
def model_revision(model: str, revision: str | None) -> str:
    """Which version of a loaded model it is.

    ``packaged``, ``local`` for another folder, else the commit on the Hub: branches move, and so does none.
    What the Hub's cache does not know is called as it was asked for, or ``unknown``.
    """
    if model.startswith(PACKAGE_PREFIX):
        return revision or "packaged"
    if Path(model).exists():
        return revision or "local"
    cached = try_to_load_from_cache(model, "model_index.json", revision=revision)
    return Path(cached).parent.name if isinstance(cached, str) else revision or "unknown"
