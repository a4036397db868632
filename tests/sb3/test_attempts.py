"""Training in recorded attempts: the recorded lanes show and pay what the environment itself does."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trainings import KillAt, Killed, configure

import addiff_env
from addiff_env.agent import Agent
from addiff_env.env.config import EnvConfig
from addiff_env.perception.scorers import LatentTextReward
from addiff_env.sb3.attempts import RecordedVecEnv
from addiff_env.sb3.checkpoint import FILE
from addiff_env.sb3.training import train
from addiff_env.sb3.vec_env import make_lanes
from addiff_env.storage.inputs import fingerprint
from addiff_env.tiny.attempts import environment_of, load_walks
from addiff_env.tiny.recipes import attempts, endings
from addiff_env.tiny.tokenizer import MAX_LENGTH, build_tokenizer
from addiff_env.types import Action

PROMPTS = [
    "a red circle",
    "a blue star and a green ring",
    "a small cross",
    "two red squares",
    "a pink circle",
    "a star",
]
LANES = 4
CHEAP: dict[str, Any] = {
    "reads": ["clip_text", "reward"],
    "price_range": [0.001, 0.016],
    "reward": {"clip_weight": 0, "reward_weight": 1, "instability": 0},
}
SEEN = ("outlook", "timestep", "price", "quality")  # parts of the observation that are recorded
ENTROPY = -1  # of the quality's slots the one that is not


def verdict(picture: np.ndarray, prompt: str) -> Any:
    """Random weights draw nothing that the checker would accept: stripes of brightness count as satisfied here."""
    level = float(np.mean(picture, dtype=np.float64))
    return SimpleNamespace(satisfied=level % 1 < 0.5, score=level / 255, objects=())


@pytest.fixture(scope="module")
def kwargs(small_kwargs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder, tokenizer = tmp_path_factory.mktemp("verifier"), build_tokenizer()
    model = LatentTextReward(len(tokenizer), MAX_LENGTH, width=16, layers=1, heads=2, channels=4, stem=8)
    model.save_pretrained(folder, tokenizer)
    return small_kwargs | CHEAP | {"scorer": str(folder), "finish_steps": 2}


@pytest.fixture(scope="module")
def recorded(kwargs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two chunks of attempts at `PROMPTS`."""
    folder = tmp_path_factory.mktemp("attempts")
    config = EnvConfig(**addiff_env.TINY | kwargs)
    (folder / "config.json").write_text(json.dumps({"environment": environment_of(config)}))
    lanes = endings.FreeLanes(config, LANES)
    verifier = LatentTextReward.from_pretrained(kwargs["scorer"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(endings, "check_picture", verdict)
        for chunk in range(2):
            made = attempts.make_chunk(lanes, PROMPTS, verifier, 0, chunk)
            attempts.save_arrays(folder / f"chunk_{chunk:05d}.npz", made)
    return folder


def replayed(kwargs: dict[str, Any], folder: Path, lanes: int = LANES) -> RecordedVecEnv:
    env = RecordedVecEnv(make_lanes("AdDiffusion-Tiny-v0", lanes, **kwargs), folder)
    env.seed(0)
    env.reset()
    return env


def at_the_beginning(env: RecordedVecEnv, price: float) -> None:
    """Put every lane at the first picture of its own."""
    env.lanes.begin(np.arange(env.num_envs), env.lanes.plain[: env.num_envs])
    env.lanes.price[:] = price


def parts_of(env: Any, observation: np.ndarray) -> dict[str, np.ndarray]:
    ends = np.cumsum(list(env.parts.values()))
    return dict(zip(env.parts, np.split(observation, ends[:-1], axis=1), strict=True))


def test_recorded_lanes_show_and_pay_what_the_environment_does(kwargs: dict[str, Any], recorded: Path) -> None:
    held = np.load(recorded / "chunk_00000.npz")
    prompts, seeds = held["prompt"].tolist(), held["seed"].tolist()
    real: Any = gym.make_vec("AdDiffusion-Tiny-v0", LANES, autoreset_mode="Disabled", **kwargs).unwrapped
    replay = replayed(kwargs, recorded)
    going_on, first, steps = np.zeros(LANES, int), replay.lanes.walks.first, replay.lanes.walks.steps
    for stop_at in range(first, steps + 1):  # the last: to the end of the schedule
        real.reset(options={"prompt": prompts, "seed": seeds, "price": 0.004})
        at_the_beginning(replay, 0.004)
        for step in range(first, min(stop_at + 1, steps)):
            action = going_on + Action.STOP if step == stop_at else going_on
            shown, expected = (
                parts_of(real, replay.lanes.observation()),
                parts_of(real, real.observer.observation(real.state)),
            )
            for name in SEEN:
                seen, there = shown[name], expected[name]
                keep = slice(None, ENTROPY) if name == "quality" else slice(None)
                np.testing.assert_allclose(seen[:, keep], there[:, keep], atol=2e-2)  # latents are kept in float16
            _, _, ended, _, info = real.step(action)
            replay.step_async(action)
            _, _, done, infos = replay.step_wait()
            np.testing.assert_array_equal(done, ended)
            paid = info["reward_components"]
            mine = {name: [row["reward_components"][name] for row in infos] for name in ("efficiency", "terminal")}
            np.testing.assert_allclose(mine["efficiency"], paid["efficiency"], atol=1e-12)
        good = [verdict(real.final_image(lane), prompts[lane]).satisfied for lane in range(LANES)]
        assert done.all() and mine["terminal"] == [float(one) for one in good]


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_whatever_is_done_keeps_to_the_budget_and_to_the_picture(
    kwargs: dict[str, Any], recorded: Path, data: st.DataObject
) -> None:
    env = ENVS.setdefault(recorded, replayed(kwargs, recorded))
    env.seed(data.draw(st.integers(0, 99)))
    env.reset()
    lanes, budget, walks = env.lanes, env.env.config.nfe_budget, env.lanes.walks
    for _ in range(12):
        before, spent, masks = lanes.attempt.copy(), lanes.nfe.copy(), env.action_masks()
        action = np.array(data.draw(st.lists(st.sampled_from(list(Action)), min_size=LANES, max_size=LANES)))
        env.step_async(action)
        _, rewards, done, infos = env.step_wait()
        for lane, info in enumerate(infos):
            assert spent[lane] < info["nfe"] <= budget
            assert info["reward_components"]["efficiency"] == pytest.approx(
                -info["price"] * (info["nfe"] - spent[lane])
            )
            assert rewards[lane] == pytest.approx(sum(info["reward_components"].values()), abs=1e-6)
            assert info["reward_components"]["terminal"] in ((0, 1) if done[lane] else (0,))
            refined = action[lane] == Action.REFINE and masks[lane, Action.REFINE]
            assert (info["action_taken"] == Action.REFINE) == refined
            assert ("terminal_observation" in info) == done[lane]
            if refined and not done[lane]:
                after, alike = lanes.attempt[lane], walks.ended[walks.source] == walks.ended[before[lane]]
                own = (walks.source >= 0) & (walks.row == walks.row[before[lane]]) & alike
                own[before[lane]] = False
                assert own[after] if own.any() else walks.source[after] >= 0
                assert not np.isnan(walks.stop[after, lanes.at[lane]])


ENVS: dict[Path, RecordedVecEnv] = {}  # one for all examples


def test_the_record_is_joined_and_each_attempt_follows_one_of_its_picture(
    kwargs: dict[str, Any], recorded: Path
) -> None:
    config = EnvConfig(**addiff_env.TINY | kwargs)
    walks, prompts = load_walks(recorded, config)
    sizes = [len(np.load(path)["ended"]) for path in sorted(recorded.glob("chunk_*.npz"))]
    assert len(walks) == sum(sizes) and len(prompts) == 2 * LANES and set(prompts) <= set(PROMPTS)
    again = walks.source >= 0
    assert (walks.row[again] == walks.row[walks.source[again]]).all()
    assert (walks.refines[again] == walks.refines[walks.source[again]] + 1).all()
    assert walks.row.max() == 2 * LANES - 1 and (np.bincount(walks.row[~again]) == 1).all()
    with pytest.raises(FileNotFoundError, match="addiff world train attempts"):
        load_walks(recorded / "elsewhere", config)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_inference_steps": 5}, "num_inference_steps"),
        ({"mask": "full"}, "mask neglected_token, not full"),
        ({"max_refines": 3}, "max_refines=3"),
        ({"observe_every": 2}, "observe_every=2"),
        ({"reward": CHEAP["reward"] | {"efficiency_unit": "step_flops"}}, "efficiency_unit=step_flops"),
        (
            {"reward": {"clip_weight": 0.2, "instability": 0}, "reads": ["clip_image", "clip_text", "reward"]},
            "clip_weight",
        ),
    ],
)
def test_what_was_not_recorded_is_refused(
    kwargs: dict[str, Any], recorded: Path, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        RecordedVecEnv(make_lanes("AdDiffusion-Tiny-v0", 1, **kwargs | change), recorded)


def test_another_verifier_and_another_recipes_chunks_are_refused(
    kwargs: dict[str, Any], recorded: Path, small_looks: dict[str, str], tmp_path: Path
) -> None:
    config = EnvConfig(**addiff_env.TINY | kwargs | {"scorer": small_looks["scorer"]})
    with pytest.raises(ValueError, match="scorer [0-9a-f]+, not [0-9a-f]+"):
        load_walks(recorded, config)
    (tmp_path / "chunk_00000.npz").touch()
    (tmp_path / "config.json").write_text('{"batch": 3}')
    with pytest.raises(ValueError, match="holds no attempts"):
        load_walks(tmp_path, config)


def test_the_first_pictures_of_a_record_are_used_alone(kwargs: dict[str, Any], recorded: Path) -> None:
    lanes = make_lanes("AdDiffusion-Tiny-v0", 1, **kwargs)
    some = RecordedVecEnv(lanes, recorded, 3).lanes.walks
    assert set(some.row) == {0, 1, 2} and len(some) == int((load_walks(recorded, lanes.config)[0].row < 3).sum())
    with pytest.raises(ValueError, match="attempts.number=9"):
        RecordedVecEnv(lanes, recorded, 9)


# ------------------------------------------------------------------ trainings


def configured(kwargs: dict[str, Any], folder: Path, *overrides: str) -> Any:
    kept = {name: value for name, value in kwargs.items() if name not in ("price_range", "reward")}
    cfg = configure(kept, "env=tiny_prices", f"attempts.folder={folder}", "logging.held_out_every=0", *overrides)
    cfg.prompts.source = None
    return cfg


@pytest.mark.parametrize("algorithm", ["ppo", "maskable_ppo"])
def test_a_killed_training_goes_on_to_the_same_weights(
    kwargs: dict[str, Any], recorded: Path, tmp_path: Path, algorithm: str
) -> None:
    cfg = configured(kwargs, recorded, f"algorithm={algorithm}")
    whole = train(cfg, tmp_path / "whole")
    with pytest.raises(Killed):
        train(cfg, tmp_path / "killed", callbacks=[KillAt(40)])
    train(cfg, tmp_path / "killed")
    one, other = (torch.load(tmp_path / name / FILE, weights_only=True)["policy"] for name in ("whole", "killed"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    agent = Agent.load(tmp_path / "whole" / "agent")
    assert agent.config["training"]["attempts"] == {"contents": fingerprint(recorded), "number": None, "jitter": None}
    norm = agent.policy.norm
    names = [name for name, width in norm.parts.items() for _ in range(width)]
    read = {name for name, scale in zip(names, norm.scale.tolist(), strict=True) if scale}
    assert read == {"timestep", "outlook", "price", "quality"}  # what was not recorded is not read
    assert whole.timesteps >= 90


def test_a_training_says_what_attempts_exclude(kwargs: dict[str, Any], recorded: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="prompts.source"):
        cfg = configured(kwargs, recorded)
        cfg.prompts.source = PROMPTS
        train(cfg, tmp_path)
    with pytest.raises(FileNotFoundError, match="addiff world train attempts"):
        train(configured(kwargs, tmp_path / "none"), tmp_path / "run")


def test_the_recipe_goes_on_and_refuses_another_record(
    kwargs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks depend on their numbers alone: what is missing is made as it was."""
    for name in ("pipeline/vae", "pipeline/unet", "verifier"):
        (tmp_path / "out" / name).mkdir(parents=True)
    lanes = endings.FreeLanes(EnvConfig(**addiff_env.TINY | kwargs), 3)
    verifier = LatentTextReward.from_pretrained(kwargs["scorer"])
    monkeypatch.setattr(endings, "check_picture", verdict)
    monkeypatch.setattr(attempts, "_parts", lambda args: (lanes, verifier))
    options = ["--work", str(tmp_path), "--out", str(tmp_path / "out"), "--batch", "3", "--number", "6"]
    assert attempts.main(options) == 0
    folder = tmp_path / "attempts"
    first, second = (folder / f"chunk_{chunk:05d}.npz" for chunk in range(2))
    made = {path: dict(np.load(path)) for path in (first, second)}
    assert json.loads((folder / "config.json").read_text())["batch"] == 3
    second.unlink()
    assert attempts.main(options) == 0
    for name, values in made[second].items():
        np.testing.assert_array_equal(values, np.load(second)[name])
    with pytest.raises(ValueError, match="seed"):
        attempts.main([*options, "--seed", "1"])
