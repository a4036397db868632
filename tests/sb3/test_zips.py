"""SB3 zips: written for those who want them, opened only on demand."""

import io
import zipfile
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.save_util import data_to_json

from addiff_env.agent import Agent, PolicyNet
from addiff_env.sb3 import zips

PARTS = {"wide": 6, "narrow": 2}
CONFIG = {"env": {"id": "AdDiffusion-Tiny-v0", "kwargs": {}}}


class Blank(gym.Env):
    def __init__(self, width=8):
        self.observation_space = gym.spaces.Box(-1, 1, (width,))
        self.action_space = gym.spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, True, False, {}


class Sing:
    """A canary: unpickling it touches a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.fixture
def agent():
    return Agent(PolicyNet(PARTS, hidden=16), {**CONFIG, "observation": PARTS, "hidden": 16})


def test_a_zip_acts_as_the_agent_and_comes_back(agent, tmp_path):
    env = make_vec_env(Blank, n_envs=2)
    zips.export_zip(agent, env, tmp_path / "agent.zip")
    observations = np.random.default_rng(0).uniform(-1, 1, (40, 8)).astype(np.float32)
    loaded = PPO.load(tmp_path / "agent.zip", env=env, device="cpu")
    np.testing.assert_array_equal(loaded.predict(observations, deterministic=True)[0], agent.act(observations))
    again = zips.import_zip(tmp_path / "agent.zip", CONFIG, trust_pickle=True)
    assert again.fingerprint == agent.fingerprint and again.config["observation"] == PARTS


def test_other_observations_are_refused(agent, tmp_path):
    with pytest.raises(ValueError, match=r"sees 8 numbers, the environment makes \(9,\)"):
        zips.export_zip(agent, make_vec_env(Blank, env_kwargs={"width": 9}), tmp_path / "agent.zip")


def test_a_malicious_zip_is_opened_by_no_default_path(tmp_path):
    sung, path = tmp_path / "sung", tmp_path / "evil.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data", data_to_json({"policy_class": Sing(sung)}))
        archive.writestr("policy.pth", io.BytesIO(b"x").getvalue())
    with pytest.raises(ValueError, match="--trust-pickle"):
        zips.import_zip(path, CONFIG)
    with pytest.raises(ValueError, match="can run any code"):
        zips.main(["import", str(path), str(tmp_path / "out"), "--env", "AdDiffusion-Tiny-v0"])
    with pytest.raises(FileNotFoundError):
        Agent.load(path)
    assert not sung.exists() and not (tmp_path / "out").exists()


def test_another_policy_is_refused(tmp_path):
    PPO("MlpPolicy", make_vec_env(Blank), n_steps=2, batch_size=2, device="cpu").save(tmp_path / "foreign.zip")
    with pytest.raises(ValueError, match="ActorCriticPolicy.*DenoisePolicy"):
        zips.import_zip(tmp_path / "foreign.zip", CONFIG, trust_pickle=True)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        zips.import_zip(tmp_path / "nowhere.zip", CONFIG, trust_pickle=True)
    with pytest.raises(ValueError, match="'sac'"):
        zips.import_zip(tmp_path / "foreign.zip", CONFIG, trust_pickle=True, algorithm="sac")


def test_the_command_line_goes_both_ways(small_kwargs, tmp_path, capsys):
    env = zips.make_vec_env("AdDiffusion-Tiny-v0", 1, **small_kwargs)
    from addiff_env.sb3 import observation_parts

    parts = observation_parts(env.env)
    config = {"env": {"id": "AdDiffusion-Tiny-v0", "kwargs": small_kwargs}, "observation": parts, "hidden": 16}
    agent = Agent(PolicyNet(parts, hidden=16), config)
    agent.save(tmp_path / "agent")
    zips.main(["export", str(tmp_path / "agent"), str(tmp_path / "written")])  # as Stable-Baselines3 completes it
    written = Path(capsys.readouterr().out.rpartition(" -> ")[2].strip())
    assert written.is_file()
    options = ["--env", "AdDiffusion-Tiny-v0", "--trust-pickle"]
    zips.main(["import", str(written), str(tmp_path / "again"), *options])
    assert Agent.load(tmp_path / "again").fingerprint == agent.fingerprint
    assert agent.fingerprint in capsys.readouterr().out
