"""Which code made a row, and which model: release, commit, and a fingerprint of edits that were not committed."""

from __future__ import annotations

import hashlib
import subprocess
from functools import cache
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

import addiff_env
from addiff_env.loading.paths import PACKAGE_PREFIX

CODE = ("addiff_env", "configs")  # what can change a row; documentation and tests cannot


def code_version(root: Path | None = None) -> str:
    """In a checkout ``0.1.0+<commit>``, with edits ``0.1.0+<commit>.dirty-<hash>``, installed ``0.1.0+files-<hash>``.

    The hash covers the edits' content (changed, deleted and new files that git does not ignore), so rows made before
    and after another edit do not pass as one measurement. Of a package installed elsewhere, even inside somebody else's
    repository, it covers every file, the configuration and the weights among them.

    Args:
        root: the checkout; by default the one this package lies in.
    """
    root = root or Path(addiff_env.__file__).resolve().parent.parent
    is_checkout = _git(root, "ls-files", "--error-unmatch", "addiff_env/__init__.py") is not None
    commit = _git(root, "rev-parse", "--short=10", "HEAD") if is_checkout else None
    if commit is None:
        return f"{addiff_env.__version__}+files-{_content(root)}"
    version = f"{addiff_env.__version__}+{commit.decode().strip()}"
    edits = _edits(root)
    return f"{version}.dirty-{hashlib.sha256(edits).hexdigest()[:10]}" if edits else version


@cache
def _content(root: Path) -> str:
    """Fingerprint of every file of the package, but for the interpreter's byte code.

    A package unpacked without git has its configuration beside it; beside an installed one lies what is not ours.
    """
    digest, is_installed = hashlib.sha256(), (root / "addiff_env" / "configs").exists()
    for path in sorted(path for name in CODE[: 1 if is_installed else None] for path in (root / name).rglob("*")):
        if path.is_file() and path.suffix != ".pyc":
            content = hashlib.sha256(path.read_bytes()).digest()
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + content)
    return digest.hexdigest()[:10]


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
    if Path(model).expanduser().exists():
        return revision or "local"
    cached = try_to_load_from_cache(model, "model_index.json", revision=revision)
    return Path(cached).parent.name if isinstance(cached, str) else revision or "unknown"
