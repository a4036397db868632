"""Where a path of the settings leads: into the package, or from where the user stands. Loads nothing heavy."""

from __future__ import annotations

import os
import re
from pathlib import Path

PACKAGE_PREFIX = "addiff_env:"  # "addiff_env:tiny/weights/clip" is a folder inside the package, wherever one stands


def resolve_model(model: str | os.PathLike[str]) -> str:
    """Turn ``addiff_env:<path>`` into the path inside the package, and ``~`` into the home folder.

    Other ids and paths stay as they are. ``addiff_env:configs/...`` is the configuration, which lies beside the package
    in a checkout.

    Raises:
        FileNotFoundError: there is no such path in the package.
    """
    name = os.path.expanduser(os.fspath(model))
    if not name.startswith(PACKAGE_PREFIX):
        return name
    relative, package = Path(name.removeprefix(PACKAGE_PREFIX)), Path(__file__).resolve().parents[1]
    is_configuration = relative.parts[:1] == ("configs",) and not (package / "configs").exists()
    found = (package.parent if is_configuration else package) / relative
    if relative.is_absolute() or ".." in relative.parts or not found.exists():
        hint = "; retrain it with: addiff world train" if relative.parts[:2] == ("tiny", "weights") else ""
        raise FileNotFoundError(f"packaged {name!r} is missing ({found}){hint}")
    return str(found)


def configs_folder() -> Path:
    """The folder of the Hydra configuration: in a checkout beside the package, else inside it.

    Raises:
        FileNotFoundError: there is neither.
    """
    return Path(resolve_model(PACKAGE_PREFIX + "configs"))


def looked_at(path: str | os.PathLike[str]) -> str:
    """A path or Hub id for a message; of a relative path, also where it leads from here."""
    name = os.fspath(path)
    is_whole = os.path.isabs(name) or name.startswith(PACKAGE_PREFIX)
    return repr(name) if is_whole else f"{name!r} ({os.path.abspath(os.path.expanduser(name))})"


def expand_home(word: str) -> str:
    """A word of a command line with the home folder for ``~``, also behind its equals sign, where shells leave it."""
    return re.sub(r"^([^=\s]*=)?~(?=/|$)", lambda found: (found[1] or "") + os.path.expanduser("~"), word)
