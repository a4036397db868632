"""Picture files, with errors that name them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from addiff_env.storage.files import told_when_full


def save_picture(path: Path, picture: np.ndarray) -> None:
    """Write a picture uint8 (H, W, 3) or (H, W) to a file; its folder is made. Nothing is left where that fails.

    Raises:
        DiskFullError: there is no room.
    """
    try:
        with told_when_full(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def open_picture(path: Path) -> Image.Image:
    """A picture file, decoded.

    Raises:
        FileNotFoundError, PermissionError, IsADirectoryError: as Python's own, which name it.
        ValueError: it is no picture, cut off, or larger than is safe; with its name.
    """
    with path.open("rb") as file:
        try:
            picture = Image.open(file)
            picture.load()
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
            raise ValueError(f"{path} is no readable picture: {type(error).__name__}: {error}") from error
    return picture


def read_picture(path: Path, mode: str = "RGB") -> np.ndarray:
    """A picture file as uint8 (H, W, 3), or in another ``mode`` of PIL's; raises as `open_picture`."""
    return np.asarray(open_picture(path).convert(mode))
