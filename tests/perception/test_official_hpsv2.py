"""HPS v2.1 against the official package, in an environment of its own (built on first use; minutes)."""

import json
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
from official import PROMPTS, as_tensor, built, run, textured

from addiff_env.perception.scorers import HPSv2, load_scorer

CONFIG = {  # ViT-H-14's in small: the published one takes 4 GB
    "embed_dim": 64,
    "vision_cfg": {"image_size": 224, "layers": 4, "width": 160, "head_width": 80, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 4},
}
SIZES = {
    "same.png": (224, 224),
    "square.png": (512, 512),
    "landscape.png": (640, 480),
    "portrait.png": (301, 517),
    "small.png": (97, 64),
}


@pytest.mark.slow
def test_scores_equal_the_official_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed, (name, size) in enumerate(SIZES.items()):
        textured(seed, *size).save(tmp_path / name)
    pairs = [("landscape.png", prompt) for prompt in PROMPTS] + [(name, PROMPTS[0]) for name in SIZES]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    run(built("hpsv2"), "score_hpsv2.py", tmp_path)

    (tmp_path / "hps-of-a-test.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(tmp_path / "hps-of-a-test.json")
    monkeypatch.setattr("addiff_env.perception.scorers.clip_based.HPS_ARCHITECTURE", "hps-of-a-test")
    scorer = load_scorer(f"hps:{tmp_path / 'HPS_v2.1_compressed.pt'}")
    assert isinstance(scorer, HPSv2)
    ours = np.array([float(scorer.score(as_tensor(tmp_path / name), [prompt])) for name, prompt in pairs])
    theirs = np.array(json.loads((tmp_path / "scores.json").read_text()))
    print(np.stack([ours, theirs]), file=sys.stderr)
    assert np.ptp(theirs[: len(PROMPTS)]) > 0.02 and np.ptp(theirs[len(PROMPTS) :]) > 0.02  # the weights do see both
    assert np.abs(ours - theirs).max() < 1e-5
