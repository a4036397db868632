"""Agent bundles: what is saved is what is loaded, and nothing in them is ever executed."""

import importlib
import json
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

from addiff_env import agent as module
from addiff_env import offline
from addiff_env.agent import CONFIG, WEIGHTS, Agent, PolicyNet
from addiff_env.evaluation.acceptance import load_agent
from addiff_env.pipeline import make_agent_env
from addiff_env.sb3 import zips

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


def test_gains_lengthen_a_part(rng: np.random.Generator) -> None:
    seen = torch.as_tensor(rng.normal(3, 5, size=(5000, WIDTH)), dtype=torch.float32)
    plain, weighted = PolicyNet(PARTS).norm, PolicyNet(PARTS).norm
    plain.set_statistics(seen.mean(0), seen.std(0))
    weighted.set_statistics(seen.mean(0), seen.std(0), {"quality": 3.0})
    torch.testing.assert_close(weighted(seen)[:, :16], plain(seen)[:, :16])
    within = ((seen - seen.mean(0)).abs() < 3 * seen.std(0))[:, 16:]  # clipped beyond 10 / 3 deviations
    torch.testing.assert_close(weighted(seen)[:, 16:][within], 3 * plain(seen)[:, 16:][within])
    for wrong in ({"nose": 2.0}, {"quality": 0.0}, {"quality": float("nan")}):
        with pytest.raises(ValueError, match="gains"):
            plain.set_statistics(seen.mean(0), seen.std(0), wrong)


def test_an_interrupted_save_keeps_the_old_bundle(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(module.bundle, "save", fail)
    with pytest.raises(OSError, match="no space"):
        make_agent(1).save(bundle)
    assert Agent.load(bundle).fingerprint == make_agent(0).fingerprint


def test_whoever_may_read_the_settings_may_read_the_weights(bundle: Path) -> None:
    modes = {(bundle / name).stat().st_mode for name in (CONFIG, WEIGHTS)}
    assert len(modes) == 1


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
    with pytest.raises(ValueError, match=r"agent\.pkl.*can run code"):
        Agent.load(bundle)
    data = evil.read_bytes()
    evil.unlink()
    (bundle / WEIGHTS).write_bytes(data)
    with pytest.raises(ValueError, match=WEIGHTS):
        Agent.load(bundle)
    (bundle / CONFIG).write_bytes(data)
    with pytest.raises(ValueError, match=CONFIG):
        Agent.load(bundle)
    (bundle / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=WEIGHTS):
        Agent.load(bundle)
    assert not sung.exists()


@pytest.mark.parametrize("name", ["payload:AdDiffusion-Tiny-v0", "payload:Other-v0", "AdDiffusion-Tiny-v7", None, 3])
def test_a_bundle_does_not_choose_what_is_imported(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: Any
) -> None:
    """Gymnasium imports the module before the colon of an id; here one that creates a file lies on the path."""
    sung = tmp_path / "sung"
    (tmp_path / "payload.py").write_text(f"open({str(sung)!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "payload", raising=False)
    config = json.loads((bundle / CONFIG).read_text())
    (bundle / CONFIG).write_text(json.dumps(config | {"env": {"id": name, "kwargs": {}}}))
    for use in (make_agent_env, lambda *_: load_agent(bundle)):
        with pytest.raises(ValueError, match="acts on") as error:
            use(Agent.load(bundle), 1)
        assert repr(name) in str(error.value)
    with pytest.raises(ValueError, match="acts on"):
        zips.main(["export", str(bundle), str(tmp_path / "a.zip")])
    with pytest.raises(ValueError, match="acts on"):
        offline.main(["addiff/test-v0", "--agent", str(bundle), "--episodes", "1"])
    assert not sung.exists()
    importlib.import_module("payload")
    assert sung.exists()  # it does sing


def test_a_bundle_does_not_invent_settings(bundle: Path) -> None:
    config = json.loads((bundle / CONFIG).read_text())
    config["env"]["kwargs"] |= {"vectorization_mode": "async", "nose": 3}
    (bundle / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match="nose, vectorization_mode"):
        make_agent_env(Agent.load(bundle), 1)


def test_weights_that_are_not_the_described_ones_are_refused(bundle: Path, tmp_path: Path) -> None:
    """As a save that was interrupted between its two renamings leaves them."""
    make_agent(1).save(tmp_path / "other")
    (tmp_path / "other" / WEIGHTS).rename(bundle / WEIGHTS)
    with pytest.raises(ValueError, match=f"{make_agent(0).fingerprint}.*{make_agent(1).fingerprint}"):
        Agent.load(bundle)
    config = json.loads((bundle / CONFIG).read_text())
    del config["fingerprint"]  # bundles of before had none
    (bundle / CONFIG).write_text(json.dumps(config))
    assert Agent.load(bundle).fingerprint == make_agent(1).fingerprint


# ------------------------------------------------------------------ layouts


def test_another_layout_is_refused_part_by_part() -> None:
    agent = make_agent()
    agent.require_layout(dict(PARTS))
    with pytest.raises(ValueError, match="other observations") as error:
        agent.require_layout({**PARTS, "quality": 9, "dino": 4})
    assert "quality: 8 in the agent, 9 here" in str(error.value) and "dino: none in the agent, 4" in str(error.value)
    assert "timestep" not in str(error.value)
    with pytest.raises(ValueError, match="the order is"):
        agent.require_layout(dict(reversed(PARTS.items())))


@pytest.mark.parametrize(
    "change",
    [{"observation": {}}, {"observation": [1]}, {"observation": {"a": -1}}, {"hidden": "16"}, {"hidden": True}],
)
def test_a_nonsensical_layout_is_refused(bundle: Path, change: dict[str, Any]) -> None:
    config = json.loads((bundle / CONFIG).read_text()) | change
    (bundle / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match="positive integers") as error:
        Agent.load(bundle)
    assert CONFIG in str(error.value)


# ------------------------------------------------------------------ the Hub


class FakeApi:
    """Keeps what would have been uploaded."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls = folder, []

    def create_repo(self, repo_id: str, **options: Any) -> None:
        self.calls.append(("create_repo", repo_id, options))

    def create_branch(self, repo_id: str, **options: Any) -> None:
        self.calls.append(("create_branch", repo_id, options))

    def upload_folder(self, *, repo_id: str, folder_path: str, **options: Any) -> Any:
        shutil.copytree(folder_path, self.folder / repo_id)
        self.calls.append(("upload_folder", repo_id, options))
        return type("Commit", (), {"commit_url": f"https://hub/{repo_id}/commit/1"})()


def test_the_hub_gets_and_gives_a_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, obs: np.ndarray) -> None:
    agent, api = make_agent(), FakeApi(tmp_path)
    agent.config["results"] = {"tiny-test": {"success": 0.83, "nfe": 12.4}}
    assert agent.push_to_hub("someone/my-agent", private=True, api=api) == "https://hub/someone/my-agent/commit/1"
    assert [call[0] for call in api.calls] == ["create_repo", "upload_folder"]
    assert api.calls[0][2] == {"private": True, "exist_ok": True}
    assert agent.fingerprint in api.calls[1][2]["commit_message"]
    uploaded = tmp_path / "someone" / "my-agent"
    assert sorted(path.name for path in uploaded.iterdir()) == ["README.md", CONFIG, WEIGHTS]

    asked: dict[str, Any] = {}

    def download(repo_id: str, **options: Any) -> str:
        asked.update(options, repo_id=repo_id)
        return str(uploaded)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    again = Agent.from_pretrained("someone/my-agent", revision="main")
    np.testing.assert_array_equal(again.logits(obs), agent.logits(obs))
    assert asked["repo_id"] == "someone/my-agent" and asked["revision"] == "main"
    assert set(asked["allow_patterns"]) == {"README.md", CONFIG, WEIGHTS}  # a pickle would not even be fetched
    assert Agent.from_pretrained(uploaded).fingerprint == agent.fingerprint

    other = FakeApi(tmp_path / "other")
    agent.push_to_hub("someone/my-agent", revision="v2", api=other)
    assert [call[0] for call in other.calls] == ["create_repo", "create_branch", "upload_folder"]
    assert other.calls[2][2]["revision"] == "v2"


def test_the_model_card_carries_what_was_measured() -> None:
    agent = make_agent()
    assert "Not yet evaluated" in agent.model_card("someone/my-agent")
    agent.config["results"] = {"tiny-test": {"success": 0.83, "nfe": 12.4}}
    card = ModelCard(agent.model_card("someone/my-agent"))
    measured = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert measured == {("tiny-test", "success"): 0.83, ("tiny-test", "nfe"): 12.4}
    assert card.data.pipeline_tag == "text-to-image" and card.data.library_name == "addiff-env"
    assert "| success | 0.83 |" in card.text and agent.fingerprint in card.text
    assert 'AdaptivePipeline.from_pretrained("someone/my-agent")' in card.text


@pytest.mark.parametrize("name", ["someone/none", "not a repository!", "/nowhere/at/all"])
def test_a_missing_agent_is_named(name: str) -> None:
    with pytest.raises(FileNotFoundError, match="addiff train") as error:
        Agent.from_pretrained(name)
    assert repr(name) in str(error.value)
    assert ("on the Hub" in str(error.value)) == (name == "someone/none")
