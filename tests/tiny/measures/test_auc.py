"""AUC and the text-only probe against brute force; the whole measurement on a small model."""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import addiff_env
from addiff_env.diffusion.backbones import denoise, initial_noise, load_backbone
from addiff_env.loading.paths import resolve_model
from addiff_env.stats import auc, auc_interval
from addiff_env.tiny.measures import auc as command
from addiff_env.tiny.measures.auc import SHARES, look, measure, probe, table


def test_auc_is_the_share_of_ordered_pairs(rng: np.random.Generator) -> None:
    scores, labels = rng.integers(0, 6, 60).astype(float), rng.random(60) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[labels] for b in scores[~labels]]
    assert auc(scores, labels) == pytest.approx(np.mean(pairs))
    low, high = auc_interval(scores, labels)
    assert low < auc(scores, labels) < high
    assert np.isnan(auc(scores, np.ones(60, bool)))
    assert np.isnan(auc_interval(scores, np.zeros(60, bool))).all()  # and no warning of empty slices


def test_probe_finds_what_is_there_and_nothing_else(rng: np.random.Generator) -> None:
    features = rng.normal(size=(400, 8))
    told = features[:, 0] + 0.3 * rng.normal(size=400) > 0
    assert auc(probe(features, told.astype(float)), told) > 0.9
    noise = rng.random(400) < 0.5
    assert abs(auc(probe(features, noise.astype(float)), noise) - 0.5) < 0.1  # out of fold: no memory


# ------------------------------------------------------------------ the measurement


@pytest.fixture
def verdicts(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """Pictures that a stand-in of the checker saw; random weights draw nothing that the real one would accept."""
    seen: list[np.ndarray] = []

    def check_picture(picture: np.ndarray, prompt: str) -> Any:
        seen.append(picture)
        return SimpleNamespace(satisfied=len(seen) % 3 == 0)

    monkeypatch.setattr(command, "check_picture", check_picture)
    return seen


def brightness(pictures: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return pictures.mean((1, 2, 3))


@pytest.mark.parametrize("steps", [4, 5])
def test_scores_are_of_the_previews_at_each_share(steps: int, small_model: Path, verdicts: list[np.ndarray]) -> None:
    backbone = load_backbone(str(small_model), attention_stride=2)
    rows = [{"prompt": f"a {colour} star", "seed": seed} for seed, colour in enumerate(("red", "blue", "green"))]
    scores, labels = look(backbone, {"brightness": brightness}, rows, 3.0, steps)
    shape, clean = (4, 16, 16), []
    final = denoise(
        *(backbone, backbone.schedule(steps, shape), [row["prompt"] for row in rows]),
        *(initial_noise(backbone, shape, [0, 1, 2]), 3.0, lambda index, latents, now: clean.append(now.x0)),
    )
    at = {4: (0, 1, 1, 2), 5: (0, 1, 2, 3)}[steps]
    pictures = [backbone.decode(latents) for latents in (*(clean[index] for index in at), final)]
    np.testing.assert_allclose(scores["brightness"], [brightness(stage, []) for stage in pictures], atol=1e-6)
    assert labels.tolist() == [False, False, True] and np.ptp(scores["brightness"], axis=0).min() > 0
    for picture, seen in zip(pictures[-1], verdicts, strict=True):  # the finished picture is what is judged
        np.testing.assert_allclose(seen, picture.permute(1, 2, 0).clip(0, 1), atol=1e-6)


@pytest.fixture
def weights(tmp_path: Path, small_model: Path, tiny_kwargs: dict[str, Any]) -> Path:
    settings = addiff_env.TINY | tiny_kwargs
    for name, place in (("pipeline", str(small_model)), ("clip", settings["clip"]), ("reward", settings["scorer"])):
        (tmp_path / name).symlink_to(resolve_model(place))
    return tmp_path


def test_the_whole_measurement(
    weights: Path, verdicts: list[np.ndarray], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = measure(argparse.Namespace(split="dev", number=12, weights=weights, device="cpu", dtype="float32", steps=2))
    assert (found["split"], found["number"], found["satisfied"]) == ("dev", 12, pytest.approx(1 / 3))
    names = ("CLIP", "reward model", "reward model, no prompt", "prompt alone (CLIP text, ridge)")
    assert tuple(found["auc"]) == names and all(set(row) == {f"{s:g}" for s in SHARES} for row in found["auc"].values())
    for row in found["auc"].values():
        assert all(0 <= cell["low"] <= cell["auc"] <= cell["high"] <= 1 for cell in row.values())
    text = table(found)
    assert text.startswith("12 dev prompts, 33.3% satisfied") and all(f"\n{name} " in text for name in names)
    options = ["--number", "12", "--steps", "2", "--weights", str(weights), "--dtype", "float32", "--json"]
    assert command.main(options) == 1
    assert json.loads(capsys.readouterr().out) == found


@pytest.mark.parametrize(
    ("finished", "early", "words"), [(0.95, 0.9, []), (0.95, 0.8, ["60%"]), (float("nan"), 0.9, ["100%"])]
)
def test_the_table_says_which_bars_are_missed(finished: float, early: float, words: list[str]) -> None:
    cells = {f"{share:g}": {"auc": early, "low": 0.5, "high": 0.99} for share in SHARES}
    cells["1"] = cells["1"] | {"auc": finished}
    text = table({"number": 9, "split": "dev", "satisfied": 0.5, "auc": {"reward model": cells}})
    missed = [line for line in text.splitlines() if line.endswith("FAIL")]
    assert len(missed) == len(words) and all(word in line for word, line in zip(words, missed, strict=True))
    assert f"{early:.3f} (0.50-0.99)" in text and text.count("wanted") == 2
