"""Where one stands: what is shipped is found from any folder, and a path of the user's is relative to where he is."""

import importlib
import shutil
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
from composed import rllib_config
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from addiff_env import TINY, cli
from addiff_env.agent import Agent
from addiff_env.env.baseline_cache import BaselineCache
from addiff_env.env.prompts import load_prompts
from addiff_env.evaluation.acceptance import load_agent
from addiff_env.evaluation.benchmarks.items import load_benchmark
from addiff_env.evaluation.metrics.geneval import open_geneval
from addiff_env.evaluation.metrics.sets import References, SetOptions
from addiff_env.evaluation.metrics.t2i_compbench import open_t2i
from addiff_env.evaluation.run.planning import named_agents
from addiff_env.evaluation.run.version import model_revision
from addiff_env.evaluation.share import measured, record
from addiff_env.loading.paths import expand_home, resolve_model
from addiff_env.perception.encoders import load_clip, load_dino
from addiff_env.perception.scorers import PixelTextReward, load_scorer
from addiff_env.pipeline import SHIPPED_AGENT
from addiff_env.rllib.lanes import make_lanes
from addiff_env.sb3 import search, zips
from addiff_env.storage.inputs import fingerprint

ID = "AdDiffusion-Tiny-v0"
AGENT = "addiff_env:tiny/weights/agent_prices"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder outside the checkout, with a blank in its name, in which every test here stands."""
    folder = tmp_path / "else where"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


# --------------------------------------------------------------------------- what is shipped


@pytest.mark.parametrize(
    "load",
    [
        lambda: Agent.load(AGENT),
        lambda: Agent.from_pretrained(AGENT),
        lambda: Agent.from_pretrained(SHIPPED_AGENT),
        lambda: load_agent(Path(AGENT)),  # as a command line gives it
        lambda: load_prompts(Path(TINY["prompts"])),
        lambda: load_benchmark("addiff_env:tiny/splits/dev.jsonl", 3),
        lambda: load_clip(TINY["clip"], "cpu"),
        lambda: load_clip(resolve_model(TINY["clip"]), "cpu"),
        lambda: load_dino(TINY["dino"], "cpu"),
        lambda: load_scorer(TINY["scorer"]),
        lambda: load_scorer(f"clipscore:{TINY['clip']}"),
        lambda: PixelTextReward.from_pretrained(TINY["scorer"]),
        lambda: search.read_space("addiff_env:configs/search/ppo.yaml"),
    ],
)
def test_what_is_shipped_is_found_from_any_folder(load: Any) -> None:
    assert load()


def test_evaluation_finds_its_default_agent_from_any_folder() -> None:
    with initialize_config_dir(resolve_model("addiff_env:configs"), version_base="1.3"):
        cfg = compose("evaluate", [])
        several = compose("evaluate", [f"agents=[{AGENT}]"])  # without quotation marks
    assert named_agents(cfg.agent, cfg.agents)["agent"].fingerprint == Agent.load(AGENT).fingerprint
    assert list(several.agents) == [AGENT]


def test_a_search_finds_its_configuration_from_any_folder(elsewhere: Path, capsys: pytest.CaptureFixture) -> None:
    search.main(["study", "--trials", "0", "env=tiny"])
    assert "0 trials" in capsys.readouterr().out and (elsewhere / "study" / "journal.log").exists()
    (elsewhere / "space.yaml").write_text("seed: [1, 2]")
    assert search.read_space("space.yaml") == {"seed": [1, 2]}


def test_an_agent_is_exported_from_any_folder(elsewhere: Path, small_agent: Path) -> None:
    zips.main(["export", small_agent.name, "agent.zip"])
    assert (elsewhere / "agent.zip").exists()


def test_recording_results_of_a_shipped_agent_makes_no_folder_of_that_name(elsewhere: Path) -> None:
    assert record(Path(AGENT), []).fingerprint == Agent.load(AGENT).fingerprint
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("name", ["gone", "tiny/weights/gone", "configs/gone.yaml", "../addiff_env", "/etc"])
def test_what_is_not_shipped_is_named(name: str) -> None:
    for load in (resolve_model, Agent.load, load_prompts, search.read_space):
        with pytest.raises((FileNotFoundError, ValueError), match=f"addiff_env:{name}"):
            load(f"addiff_env:{name}")


# --------------------------------------------------------------------------- what is the user's


@pytest.fixture
def small_agent(elsewhere: Path, small_kwargs: dict[str, Any]) -> Path:
    """The bundle of an agent on the small model, in the folder ``my agent``."""
    from addiff_env.agent import PolicyNet

    env: Any = gym.make_vec(ID, num_envs=1, **small_kwargs).unwrapped
    parts = env.perception.parts
    kwargs = {name: value for name, value in small_kwargs.items() if name != "prompts"}
    config = {"env": {"id": ID, "kwargs": kwargs}, "observation": parts, "hidden": 4}
    Agent(PolicyNet(parts, 4), config).save(elsewhere / "my agent")
    env.close()
    return elsewhere / "my agent"


def test_paths_are_relative_to_where_one_stands(
    elsewhere: Path, small_kwargs: dict[str, Any], small_model: Path
) -> None:
    shutil.copytree(small_model, "my model")
    Path("mine.txt").write_text("a red circle\n")
    settings = {**small_kwargs, "model": "my model", "prompts": "mine.txt"}
    env: Any = gym.make(ID, **settings).unwrapped
    assert env.vector.prompts == ["a red circle"]
    assert [item.prompt for item in load_benchmark("mine.txt")] == ["a red circle"]


def test_ray_takes_paths_from_where_the_training_was_started(
    elsewhere: Path, small_kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("mine.txt").write_text("a red circle\n")
    training = importlib.import_module("addiff_env.rllib.training")
    context = training._context(rllib_config("prompts.source=mine.txt", **small_kwargs), 0.0)
    (elsewhere / "runner").mkdir()
    monkeypatch.chdir(elsewhere / "runner")  # Ray's workers stand somewhere else
    lanes: Any = make_lanes(context)
    assert lanes.unwrapped.prompts == ["a red circle"] and Path.cwd() == elsewhere / "runner"


def open_references(name: str) -> None:
    References(SetOptions(names=["fid"], reference=name), Path(), "cpu")


@pytest.mark.parametrize(
    ("name", "load"),
    [
        ("gone.txt", load_prompts),
        ("gone.txt", load_benchmark),
        ("gone", lambda name: load_benchmark("drawbench", root=name)),
        ("gone", Agent.load),
        ("gone", Agent.from_pretrained),
        ("my/gone", Agent.from_pretrained),  # might be the Hub's
        ("gone", lambda name: load_clip(name, "cpu")),
        ("gone.pt", lambda name: load_clip(f"open_clip:ViT-B-32@{name}", "cpu")),
        ("gone", lambda name: load_clip(f"open_clip:local-dir:{name}", "cpu")),
        ("gone", lambda name: load_dino(name, "cpu")),
        ("gone", load_scorer),
        ("gone.pt", lambda name: load_scorer(f"hps:{name}")),
        ("gone", lambda name: open_geneval(name, "cpu")),
        ("gone", lambda name: open_t2i("spatial", name, "cpu", load_benchmark_item("spatial"))),
        ("gone", open_references),
        ("gone.yaml", search.read_space),
        ("gone", lambda name: search.main(["study", "--configs", name])),
        ("gone", lambda name: measured(Agent.load(AGENT), Path(name))),
        ("gone.zip", lambda name: zips.import_zip(name, {}, trust_pickle=True)),
        ("gone.jsonl", lambda name: BaselineCache.load(name, None)),  # type: ignore[arg-type]
    ],
)
def test_a_message_says_where_a_path_was_looked_for(elsewhere: Path, name: str, load: Any) -> None:
    with pytest.raises(FileNotFoundError) as error:
        load(name)
    assert str(elsewhere / name) in str(error.value)


def load_benchmark_item(category: str) -> Any:
    from addiff_env.evaluation.benchmarks.items import Item

    return [Item("a cat on the left of a dog", 0, category)]


@pytest.mark.parametrize("setting", ["model", "clip", "dino", "scorer", "prompts", "lora", "preview_model"])
def test_an_environment_says_where_a_path_was_looked_for(
    elsewhere: Path, small_kwargs: dict[str, Any], setting: str
) -> None:
    if setting == "lora":
        pytest.importorskip("peft")
    name = "gone.txt" if setting == "prompts" else "gone"
    preview = {"preview": "taesd"} if setting == "preview_model" else {}
    with pytest.raises(FileNotFoundError) as error:
        gym.make(ID, **{**small_kwargs, **preview, setting: name})
    assert str(elsewhere / name) in str(error.value)


def test_training_says_where_baselines_were_looked_for(elsewhere: Path) -> None:
    parts = importlib.import_module("addiff_env.sb3.parts")
    cfg = OmegaConf.create({"reward": {"baselines": "gone.jsonl", "weights": {}}, "prompts": {"source": None}})
    cfg.env = {"id": ID, "kwargs": {}}
    lanes = type("Lanes", (), {"reward_config": importlib.import_module("addiff_env.env.reward").RewardConfig()})()
    with pytest.raises(FileNotFoundError) as error:
        parts.load_baselines(cfg, lanes)
    assert str(elsewhere / "gone.jsonl") in str(error.value)


# --------------------------------------------------------------------------- the home folder


@pytest.fixture
def home(elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_models_and_files_are_read_from_the_home_folder(
    home: Path, small_kwargs: dict[str, Any], small_model: Path
) -> None:
    for name, source in {**small_kwargs, "model": small_model}.items():
        if name in ("model", "clip", "dino", "scorer"):
            shutil.copytree(source, home / name)
    (home / "mine.txt").write_text("a red circle\n")
    models = {name: f"~/{name}" for name in ("model", "clip", "dino", "scorer")}
    env: Any = gym.make(ID, **{**small_kwargs, **models, "prompts": "~/mine.txt"}).unwrapped
    assert env.vector.prompts == ["a red circle"]
    assert [item.prompt for item in load_benchmark("~/mine.txt")] == ["a red circle"]
    assert load_scorer("clipscore:~/clip") is not None
    assert fingerprint("~/model") == fingerprint(home / "model") is not None
    assert model_revision("~/model", None) == "local"


def test_agents_are_kept_in_and_taken_from_the_home_folder(home: Path, small_agent: Path) -> None:
    agent = Agent.load(small_agent)
    agent.save("~/agents/mine")
    assert (home / "agents" / "mine" / "agent.json").is_file() and not Path("~").exists()
    for load in (Agent.load, Agent.from_pretrained, lambda name: load_agent(Path(name))):
        assert load("~/agents/mine").fingerprint == agent.fingerprint


@pytest.mark.parametrize("load", [load_prompts, load_scorer, Agent.load, lambda name: load_clip(name, "cpu")])
def test_what_is_not_in_the_home_folder_is_named_with_its_place(home: Path, load: Any) -> None:
    with pytest.raises((FileNotFoundError, ValueError), match="gone.txt") as error:
        load("~/gone.txt")
    assert str(home / "gone.txt") in str(error.value)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("hydra.run.dir=~/runs", "hydra.run.dir={}/runs"),
        ("+env.model=~/model", "+env.model={}/model"),
        ("--json=~/costs.json", "--json={}/costs.json"),
        ("~/runs/a", "{}/runs/a"),
        ("~", "{}"),
        ("~search", "~search"),  # Hydra's word for leaving a group out
        ("~env.kwargs.lora", "~env.kwargs.lora"),
        ("prompt=a ~/b", "prompt=a ~/b"),
        ("a=b=~/c", "a=b=~/c"),
        ("", ""),
    ],
)
def test_words_of_a_command_line(home: Path, word: str, expected: str) -> None:
    assert expand_home(word) == expected.format(home)


def test_a_run_is_kept_in_the_home_folder(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where no shell has put it into the words."""
    assert cli.main(["evaluate", "benchmark.name=~/gone.txt", "hydra.run.dir=~/runs/mine"]) == 1
    assert str(home / "gone.txt") in capsys.readouterr().err
    assert (home / "runs" / "mine").is_dir() and not Path("~").exists()
