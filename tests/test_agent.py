"""Agent bundles: what is saved is what is loaded, and nothing in them is ever executed."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from addiff_env import agent as module
from addiff_env.agent import CONFIG, WEIGHTS, Agent, PolicyNet

PARTS = {"clip_image": 6, "clip_text": 6, "timestep": 4, "quality": 8}
WIDTH = sum(PARTS.values())


def make_agent(seed: int = 0) -> Agent:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        policy = PolicyNet(PARTS, hidden=16)
        std = torch.rand(WIDTH) + 0.1
        std[3] = 0  # a slot that never varies
        policy.norm.set_statistics(torch.randn(WIDTH), std)
    env = {"id": "AdDiffusion-Tiny-v0", "kwargs": {"max_nfe": 30}}
    return Agent(policy, {"env": env, "observation": PARTS, "hidden": 16, "reward": {}, "training": {"seed": seed}})


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    make_agent().save(tmp_path / "agent")
    return tmp_path / "agent"


@pytest.fixture
def obs(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=(32, WIDTH)).astype(np.float32)


def test_round_trip(bundle: Path, obs: np.ndarray) -> None:
    saved, loaded = make_agent(), Agent.load(bundle)
    np.testing.assert_array_equal(loaded.logits(obs), saved.logits(obs))
    np.testing.assert_array_equal(loaded.act(obs), saved.logits(obs).argmax(1))
    np.testing.assert_array_equal(loaded.logits(torch.as_tensor(obs)), loaded.logits(obs))
    assert loaded.config == saved.config and loaded.fingerprint == saved.fingerprint
    assert loaded.fingerprint != make_agent(1).fingerprint
    assert sorted(path.name for path in bundle.iterdir()) == [CONFIG, WEIGHTS]
    assert json.loads((bundle / CONFIG).read_text())["format_version"] == module.FORMAT_VERSION
    assert loaded.flops == 2 * (WIDTH * 16 + 16 * 16 + 16 * 3)


def test_actions(obs: np.ndarray, rng: np.random.Generator) -> None:
    agent = make_agent()
    actions = agent.act(obs)
    assert actions.shape == (32,) and actions.dtype == np.int64
    for allowed in range(3):
        mask = np.zeros((32, 3), bool)
        mask[:, allowed] = True
        assert (agent.act(obs, mask) == allowed).all()
        assert (agent.act(obs, mask, deterministic=False, rng=rng) == allowed).all()
    with pytest.raises(ValueError, match="rng"):
        agent.act(obs, deterministic=False)


def test_sampling_follows_the_probabilities(obs: np.ndarray, rng: np.random.Generator) -> None:
    agent, row = make_agent(), np.repeat(obs[:1], 20_000, axis=0)
    expected = torch.as_tensor(agent.logits(obs[:1])).softmax(1)[0].numpy()
    drawn = agent.act(row, deterministic=False, rng=rng)
    np.testing.assert_allclose(np.bincount(drawn, minlength=3) / len(drawn), expected, atol=0.02)


def test_statistics_standardise_the_observation(rng: np.random.Generator) -> None:
    net = PolicyNet(PARTS)
    seen = torch.as_tensor(rng.normal(3, 5, size=(5000, WIDTH)), dtype=torch.float32)
    seen[:, 2] = 7  # never varies: left out
    net.norm.set_statistics(seen.mean(0), seen.std(0))
    out = net.norm(seen)
    assert (out[:, 2] == 0).all()
    start = 0
    lengths = []
    for width in PARTS.values():
        lengths.append(out[:, start : start + width].square().sum(1).mean().sqrt().item())
        start += width
    assert lengths[1:] == pytest.approx([module.PART_NORM] * 3, rel=0.02)  # the first part has the dead slot
    assert torch.isfinite(net.norm(torch.full((1, WIDTH), 1e30))).all()


def test_an_interrupted_save_keeps_the_old_bundle(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(module, "save_file", fail)
    with pytest.raises(OSError, match="no space"):
        make_agent(1).save(bundle)
    assert Agent.load(bundle).fingerprint == make_agent(0).fingerprint


# ------------------------------------------------------------------ damaged bundles


@pytest.mark.parametrize("shape", [(4, WIDTH - 1), (4, WIDTH + 1), (WIDTH,), (2, 2, WIDTH)])
def test_wrong_observations_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"sees {WIDTH} numbers.*clip_image") as error:
        make_agent().act(np.zeros(shape, np.float32))
    assert str(shape) in str(error.value)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_missing_files_are_named(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    with pytest.raises(FileNotFoundError, match=name) as error:
        Agent.load(bundle)
    assert str(bundle) in str(error.value)


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Agent.load(tmp_path / "nowhere")


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_other_format_versions_are_refused(bundle: Path, version: Any) -> None:
    config = json.loads((bundle / CONFIG).read_text()) | {"format_version": version}
    (bundle / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match="format version") as error:
        Agent.load(bundle)
    assert repr(version) in str(error.value) and str(bundle) in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", '{"format_version": 1}', "\x80\x04"])
def test_bad_descriptions_are_refused(bundle: Path, text: str) -> None:
    (bundle / CONFIG).write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=CONFIG):
        Agent.load(bundle)


@pytest.mark.parametrize("keep", [0, 7, 100, 0.5, -1])
def test_truncated_weights_are_refused(bundle: Path, keep: float) -> None:
    data = (bundle / WEIGHTS).read_bytes()
    size = keep if isinstance(keep, int) else int(keep * len(data))
    (bundle / WEIGHTS).write_bytes(data[:size])
    with pytest.raises(ValueError, match=WEIGHTS):
        Agent.load(bundle)


def test_weights_of_another_shape_are_refused(bundle: Path) -> None:
    config = json.loads((bundle / CONFIG).read_text()) | {"hidden": 32}
    (bundle / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match="does not fit"):
        Agent.load(bundle)


# ------------------------------------------------------------------ nothing is executed


class Canary:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("torch_zip", [False, True])
def test_pickles_are_never_opened(bundle: Path, tmp_path: Path, torch_zip: bool) -> None:
    sung = tmp_path / "sung"
    pickle.loads(pickle.dumps(Canary(sung)))
    assert sung.exists()  # it does sing
    sung.unlink()
    evil = bundle / "agent.pkl"
    if torch_zip:
        torch.save({"state": Canary(sung)}, evil)
    else:
        evil.write_bytes(pickle.dumps(Canary(sung)))
    Agent.load(bundle)  # a stray pickle is left alone
    (bundle / WEIGHTS).write_bytes(evil.read_bytes())
    with pytest.raises(ValueError, match=WEIGHTS):
        Agent.load(bundle)
    (bundle / CONFIG).write_bytes(evil.read_bytes())
    with pytest.raises(ValueError, match=CONFIG):
        Agent.load(bundle)
    (bundle / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=WEIGHTS):
        Agent.load(bundle)
    assert not sung.exists()
