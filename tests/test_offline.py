"""Recorded trajectories: whole, paired with their prompts, and the same after a round trip through Minari."""

import sys

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from addiff_env.offline import check_free, collect, main, random_policy, read_episodes, write_dataset

ID = "AdDiffusion-Tiny-v0"
PAIRS = [("a red circle", 1), ("a blue star", 2), ("a green square and a red star", 3)]


@pytest.fixture(scope="module")
def env(small_kwargs):
    return gym.make_vec(ID, num_envs=2, autoreset_mode=AutoresetMode.DISABLED, **small_kwargs).unwrapped


@pytest.fixture(scope="module")
def episodes(env):
    return list(collect(env, random_policy(np.random.default_rng(0)), PAIRS))


def test_episodes_are_whole_and_can_be_replayed(env, episodes):
    assert [(episode.prompt, episode.seed) for episode in episodes] == PAIRS
    for episode in episodes:
        observation, info = env.reset(options={"prompt": [episode.prompt] * 2, "seed": [episode.seed] * 2})
        np.testing.assert_allclose(observation[0], episode.observations[0], atol=1e-4)
        for t, action in enumerate(episode.actions):
            assert info["action_mask"][0].tolist() == episode.masks[t].tolist() and episode.masks[t][action]
            observation, reward, ended, _, info = env.step(np.array([action, action]))
            np.testing.assert_allclose(observation[0], episode.observations[t + 1], atol=1e-3)
            assert reward[0] == pytest.approx(episode.rewards[t], abs=1e-3)
            assert info["nfe"][0] == episode.nfe[t + 1]
            assert ended[0] == (t == len(episode.actions) - 1)


def test_what_fails_in_its_warm_up_is_left_out(env, monkeypatch):
    """It has no decisions, and must not cost the others theirs."""
    reset = env.reset

    def failing(**options):
        result = reset(**options)
        env.done[:] |= np.array([seed == 2 for seed in options["options"]["seed"]])
        return result

    monkeypatch.setattr(env, "reset", failing)
    with pytest.warns(UserWarning, match="'a blue star' with seed 2 was not finite in its warm-up") as warned:
        made = list(collect(env, random_policy(np.random.default_rng(0)), PAIRS))
    assert [(episode.prompt, episode.seed) for episode in made] == [PAIRS[0], PAIRS[2]] and len(warned) == 1
    for episode in made:
        assert len(episode.actions) == len(episode.observations) - 1 == len(episode.masks) - 1 > 0


def test_other_autoreset_modes_are_refused(small_kwargs):
    other = gym.make_vec(ID, num_envs=1, autoreset_mode=AutoresetMode.SAME_STEP, **small_kwargs).unwrapped
    with pytest.raises(ValueError, match="SAME_STEP"):
        list(collect(other, random_policy(np.random.default_rng(0)), PAIRS))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_minari_gives_back_what_was_recorded(env, episodes, tmp_path, monkeypatch):
    minari = pytest.importorskip("minari", reason="pip install 'addiff-env[offline]'")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    write_dataset("addiff/test-v0", env, episodes, "random")
    again = list(read_episodes("addiff/test-v0"))
    assert len(again) == len(episodes)
    for ours, theirs in zip(again, episodes, strict=True):
        assert (ours.prompt, ours.seed, ours.actions, ours.nfe) == (
            theirs.prompt,
            theirs.seed,
            theirs.actions,
            theirs.nfe,
        )
        np.testing.assert_array_equal(ours.observations, theirs.observations)
        np.testing.assert_array_equal(ours.masks, theirs.masks)
        assert ours.rewards == pytest.approx(theirs.rewards)
    recovered = minari.load_dataset("addiff/test-v0").recover_environment().unwrapped
    assert recovered.config.model == env.config.model and recovered.config.max_nfe == env.config.max_nfe
    assert recovered.vector.reward_config == env.reward_config
    with pytest.raises(ValueError, match="no episodes"):
        write_dataset("addiff/none-v0", env, [], "random")


def test_nothing_is_recorded_for_a_name_that_is_taken(tmp_path, monkeypatch):
    pytest.importorskip("minari", reason="pip install 'addiff-env[offline]'")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setattr(gym, "make_vec", lambda *_, **__: pytest.fail("an environment was made"))
    (tmp_path / "addiff" / "taken-v0" / "data").mkdir(parents=True)
    with pytest.raises(ValueError, match="a dataset addiff/taken-v0 already"):
        main(["addiff/taken-v0"])
    with pytest.raises(ValueError, match="Malformed dataset ID: a b"):
        main(["a b"])
    check_free("addiff/taken-v1")
    assert [path.name for path in (tmp_path / "addiff").iterdir()] == ["taken-v0"]


def test_nothing_is_recorded_without_minari(monkeypatch):
    monkeypatch.setitem(sys.modules, "minari", None)  # as if it were not installed
    monkeypatch.setattr(gym, "make_vec", lambda *_, **__: pytest.fail("an environment was made"))
    with pytest.raises(ImportError, match="addiff-env.offline."):
        main(["addiff/test-v0"])
