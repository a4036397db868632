"""A verifier that reads latents: its file, its questions, and an environment that looks with it alone."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from waits import Waits

import addiff_env
from addiff_env.env import DiffusionDenoiseVectorEnv, costs
from addiff_env.env.config import EnvConfig
from addiff_env.perception.features import LOOK_PARTS
from addiff_env.perception.scorers import LatentTextReward, load_scorer, reads_latents
from addiff_env.tiny.measures import rules
from addiff_env.tiny.tokenizer import build_tokenizer
from addiff_env.types import Action

PROMPTS = ["a red circle", "a blue star left of a green ring", "a small cross"]
CHEAP = {"reads": ["clip_text", "reward"], "reward": {"clip_weight": 0, "instability": 0}}


@pytest.fixture(scope="module")
def folder(small_verifier: Path) -> Path:
    """A small verifier of `small_model`'s latents, with random weights whose answers differ."""
    return small_verifier


@pytest.fixture(scope="module")
def verifier(folder: Path) -> LatentTextReward:
    scorer = load_scorer(str(folder))
    assert isinstance(scorer, LatentTextReward)
    return scorer


def questions(number: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, timesteps and evaluations of ``number`` pictures."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(number, 4, 16, 16, generator=generator)
    return latents, torch.tensor([0, 500, 900])[:number], torch.tensor([[0, 0], [2, 5], [3, 9]])[:number]


def test_a_folder_opens_as_what_its_configuration_says(folder: Path, verifier: LatentTextReward) -> None:
    assert reads_latents(verifier) and not reads_latents(load_scorer(addiff_env.TINY["scorer"]))
    assert (verifier.config["scale"], verifier.config["bias"]) == (1.5, 0.25)
    latents, timesteps, evaluations = questions()
    raw = LatentTextReward.from_pretrained(folder)
    raw.config |= {"scale": 1.0, "bias": 0.0, "finished_bias": 0.0}
    scores = verifier.score_latents(latents, PROMPTS, timesteps, evaluations)
    plain = raw.score_latents(latents, PROMPTS, timesteps, evaluations)
    torch.testing.assert_close(scores, 1.5 * plain + torch.tensor([[-0.5], [0.25], [0.25]]))  # the first is finished
    assert scores.dtype == torch.float32 and scores.shape == (3, 2) and not scores.requires_grad


def test_answers_depend_on_picture_prompt_level_and_question_alone(verifier: LatentTextReward) -> None:
    latents, timesteps, evaluations = questions()
    together = verifier.score_latents(latents, PROMPTS, timesteps, evaluations)
    for lane in range(3):
        for asked in range(2):
            row = slice(lane, lane + 1)
            question = evaluations[row, asked : asked + 1]
            alone = verifier.score_latents(latents[row], [PROMPTS[lane]], timesteps[row], question)
            assert float(alone) == pytest.approx(float(together[lane, asked]), abs=1e-4)
    others = (
        (latents.flip(2), PROMPTS, timesteps, evaluations),
        (latents, PROMPTS[::-1], timesteps, evaluations),
        (latents, PROMPTS, timesteps + 50, evaluations),
        (latents, PROMPTS, timesteps, evaluations + 1),
    )
    for other in others:
        assert (verifier.score_latents(*other) - together).abs().max() > 1e-3
    beyond = verifier.config["max_evaluations"] + torch.tensor([[0, 7]] * 3)
    torch.testing.assert_close(*verifier.score_latents(latents, PROMPTS, timesteps, beyond).unbind(1))


def test_finished_pictures_are_looked_at_more_closely(folder: Path) -> None:
    verifier = LatentTextReward.from_pretrained(folder)
    latents, timesteps, evaluations = questions()
    before = verifier.score_latents(latents, PROMPTS, timesteps, evaluations)
    for parameter in (*verifier.finished_stem.parameters(), *verifier.finer.parameters(), verifier.spared.weight):
        torch.nn.init.normal_(parameter, std=0.3)
    after = verifier.score_latents(latents, PROMPTS, timesteps, evaluations)
    torch.testing.assert_close(after[1:], before[1:])  # the first is finished
    assert (after[0] - before[0]).abs().min() > 1e-3
    alone = verifier.score_latents(latents[:1], PROMPTS[:1], timesteps[:1], torch.tensor([[0, 3]]))
    assert float(alone[0, 0]) == pytest.approx(float(after[0, 0]), abs=1e-4) and alone[0, 0] != alone[0, 1]


def test_latents_are_read_in_their_own_precision(verifier: LatentTextReward) -> None:
    latents, timesteps, evaluations = questions()
    exact = verifier.score_latents(latents, PROMPTS, timesteps, evaluations)
    rounded = verifier.score_latents(latents.bfloat16(), PROMPTS, timesteps, evaluations)
    assert rounded.dtype == torch.float32 and 0 < (rounded - exact).abs().max() < 0.2
    again = verifier.score_latents(latents.double(), PROMPTS, timesteps, evaluations)
    torch.testing.assert_close(again, exact, atol=1e-4, rtol=1e-4)
    assert verifier.readout.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"latents": torch.zeros(3, 8, 16, 16)}, r"\(4, 16, 16\).*\(3, 8, 16, 16\)"),
        ({"latents": torch.zeros(0, 4, 16, 16)}, r"at least one, got \(0, 4, 16, 16\)"),
        ({"latents": torch.zeros(4, 16, 16)}, r"got \(4, 16, 16\)"),
        ({"prompts": PROMPTS[:2]}, "3 latents, 2 prompts"),
        ({"timesteps": torch.zeros(2)}, "2 timesteps"),
        ({"evaluations": torch.zeros(3, dtype=torch.long)}, r"evaluations of shape \(3,\)"),
        ({"evaluations": torch.zeros(1, 2, dtype=torch.long)}, r"evaluations of shape \(1, 2\)"),
    ],
)
def test_bad_questions_are_shown(change: dict[str, Any], words: str, verifier: LatentTextReward) -> None:
    latents, timesteps, evaluations = questions()
    asked = {"latents": latents, "prompts": PROMPTS, "timesteps": timesteps, "evaluations": evaluations} | change
    with pytest.raises(ValueError, match=words):
        verifier.score_latents(**asked)
    with pytest.raises(TypeError, match="NoneType"):
        verifier.score_latents(latents, ["a", None, "b"], timesteps, evaluations)  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("config.json", '{"model_type": "latent_text_reward", "vocab_size": 631, "chanels": 4}'),
        ("config.json", '{"model_type": "latent_text_reward", "vocab_size": "many"}'),
        ("config.json", "[]"),
        ("model.safetensors", "damaged"),
        ("tokenizer.json", "{}"),
    ],
)
def test_a_damaged_folder_is_named(file: str, text: str, folder: Path, tmp_path: Path) -> None:
    for item in folder.iterdir():
        (tmp_path / item.name).write_bytes(item.read_bytes())
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError) as error:
        load_scorer(str(tmp_path))
    assert str(tmp_path / file) in str(error.value)
    (tmp_path / file).unlink()
    with pytest.raises(FileNotFoundError, match=file):
        LatentTextReward.from_pretrained(tmp_path)


# ------------------------------------------------------------------ an environment that looks with it


def make(small_kwargs: dict[str, Any], num_envs: int = 3, **settings: Any) -> DiffusionDenoiseVectorEnv:
    settings = {"autoreset_mode": "Disabled", "finish_steps": 2} | settings
    env = gym.make_vec("AdDiffusion-Tiny-v0", num_envs, **{**small_kwargs, **settings}).unwrapped
    assert isinstance(env, DiffusionDenoiseVectorEnv)
    env.reset(options={"prompt": PROMPTS[:num_envs], "seed": list(range(num_envs))})
    return env


def refuse(*_: Any) -> Any:
    raise AssertionError("nobody needs this picture")


def test_a_cheap_look_decodes_nothing_and_asks_both_questions(
    small_kwargs: dict[str, Any], folder: Path, verifier: LatentTextReward, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = make(small_kwargs, scorer=str(folder), **CHEAP)
    decode = env.backbone.decode
    monkeypatch.setattr(env.backbone, "decode", refuse)
    monkeypatch.setattr(env.previewer, "decode", refuse)
    monkeypatch.setattr(env.perception.clip, "image_features", refuse)
    monkeypatch.setattr(env.perception.dino, "image_features", refuse)
    steps = env.config.num_inference_steps
    observation = env.step(np.full(3, Action.CONTINUE))[0]
    asked = torch.tensor([[2, steps - 3]] * 3)
    expected = verifier.score_latents(env.x0, PROMPTS, env.schedule.timesteps[torch.full((3,), 3)], asked)
    np.testing.assert_allclose(env.reward_score, expected[:, 0], atol=1e-5)
    np.testing.assert_allclose(observation[:, -9], expected[:, 1], atol=1e-5)  # the part before the quality slots
    assert env.single_observation_space.contains(observation[0])
    assert sum(env.perception.parts.values()) == observation.shape[1]
    monkeypatch.setattr(env.backbone, "decode", decode)
    stopped_at = int(env.step_index[0])
    actions = np.array([Action.STOP, Action.CONTINUE, Action.REFINE])
    env.step(actions)
    spared = torch.tensor([[steps - stopped_at - env.config.finish_steps]])
    assert spared > 0
    final = verifier.score_latents(env.latents[:1], PROMPTS[:1], torch.zeros(1, dtype=torch.long), spared)
    assert float(env.reward_score[0]) == pytest.approx(float(final[0, 0]), abs=1e-5)
    picture = (decode(env.latents[:1]) * 255).round().to(torch.uint8)[0].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(env.final_image(0), picture)


def test_a_cheap_look_waits_for_nothing_more_than_its_numbers(
    small_kwargs: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault flags, then what the look showed; the final picture of a lane that has ended."""
    env = make(small_kwargs, scorer=str(folder), obs_backend="torch", mask="grid", **CHEAP)
    for actions, ended in (([0, 0, 0], 0), ([0, 2, 1], 1)):
        with monkeypatch.context() as patch, Waits(patch) as waits:
            env.step(np.array(actions))
        assert waits.asked == [] and waits.sizes == [3, 4 * 3, *[3 * 64 * 64] * ended]


def test_the_outlook_is_a_part_of_its_own(small_kwargs: dict[str, Any], folder: Path) -> None:
    env = make(small_kwargs, scorer=str(folder), obs_mode="dict", obs_backend="torch", **CHEAP)
    observation = env.step(np.full(3, Action.CONTINUE))[0]
    assert observation["outlook"].shape == (3, 1) and env.single_observation_space["outlook"].shape == (1,)  # type: ignore[index]
    assert "outlook" not in make(small_kwargs, obs_mode="dict").single_observation_space.spaces  # type: ignore[attr-defined]


def test_costs_name_a_scorer_of_latents(small_kwargs: dict[str, Any], folder: Path) -> None:
    config = EnvConfig(**addiff_env.TINY | small_kwargs | {"scorer": str(folder)})
    rows = {row.component: row for row in costs.measure(config, lanes=2, repeats=1)}
    env = make(small_kwargs, scorer=str(folder), **CHEAP)
    assert rows["scorer, latents"].flops == pytest.approx(
        env.flops_per_call["scorer"], rel=0.1
    )  # the prompts' lengths differ


def test_a_cheap_look_is_paid_for_as_such(small_kwargs: dict[str, Any], folder: Path) -> None:
    cheap, full = make(small_kwargs, scorer=str(folder), **CHEAP), make(small_kwargs, scorer=str(folder))
    assert (
        cheap.flops_per_call["look"]
        == cheap.flops_per_call["scorer"]
        == full.flops_per_call["scorer"]
        < full.flops_per_call["look"]
    )
    before = cheap.net_flops.copy()
    cheap.step(np.full(3, Action.CONTINUE))
    step = cheap.passes_per_nfe * cheap.flops_per_call["denoiser"]
    np.testing.assert_allclose(cheap.net_flops - before, step + cheap.flops_per_call["look"])
    wordless = make(small_kwargs, scorer=str(folder), **CHEAP | {"reads": ["reward"]})
    assert cheap.flops_per_call["start"] - wordless.flops_per_call["start"] == cheap.perception.text_flops() > 0


@pytest.mark.parametrize("left_out", LOOK_PARTS[:3])
def test_what_is_not_read_is_blank_and_all_else_is_as_before(left_out: str, small_kwargs: dict[str, Any]) -> None:
    weights = {"clip_weight": 0, "instability": 0}
    reads = [part for part in LOOK_PARTS if part != left_out]
    full, less = make(small_kwargs, reward=weights), make(small_kwargs, reward=weights, reads=reads)
    for env in (full, less):
        env.step(np.full(3, Action.CONTINUE))
    kept, blank = full.step(np.full(3, Action.CONTINUE))[0], less.step(np.full(3, Action.CONTINUE))[0]
    clip = full.perception.clip.width
    slots = {"clip_image": [*range(clip), -8, -7], "clip_text": range(clip, 2 * clip), "dino": [-4]}[left_out]
    assert np.abs(kept[:, slots]).max() > 0
    np.testing.assert_array_equal(blank[:, slots], 1.0 if left_out == "dino" else 0.0)
    others = np.setdiff1d(np.arange(kept.shape[1]), np.arange(kept.shape[1])[list(slots)])
    np.testing.assert_array_equal(blank[:, others], kept[:, others])
    spared = full.net_flops - less.net_flops  # CLIP reads the prompt for its score of the picture, too
    assert (spared == 0).all() if left_out == "clip_text" else (spared > 0).all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"reads": ["clip_text", "dino", "reward"]}, "clip_weight 0.2: set it to 0"),
        ({"reads": ["clip_image", "reward"]}, "instability 0.02: set it to 0"),
        ({"reads": ["clip_image", "dino"]}, "reward_weight 0.8: set it to 0"),
        ({"reads": ["nose"]}, "nose"),
        ({"reads": "reward"}, "'reward'"),
    ],
)
def test_a_reward_is_not_paid_for_what_nobody_reads(
    settings: dict[str, Any], words: str, small_kwargs: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=words):
        make(small_kwargs, **settings)


def test_a_verifier_of_other_latents_is_refused(small_kwargs: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    LatentTextReward(**{k: v for k, v in config.items() if k != "model_type"} | {"channels": 8}).save_pretrained(
        tmp_path, build_tokenizer()
    )
    with pytest.raises(ValueError, match=r"\(8, 16, 16\), these are \(4, 16, 16\)"):
        make(small_kwargs, scorer=str(tmp_path))


def test_a_saved_environment_goes_on_as_it_would_have(small_kwargs: dict[str, Any], folder: Path) -> None:
    first, second = (make(small_kwargs, scorer=str(folder), **CHEAP) for _ in range(2))
    first.step(np.full(3, Action.CONTINUE))
    second.load_state_dict(first.state_dict())
    actions = np.array([Action.REFINE, Action.CONTINUE, Action.STOP])
    np.testing.assert_array_equal(first.step(actions)[0], second.step(actions)[0])


def test_finished_pictures_are_scored_through_the_autoencoder(
    small_kwargs: dict[str, Any], folder: Path, verifier: LatentTextReward
) -> None:
    env = make(small_kwargs, scorer=str(folder))
    pictures = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    finished = torch.zeros(2, 1, dtype=torch.long)
    latents = env.backbone.encode_pictures(pictures)
    expected = verifier.score_latents(latents, PROMPTS[:2], finished[:, 0], finished)[:, 0]
    look = env.perception.look(pictures, PROMPTS[:2])
    torch.testing.assert_close(look.reward_score, expected)
    torch.testing.assert_close(look.outlook, expected)
    torch.testing.assert_close(env.perception.scorer.score(pictures, PROMPTS[:2]), expected)
    with pytest.raises(ValueError, match="2 pictures but 1 prompts"):
        env.perception.scorer.score(pictures, PROMPTS[:1])


# ------------------------------------------------------------------ plain rules on it


def test_a_rule_by_hand() -> None:
    rule = rules.Rule(0.3, 0.6, 0.9)
    stop = np.array([0.95, 0.95, 0.5, 0.95, 0.95])
    go_on = np.array([0.2, 0.4, 0.4, 0.5, 0.7])
    share = np.array([0.4, 0.4, 0.4, 0.5, 0.5])
    expected = [Action.REFINE, Action.STOP, Action.CONTINUE, Action.REFINE, Action.STOP]
    assert rule.act(stop, go_on, share).tolist() == expected


def test_rules_are_played_to_the_end(
    small_kwargs: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules, "check_picture", lambda picture, prompt: SimpleNamespace(satisfied=prompt == PROMPTS[0]))
    small = {name: small_kwargs[name] for name in ("model", "dtype")}
    env = rules.make(4, 2, 1, 2, scorer=str(folder), **small)
    rows = [{"prompt": prompt, "seed": seed} for seed, prompt in enumerate(PROMPTS)]
    plain = rules.play(env, rules.Rule(0.0, 0.0), rows)
    assert plain.tolist() == [[1, 4], [0, 4], [0, 4]]
    stopping = rules.play(env, rules.Rule(0.0, 0.0, -1.0), rows)  # at once
    assert stopping[:, 1].tolist() == [3, 3, 3]
    refining = rules.play(env, rules.Rule(2.0, 2.0), rows)  # as often as it may
    # Two of warm-up; every refinement goes back to step 1 and on to step 3; one is left then.
    assert (refining[:, 1] == 2 + 2 * rules.MAX_REFINES + 1).all()
