"""Official packages in environments of their own, and the pictures and prompts they are asked about."""

import os
import subprocess
from pathlib import Path

import numpy as np
import torch
from PIL import Image

HERE = Path(__file__).resolve().parent
PROMPTS = ["a red circle left of a blue square", "Zwei Vögel, sehr groß!", "", "a painting of an ocean and a cat " * 12]


def built(name: str) -> Path:
    """The environment of ``name``, built if it is not there whole; ``ADDIFF_<NAME>_VENV`` says where it is kept."""
    default = HERE.parents[1] / "build" / f"{name}-venv"
    folder = Path(os.environ.get(f"ADDIFF_{name.upper()}_VENV", default))
    if not (folder / ".complete").is_file():
        subprocess.run(["bash", str(HERE / f"build_{name}_venv.sh"), str(folder)], check=True)
    return folder


def run(venv: Path, script: str, *arguments: Path) -> None:
    """Run a script of this folder by the environment's own Python."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [str(venv / "bin" / "python"), str(HERE / script), *map(str, arguments)]
    subprocess.run(command, check=True, env=environment)


def textured(seed: int, width: int, height: int) -> Image.Image:
    """Smooth colours with some grain."""
    rng = np.random.default_rng(seed)
    smooth = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    grain = rng.normal(0, 12, (height, width, 3))
    return Image.fromarray((np.asarray(smooth) + grain).clip(0, 255).round().astype(np.uint8))


def as_tensor(picture: Path | Image.Image) -> torch.Tensor:
    """A picture (1, 3, H, W) in [0, 1]."""
    image = Image.open(picture) if isinstance(picture, Path) else picture
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
