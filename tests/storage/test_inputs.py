"""What a run reads: contents count, and nothing else; resuming on others is refused by name."""

import json
import os
import shutil

import gymnasium as gym
import pytest
import torch
from composed import rllib_config
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from trainings import KillAt, Killed, configure

from addiff_env.agent import Agent
from addiff_env.env.baseline_cache import BaselineCache, baseline_configuration, compute_baselines
from addiff_env.evaluation.benchmarks.items import load_benchmark
from addiff_env.evaluation.methods.diffusers_methods import MethodOptions
from addiff_env.evaluation.run.fingerprint import run_fingerprint
from addiff_env.evaluation.run.made_with import keep_fingerprint, require_same
from addiff_env.loading.paths import resolve_model
from addiff_env.pipeline import SHIPPED_AGENT
from addiff_env.rllib.settings import claim
from addiff_env.sb3 import search
from addiff_env.sb3.checkpoint import FILE
from addiff_env.sb3.training import train
from addiff_env.storage.inputs import contents, differing, fingerprint

LARGE = 3 << 20


def large_file(path, byte=0, at=LARGE // 2):
    """Larger than what is read at once; one byte in its middle counts."""
    content = bytearray(LARGE)
    content[at] = byte
    path.write_bytes(content)


def edit_middle(path):
    """What neither the size nor either end of a file tells."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# --------------------------------------------------------------------------- fingerprints


def test_contents_count_and_neither_time_nor_place_nor_name(tmp_path):
    large_file(tmp_path / "a.bin")
    before = contents(tmp_path / "a.bin")
    os.utime(tmp_path / "a.bin", (1, 1))
    assert contents(tmp_path / "a.bin") == before
    (tmp_path / "sub").mkdir()
    shutil.move(tmp_path / "a.bin", tmp_path / "sub" / "b.bin")
    assert contents(tmp_path / "sub" / "b.bin") == before == fingerprint(tmp_path / "sub" / "b.bin")
    large_file(tmp_path / "sub" / "b.bin", byte=1)
    assert contents(tmp_path / "sub" / "b.bin") != before


def test_every_file_of_a_folder_counts_by_its_name_in_it(tmp_path):
    folder = tmp_path / "model"
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "config.json").write_text("{}")
    (folder / "model_index.json").write_text("{}")
    before = fingerprint(str(folder))
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x.metadata").write_text("1")
    (folder / ".lock").touch()
    folder = folder.rename(tmp_path / "elsewhere")
    assert fingerprint(str(folder)) == before
    (folder / "unet").rename(tmp_path / "unet")
    (folder / "unet").symlink_to(tmp_path / "unet")  # what a link leads to is read, too
    assert fingerprint(str(folder)) == before
    (folder / "round").symlink_to(folder)
    assert fingerprint(str(folder)) is not None  # and comes to an end
    (folder / "round").unlink()
    (tmp_path / "unet" / "config.json").write_text("{ }")
    edited = fingerprint(str(folder))
    assert edited != before
    (tmp_path / "unet" / "config.json").rename(tmp_path / "unet" / "other.json")
    assert fingerprint(str(folder)) not in (before, edited)


def test_paths_within_a_setting_are_found_and_the_rest_counts_as_written(tmp_path):
    one, other = tmp_path / "a,b=c@d:e.pt", tmp_path / "head.pt"
    one.write_text("1")
    other.write_text("1")
    assert fingerprint(str(one)) == fingerprint(str(other)) == fingerprint(other)
    assert fingerprint(f"aesthetic:{other}") not in (None, fingerprint(str(other)), fingerprint(f"clip:{other}"))
    moved = other.rename(tmp_path / "moved.pt")
    before = fingerprint(f"aesthetic:{moved},clip={tmp_path}")
    assert before is not None
    moved.write_text("2")
    assert fingerprint(f"aesthetic:{moved},clip={tmp_path}") != before
    names = (None, "", "someone/model", "imagereward", 3, ["a red circle"], "x" * 5000, "a\x00b")
    assert [fingerprint(name) for name in names] == [None] * len(names)
    assert fingerprint(SHIPPED_AGENT) == fingerprint(resolve_model(SHIPPED_AGENT))


@given(
    st.dictionaries(st.sampled_from("abcd"), st.sampled_from("xyz")),
    st.dictionaries(st.sampled_from("abcd"), st.sampled_from("xyz")),
)
def test_settings_without_files_differ_as_they_are_written(ours, theirs):
    names = {name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)}
    assert {text.partition(":")[0] for text in differing(ours, theirs, {}, {})} == names


@given(*[st.dictionaries(st.sampled_from("abcd"), st.sampled_from("xyz")) for _ in range(2)])
def test_of_files_only_what_both_know_is_compared(now, there):
    settings = dict.fromkeys("abcd", "path")
    names = {name for name in now if name in there and now[name] != there[name]}
    assert {text.partition(":")[0] for text in differing(settings, settings, now, there)} == names
    elsewhere = dict.fromkeys("abcd", "other path")
    assert {text.partition(":")[0] for text in differing(settings, elsewhere, now, now)} == set("abcd") - set(now)


# --------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def killed(tmp_path_factory, small_kwargs, small_model):
    """A training with files of every kind, killed after its first checkpoints: its folder, files and configuration."""
    folder = tmp_path_factory.mktemp("killed")
    files = folder / "files"
    shutil.copytree(small_model, files / "model")
    (files / "prompts.txt").write_text("a red circle\na star\n")
    (files / "held_out.txt").write_text("a blue square\na green star\n")
    cfg = configure({**small_kwargs, "model": str(files / "model")}, "algorithm.total_timesteps=45")
    cfg.prompts.source = str(files / "prompts.txt")
    cfg.prompts.held_out.source = str(files / "held_out.txt")
    with pytest.raises(Killed):
        train(cfg, folder / "run", callbacks=[KillAt(20)])
    assert (folder / "run" / FILE).is_file()
    return folder, cfg


@pytest.fixture
def again(killed, tmp_path):
    """The same, to be altered."""
    folder, cfg = killed
    shutil.copytree(folder / "run", tmp_path / "run")
    shutil.copytree(folder / "files", tmp_path / "files")
    cfg = OmegaConf.create(OmegaConf.to_yaml(cfg).replace(str(folder), str(tmp_path)))
    return tmp_path, cfg


@pytest.fixture
def edited():
    """Edits a file until the test has ended."""
    contents = {}

    def edit(path):
        contents[path] = path.read_bytes()
        edit_middle(path)

    yield edit
    for path, content in contents.items():
        path.write_bytes(content)


def test_a_training_goes_on_where_its_files_only_moved_and_were_touched(again):
    folder, cfg = again  # which lies elsewhere than when it was killed
    for path in (folder / "files").rglob("*"):
        os.utime(path, (1, 1))
    assert train(cfg, folder / "run").timesteps == 45


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("prompts.txt", "prompts.source"),
        ("held_out.txt", "prompts.held_out.source"),
        ("model/unet/diffusion_pytorch_model.safetensors", "env.kwargs.model"),
        ("model/scheduler/scheduler_config.json", "env.kwargs.model"),
    ],
)
def test_a_training_does_not_go_on_with_other_contents(killed, edited, file, name):
    folder, cfg = killed
    edited(folder / "files" / file)
    before = (folder / "run" / FILE).read_bytes()
    with pytest.raises(ValueError, match=f"{name}: {folder}/files/.*resume=false") as error:
        train(cfg, folder / "run")
    assert "hydra.run.dir" in str(error.value) and str(error.value).count("contents") == 1
    assert (folder / "run" / FILE).read_bytes() == before


def test_a_checkpoint_that_knows_no_contents_is_gone_on_from(killed, tmp_path):
    folder, cfg = killed
    shutil.copytree(folder / "run", tmp_path / "run")
    state = torch.load(tmp_path / "run" / FILE, weights_only=True)
    del state["inputs"]
    torch.save(state, tmp_path / "run" / FILE)
    assert train(cfg, tmp_path / "run").timesteps == 45


# --------------------------------------------------------------------------- searches, RLlib, baselines, evaluations


def test_a_search_does_not_go_on_with_other_contents(killed, tmp_path):
    folder, cfg = killed
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("a star\n")
    cfg = OmegaConf.merge(cfg, {"prompts": {"source": str(tmp_path / "a.txt")}})
    space = {"prompts.source": [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")], "algorithm.n_epochs": [2, 3]}

    def begin():
        settings = {"space": space, "price": 0.1, "overrides": []} | search.study_inputs(cfg, space)
        search.open_study(tmp_path / "study", 0, settings)

    begin()
    os.utime(tmp_path / "a.txt", (1, 1))
    begin()
    (tmp_path / "b.txt").write_text("a circle\n")
    with pytest.raises(ValueError, match=r"prompts.source\[1\]: .*b.txt has other contents"):
        begin()
    (tmp_path / "b.txt").write_text("a star\n")
    cfg.algorithm.n_steps = 7  # as if somebody had edited configs/algorithm/ppo.yaml
    with pytest.raises(ValueError, match="algorithm.n_steps: 5 there, 7 now"):
        begin()


def test_a_search_of_an_earlier_release_is_gone_on_with(killed, tmp_path):
    _, cfg = killed
    old = {"space": {}, "price": 0.1, "overrides": []}
    search.open_study(tmp_path, 0, old)
    search.open_study(tmp_path, 0, old | search.study_inputs(cfg, {}))
    with pytest.raises(ValueError, match=r"price: 0.1 there, 0.2 now"):
        search.open_study(tmp_path, 0, old | {"price": 0.2} | search.study_inputs(cfg, {}))


def test_an_rllib_run_does_not_go_on_with_other_contents(tmp_path):
    (tmp_path / "p.txt").write_text("a star\n")
    (tmp_path / "run" / "checkpoint").mkdir(parents=True)
    claim(tmp_path / "run", rllib_config(f"prompts.source={tmp_path / 'p.txt'}"))
    (tmp_path / "p.txt").rename(tmp_path / "q.txt")
    moved = rllib_config(f"prompts.source={tmp_path / 'q.txt'}")
    claim(tmp_path / "run", moved)
    (tmp_path / "q.txt").write_text("a circle\n")
    with pytest.raises(ValueError, match="prompts.source: .*q.txt has other contents"):
        claim(tmp_path / "run", moved)


@pytest.fixture
def model(tmp_path, small_model):
    """A model whose largest file is longer than what its ends tell."""
    shutil.copytree(small_model, tmp_path / "model")
    assert (tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size > 2**18
    return tmp_path / "model"


def test_baselines_know_the_whole_of_the_weights_and_not_their_place(model, tmp_path, small_kwargs):
    def make(folder):
        return gym.make_vec("AdDiffusion-Tiny-v0", num_envs=1, **small_kwargs | {"model": str(folder)}).unwrapped

    path, old = tmp_path / "b.jsonl", tmp_path / "old.jsonl"
    env = make(model)
    compute_baselines(path, env, 2, ["a star"], [0])
    header, row = path.read_text().splitlines()
    former = json.loads(header) | {"configuration": baseline_configuration(env, 2, 2)}  # as an earlier release wrote it
    old.write_text(f"{json.dumps(former)}\n{row}\n")
    moved = make(shutil.copytree(model, tmp_path / "moved"))
    assert len(BaselineCache.load(path, moved).scores) == len(BaselineCache.load(old, env).scores) == 1
    assert len(compute_baselines(path, moved, 2, ["a star"], [0, 1]).scores) == 2
    assert len(compute_baselines(old, env, 2, ["a star"], [0, 1]).scores) == 2
    edit_middle(model / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match="stale.*model_weights"):
        BaselineCache.load(path, env)


def stamp(overrides, benchmark, metrics=("checker",)):
    agents = {"agent": Agent.load(SHIPPED_AGENT)}
    return run_fingerprint(agents, overrides, metrics, load_benchmark(str(benchmark)), MethodOptions(), str(benchmark))


def test_an_evaluation_does_not_go_on_with_other_contents(model, tmp_path):
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("prompt,wanted\na star,one\n")
    head = tmp_path / "head.pt"
    head.write_text("1")
    begin = {"overrides": {"model": str(model)}, "benchmark": prompts, "metrics": [f"aesthetic:{head}"]}
    keep_fingerprint(tmp_path / "run", stamp(**begin), "1")
    for path in (*model.rglob("*"), prompts):
        os.utime(path, (1, 1))
    (tmp_path / "elsewhere").mkdir()
    moved = shutil.copy(prompts, tmp_path / "elsewhere")
    require_same(tmp_path / "run", stamp(**begin | {"benchmark": moved}), "1")
    prompts.write_text("prompt,wanted\na star,two\n")  # the same prompts, and something else asked of the pictures
    with pytest.raises(ValueError, match=r"benchmark.name: .*prompts.csv has other contents.*hydra.run.dir"):
        require_same(tmp_path / "run", stamp(**begin), "1")
    prompts.write_text("prompt,wanted\na star,one\n")
    head.write_text("2")
    with pytest.raises(ValueError, match=r"metrics.aesthetic: .*head.pt has other contents"):
        require_same(tmp_path / "run", stamp(**begin), "1")
    head.write_text("1")
    edit_middle(model / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=r"environment.model: .*model has other contents"):
        require_same(tmp_path / "run", stamp(**begin), "1")
