"""RLlib's side of the environment; the training itself needs Ray, which has an environment of its own."""

import importlib.util
import subprocess
import sys

import cloudpickle
import numpy as np
import pytest
from gymnasium.wrappers.vector import DictInfoToList

from addiff_env import rllib


def test_lanes_are_as_an_env_runner_takes_them(small_kwargs):
    """Infos split into one dictionary per lane, and an ended lane restarts in the next step."""
    env = DictInfoToList(rllib.make_lanes({"id": "AdDiffusion-Tiny-v0", "kwargs": small_kwargs, "num_envs": 2}))
    observations, infos = env.reset(seed=3)
    assert observations.shape[0] == len(infos) == env.num_envs == 2
    assert {"prompt", "nfe", "action_mask"} <= set(infos[0])
    _, _, ended, _, infos = env.step(np.array([1, 0]))
    assert ended.tolist() == [True, False] and infos[1]["nfe"] == 3
    _, reward, ended, _, infos = env.step(np.array([0, 0]))
    assert not ended.any() and reward[0] == 0 and infos[0]["nfe"] == 2  # warm-up of the new episode


def test_a_worker_needs_no_more_than_the_function(tmp_path):
    """``python -m addiff_env.rllib`` sends it by value to processes that have not imported the package."""
    cloudpickle.register_pickle_by_value(rllib)
    try:
        (tmp_path / "make_lanes").write_bytes(cloudpickle.dumps(rllib.make_lanes))
    finally:
        cloudpickle.unregister_pickle_by_value(rllib)
    code = (
        "import pickle, sys; make = pickle.load(open(sys.argv[1], 'rb')); assert 'addiff_env' not in sys.modules;"
        "make({'id': 'AdDiffusion-Tiny-v0', 'kwargs': {'vectorization_mode': 'nose'}})"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "make_lanes")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert "Invalid vectorization mode: 'nose'" in result.stderr  # so the id was found


def test_batch_sizes():
    settings = rllib.Settings(num_env_runners=3, num_envs_per_runner=4, steps_per_lane=5)
    assert settings.train_batch_size == 60
    assert rllib.Settings(num_env_runners=0, num_envs_per_runner=4, steps_per_lane=5).train_batch_size == 20


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray_the_message_says_what_to_install(tmp_path):
    with pytest.raises(ImportError, match="an environment of its own"):
        rllib.main([str(tmp_path)])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_env_runners_improve_the_return(tmp_path):
    """On the embedded world, as the issue's acceptance asks; two runners on one machine."""
    pytest.importorskip("ray.rllib", reason="pip install 'addiff-env[rllib]', in an environment of its own")
    settings = rllib.Settings(num_env_runners=2, num_envs_per_runner=16)
    returns = rllib.train(settings, tmp_path, iterations=20, checkpoint_every=10)
    assert np.mean(returns[-4:]) > np.mean(returns[:4])
    assert rllib.train(settings, tmp_path, iterations=21)  # goes on from the checkpoint with one more iteration
