"""The cache of fixed-step scores: right, resumable, refused when stale."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from safetensors.torch import load_file, save_file

from addiff_env import TINY
from addiff_env.env import baseline_cache
from addiff_env.env.baseline_cache import BaselineCache, compute_baselines, weights_fingerprint
from addiff_env.env.reward import RewardConfig, quality

PROMPTS = ["a red circle", "a blue square and a green star"]


@pytest.fixture(scope="module")
def env(small_kwargs: dict[str, Any]) -> Any:
    return gym.make_vec(
        "AdDiffusion-Tiny-v0", num_envs=1, autoreset_mode=AutoresetMode.DISABLED, **small_kwargs
    ).unwrapped


@pytest.fixture
def path(tmp_path: Path, env: Any) -> Path:
    compute_baselines(tmp_path / "cache" / "b.jsonl", env, 6, PROMPTS, [0, 1])
    return tmp_path / "cache" / "b.jsonl"


def test_scores_are_those_of_an_episode_that_only_continues(path: Path, env: Any) -> None:
    cache = BaselineCache.load(path, env)
    assert set(cache.scores) == {(prompt, seed) for prompt in PROMPTS for seed in (0, 1)}
    for (prompt, seed), (clip, reward) in cache.scores.items():
        _, info = env.reset(options={"prompt": [prompt], "seed": [seed]})
        ended = np.array([False])
        while not ended[0]:
            _, _, ended, _, info = env.step(np.array([0]))
        assert (clip, reward) == pytest.approx((info["clip_score"][0], info["reward_score"][0]), abs=1e-3)


def test_quality_follows_the_rewards_present_scales(path: Path, env: Any) -> None:
    cache = BaselineCache.load(path, env)
    clip, reward = cache.scores[PROMPTS[1], 1]
    plain = RewardConfig().for_scorer(0.0, 1.0)
    for config in (plain, replace(plain, clip_mean=0.6, reward_std=3.0)):
        expected = quality(np.array([clip]), np.array([reward]), config)
        assert cache.quality([PROMPTS[1]], [1], config) == pytest.approx(expected)
    assert cache.quality([], [], plain).shape == (0,)
    assert cache.seeds(PROMPTS[0]) == [0, 1]
    with pytest.raises(ValueError, match=r"'a red circle' with seed 7; known: \[0, 1\]"):
        cache.quality([PROMPTS[0]], [7], RewardConfig())
    with pytest.raises(ValueError, match="'a cat'"):
        cache.quality(["a cat"], [0], RewardConfig())


def test_an_interrupted_computation_goes_on(path: Path, env: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = path.read_text()
    lines = whole.splitlines(keepends=True)
    path.write_text("".join(lines[:3]) + lines[3][:25])
    asked = []
    real = baseline_cache.score_fixed_steps
    monkeypatch.setattr(baseline_cache, "score_fixed_steps", lambda *a: asked.extend(a[2]) or real(*a))
    compute_baselines(path, env, 6, PROMPTS, [0, 1])
    assert asked == [(PROMPTS[1], 0), (PROMPTS[1], 1)]
    again = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row.get("prompt") for row in again] == [json.loads(line).get("prompt") for line in lines]


def test_prompts_may_hold_any_separator_and_the_last_line_be_cut_anywhere(tmp_path: Path, env: Any) -> None:
    prompts = ["a\u2028red circle", "a\x85star", "a blue\u2028star"]
    whole = compute_baselines(tmp_path / "b.jsonl", env, 2, prompts, [0])
    content = (tmp_path / "b.jsonl").read_bytes()
    assert BaselineCache.load(tmp_path / "b.jsonl", env).scores == whole.scores
    (tmp_path / "b.jsonl").write_bytes(content[: content.rindex("\u2028".encode()) + 1])  # within a character
    assert len(BaselineCache.load(tmp_path / "b.jsonl", env).scores) == 2


def test_a_stale_cache_is_refused_and_the_values_named(path: Path, env: Any) -> None:
    lines = path.read_text().splitlines()
    header = json.loads(lines[0])
    header["configuration"] |= {"guidance_scale": 9.0, "scorer": "other"}
    path.write_text("\n".join([json.dumps(header), *lines[1:]]) + "\n")
    with pytest.raises(ValueError, match="stale") as error:
        BaselineCache.load(path, env)
    now = TINY["guidance_scale"]
    assert f"guidance_scale: cached 9.0, now {now}" in str(error.value) and "scorer: cached 'other'" in str(error.value)
    assert "height" not in str(error.value)
    with pytest.raises(ValueError, match="steps: cached 6, now 5"):
        header["configuration"] = baseline_cache.baseline_configuration(env, 6)
        path.write_text(json.dumps(header) + "\n")
        compute_baselines(path, env, 5, PROMPTS, [0])


def test_other_weights_at_the_same_path_make_the_cache_stale(
    tmp_path: Path, small_kwargs: dict[str, Any], small_model: Path
) -> None:
    shutil.copytree(small_model, tmp_path / "model")
    settings = small_kwargs | {"model": str(tmp_path / "model")}
    file = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    env: Any = gym.make_vec("AdDiffusion-Tiny-v0", num_envs=1, **settings).unwrapped
    compute_baselines(tmp_path / "b.jsonl", env, 2, PROMPTS[:1], [0])
    assert len(BaselineCache.load(tmp_path / "b.jsonl", env).scores) == 1
    save_file({name: value + 1e-3 for name, value in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(ValueError, match="stale.*model_weights: cached '[0-9a-f]{12}', now '[0-9a-f]{12}'"):
        BaselineCache.load(tmp_path / "b.jsonl", env)


def test_fingerprints_find_local_weights_in_a_setting(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "head.safetensors")
    (tmp_path / "config.json").write_text("{}")
    one = weights_fingerprint(f"aesthetic:{tmp_path / 'head.safetensors'},clip=someone/clip")
    assert one is not None and one == weights_fingerprint(f"open_clip:ViT-L-14@{tmp_path / 'head.safetensors'}")
    assert one == weights_fingerprint(str(tmp_path))
    both = weights_fingerprint(f"aesthetic:{tmp_path / 'head.safetensors'},clip={TINY['clip']}")
    assert both not in (None, one, weights_fingerprint(TINY["clip"]))
    save_file({"a": torch.ones(2)}, tmp_path / "head.safetensors")
    assert weights_fingerprint(str(tmp_path)) not in (None, one)
    assert [weights_fingerprint(name) for name in (None, "", "someone/model", "imagereward")] == [None] * 4


@pytest.mark.parametrize("text", ["", "{}\n", "[]\n", "{\n", '{"configuration": 3}\n'])
def test_other_files_are_refused(tmp_path: Path, env: Any, text: str) -> None:
    (tmp_path / "b.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"b\.jsonl"):
        BaselineCache.load(tmp_path / "b.jsonl", env)


def test_stochastic_solvers_have_no_baselines(path: Path, small_kwargs: dict[str, Any], tmp_path: Path) -> None:
    """Prompt and seed do not fix their pictures, and fixed steps are denoised without noise."""
    env: Any = gym.make_vec("AdDiffusion-Tiny-v0", num_envs=1, **small_kwargs, eta=0.7).unwrapped
    with pytest.raises(ValueError, match=r"deterministic.*eta 0\.7"):
        compute_baselines(tmp_path / "other.jsonl", env, 3, PROMPTS, [0])
    assert not (tmp_path / "other.jsonl").exists()
    with pytest.raises(ValueError, match=r"eta 0\.7"):
        BaselineCache.load(path, env)


@pytest.mark.parametrize(("where", "value"), [("picture", torch.nan), ("picture", torch.inf), ("score", torch.nan)])
def test_a_picture_that_is_not_finite_fails_alone(
    tmp_path: Path, env: Any, path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, where: str, value: float
) -> None:
    """The others of its batch are kept as they are without it; the next call tries it again."""
    decode, score = env.backbone.decode, type(env.perception.scorer).score

    def spoil(values: torch.Tensor) -> torch.Tensor:
        values[3] = value
        return values

    if where == "picture":
        monkeypatch.setattr(env.backbone, "decode", lambda latents: spoil(decode(latents)))
    else:
        monkeypatch.setattr(type(env.perception.scorer), "score", lambda self, *pair: spoil(score(self, *pair)))
    monkeypatch.setattr(baseline_cache.gym, "make_vec", lambda *_, **__: SimpleNamespace(unwrapped=env))
    env.prompts = PROMPTS
    made = tmp_path / "b.jsonl"
    assert baseline_cache.main([str(made), "--steps", "6", "--seeds", "2"]) == 3
    told = capsys.readouterr()
    assert f"failed: {PROMPTS[1]!r}, seed 1, 6 steps in float32" in told.err and "3 baselines" in told.out
    whole = BaselineCache.load(path, env).scores
    assert BaselineCache.load(made, env).scores == {key: whole[key] for key in whole if key != (PROMPTS[1], 1)}
    monkeypatch.undo()
    again = compute_baselines(made, env, 6, PROMPTS, [0, 1])
    assert not again.failed and again.scores.keys() == whole.keys()
    assert again.scores[PROMPTS[1], 1] == pytest.approx(whole[PROMPTS[1], 1], abs=1e-5)


def test_a_file_with_nan_is_refused(path: Path, env: Any) -> None:
    lines = path.read_text().splitlines()
    row = json.loads(lines[2]) | {"reward_score": float("nan")}
    path.write_text("\n".join([*lines[:2], json.dumps(row), *lines[3:]]) + "\n")
    with pytest.raises(ValueError, match=r"b\.jsonl:3: scores that are not finite.*a red circle"):
        BaselineCache.load(path, env)


def test_missing_prompts(path: Path, env: Any) -> None:
    cache = BaselineCache.load(path, env)
    assert cache.missing([*PROMPTS, "a cat", "a dog", "a cat"]) == ["a cat", "a dog"] and cache.missing(PROMPTS) == []


def test_a_missing_cache_names_the_command(tmp_path: Path, env: Any) -> None:
    with pytest.raises(FileNotFoundError, match="addiff baselines .*nowhere"):
        BaselineCache.load(tmp_path / "nowhere.jsonl", env)


@pytest.mark.parametrize("option", ["--limit", "--seeds"])
@pytest.mark.parametrize("number", ["0", "-3"])
def test_numbers_that_leave_nothing_are_shown(
    tmp_path: Path, option: str, number: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        baseline_cache.main([str(tmp_path / "b.jsonl"), option, number])
    assert f"{option} must be at least 1, got {number}" in capsys.readouterr().err


def test_the_command(tmp_path: Path, small_kwargs: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--kwargs", json.dumps(small_kwargs | {"prompts": PROMPTS}), "--steps", "3", "--seeds", "1"]
    baseline_cache.main([str(tmp_path / "b.jsonl"), *options])
    assert "2 baselines of 3 steps" in capsys.readouterr().out
    header = json.loads((tmp_path / "b.jsonl").read_text().splitlines()[0])
    assert header["key"] == baseline_cache.configuration_hash(header["configuration"])
