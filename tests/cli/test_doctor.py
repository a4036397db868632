"""``addiff doctor``: what it finds, what it advises, its exit status; never a network, never a weight."""

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import models
import psutil
import pytest
import torch
from huggingface_hub import constants

from addiff_env import cli
from addiff_env.cli import doctor
from addiff_env.cli.chosen import read_chosen
from addiff_env.storage.commands import override

Kwargs = dict[str, Any]
HUB = {
    "model": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "preview_model": "madebyollin/taesd",
    "clip": "timm/vit_large_patch14_clip_224.openai",
    "dino": "facebook/dinov2-small",
    "scorer": "THUDM/ImageReward",
}


@pytest.fixture(autouse=True)
def nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a network nor a model is to be had."""
    monkeypatch.setattr(socket.socket, "connect", lambda *args: pytest.fail("asked a network"))
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("read weights"))
    for module in ("addiff_env.diffusion.backbones.open.load_network", "addiff_env.perception.encoders.load_network"):
        monkeypatch.setattr(module, lambda *args, **kwargs: pytest.fail("loaded a network"))


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache of the Hub."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if hasattr(constants, name):
            monkeypatch.setattr(constants, name, str(tmp_path / "hub"))
    original = huggingface_hub.try_to_load_from_cache
    find = lambda *args, **more: original(*args, cache_dir=tmp_path / "hub", **more)  # noqa: E731
    monkeypatch.setattr("addiff_env.loading.presence.try_to_load_from_cache", find)
    return tmp_path / "hub"


def put_in_cache(cache: Path, repository: str, *names: str, folder: Path | None = None) -> Path:
    """A repository as the Hub's client keeps it; files of ``folder`` by their names, others with a few bytes."""
    place = cache / f"models--{repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("abc")
    snapshot = place / "snapshots" / "abc"
    if folder is not None:
        shutil.copytree(folder, snapshot)
    for name in names:
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).write_text("{}")
    return snapshot


def words(settings: Kwargs) -> list[str]:
    return [override(name, value) for name, value in settings.items()]


def run(capsys: pytest.CaptureFixture[str], *given: str) -> tuple[int, str]:
    status = cli.main(["doctor", *given])
    printed = capsys.readouterr()
    return status, printed.out + printed.err


def todo(text: str) -> list[str]:
    return text.partition("what to do, in this order")[2].strip().splitlines()


# --------------------------------------------------------------------------- what is fine


@pytest.mark.parametrize("given", [[], ["env=tiny"], ["env=AdDiffusion-Tiny-v0", "num_envs=3"]])
def test_nothing_is_in_the_embedded_worlds_way(capsys: pytest.CaptureFixture[str], given: list[str]) -> None:
    status, told = run(capsys, *given)
    assert status == 0 and "WRONG" not in told and not todo(told)
    for name in ("Python", "torch", "diffusers", "model", "clip", "dino", "scorer", "prompts"):
        assert name in told


@pytest.mark.parametrize("kind", models.BUILDERS)
def test_a_whole_folder_is_fine(
    small_kwargs: Kwargs, capsys: pytest.CaptureFixture[str], tmp_path: Path, kind: str
) -> None:
    folder = models.save(kind, tmp_path / kind)
    status, told = run(capsys, *words(small_kwargs | {"model": str(folder)}))
    assert status == 0, told


# --------------------------------------------------------------------------- what is in the way


def weights_and_configurations(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.suffix in (".safetensors", ".json") and path.is_file()]


@pytest.mark.parametrize("kind", models.BUILDERS)
def test_every_missing_cut_or_empty_file_is_named(small_kwargs: Kwargs, tmp_path: Path, kind: str) -> None:
    folder = models.save(kind, tmp_path / kind)
    config = read_chosen(words(small_kwargs | {"model": str(folder)})).config
    for path in weights_and_configurations(folder):
        if "tokenizer" in path.parent.name and path.name != "tokenizer.json":
            continue  # one of its files suffices
        whole = path.read_bytes()
        for left in (None, b"", whole[: len(whole) // 2]):
            path.unlink() if left is None else path.write_bytes(left)
            found = list(doctor.models([doctor.look_for(needed) for needed in doctor.required(config)]))
            wrong = [finding for finding in found if finding.state == "WRONG"]
            assert len(wrong) == 1 and str(path.relative_to(folder)) in wrong[0].text, (path, left)
            assert "model" in wrong[0].todo
        path.write_bytes(whole)


@pytest.mark.parametrize("setting", ["clip", "dino", "scorer"])
def test_lookers_are_looked_at_too(
    small_kwargs: Kwargs, capsys: pytest.CaptureFixture[str], tmp_path: Path, setting: str
) -> None:
    folder = tmp_path / setting
    shutil.copytree(small_kwargs[setting], folder)
    (folder / "model.safetensors").unlink()
    status, told = run(capsys, *words(small_kwargs | {setting: str(folder)}))
    assert status == 1 and "model.safetensors" in told and str(folder) in told


def test_shards_that_an_index_lists_are_asked_for(
    small_kwargs: Kwargs, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = models.save("sd", tmp_path / "sd")
    whole = folder / "unet" / "diffusion_pytorch_model.safetensors"
    whole.rename(folder / "unet" / "one.safetensors")
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    assert run(capsys, *words(small_kwargs | {"model": str(folder)}))[0] == 0
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    status, told = run(capsys, *words(small_kwargs | {"model": str(folder)}))
    assert status == 1 and "unet/two.safetensors" in told


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"model": "./nowhere"}, "nowhere"),
        ({"model": "addiff_env:tiny/weights/gone"}, "addiff world train"),
        ({"model": str(Path(__file__))}, "a file, not a model's folder"),
        ({"model": "owner/nobody-has-this"}, "model_index.json"),
        ({"scorer": "imagrewrd"}, "imagrewrd"),
        ({"scorer": "imagereward:/nowhere/ImageReward.pt"}, "/nowhere/ImageReward.pt"),
        ({"clip": "open_clip:ViT-L-14@/nowhere/clip.pt"}, "/nowhere/clip.pt"),
        ({"clip": "open_clip:local-dir:/nowhere/clip"}, "/nowhere/clip"),
        ({"lora": "/nowhere/lora.safetensors"}, "/nowhere/lora.safetensors"),
        ({"prompts": "/nowhere/prompts.txt"}, "/nowhere/prompts.txt"),
        ({"device": "cuda:9"}, "cuda:9"),
    ],
)
def test_what_is_not_there_is_named(
    small_kwargs: Kwargs, cache: Path, capsys: pytest.CaptureFixture[str], settings: Kwargs, named: str
) -> None:
    status, told = run(capsys, *words(small_kwargs | settings))
    assert status == 1 and named in told and todo(told)


@pytest.mark.parametrize(
    "given", [["colour=red"], ["dtype=float8"], ["env=sd16"], ["num_envs=0"], ["num_envs"], ["mask=a,b"], ["a=b=["]]
)
def test_wrong_settings_are_one_line(capsys: pytest.CaptureFixture[str], given: list[str]) -> None:
    status, told = run(capsys, *given)
    assert status == 1 and told.startswith("addiff doctor: ") and given[0].partition("=")[0] in told
    assert "Traceback" not in told


def test_training_and_evaluation_name_settings_in_the_same_words() -> None:
    plain, train, evaluate = (
        read_chosen(["env=sd15", "num_envs=3", f"{prefix}mask=full"]) for prefix in ("", "+env.kwargs.", "+env.")
    )
    assert plain == train == evaluate and plain.settings["mask"] == "full" and plain.num_envs == 3
    assert plain.settings["dtype"] == "float16"  # of configs/env/sd15.yaml
    assert read_chosen(["env=AdDiffusion-SD15-v0"]).settings["dtype"] == "auto"


# --------------------------------------------------------------------------- the Hub's cache


def test_an_empty_cache_is_told_with_the_commands_that_fill_it(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    status, told = run(capsys, "env=sd15", "device=cpu")
    assert status == 1
    for repository in HUB.values():
        assert any(repository in line and ("hf download" in line or "download(" in line) for line in todo(told))


def test_what_is_cached_is_found(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put_in_cache(cache, HUB["model"], folder=models.save("sd", tmp_path / "sd"))
    put_in_cache(cache, HUB["preview_model"], "config.json")
    put_in_cache(cache, HUB["dino"], "config.json", "pytorch_model.bin", "preprocessor_config.json")
    put_in_cache(cache, HUB["clip"], "open_clip_pytorch_model.bin")
    put_in_cache(cache, HUB["scorer"], "ImageReward.pt")
    put_in_cache(cache, "bert-base-uncased", "vocab.txt")
    status, told = run(capsys, "env=sd15", "device=cpu")
    assert status == 1
    missing = [line for line in told.splitlines() if ": missing:" in line]
    assert len(missing) == 1 and HUB["preview_model"] in missing[0] and "diffusion_pytorch_model" in missing[0]
    assert told.count("in the cache") == 5


def test_a_revision_is_looked_for(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put_in_cache(cache, HUB["model"], folder=models.save("sd", tmp_path / "sd"))
    status, told = run(capsys, "env=sd15", "device=cpu", "revision=fp16")
    assert status == 1 and any("fp16" in line for line in todo(told))


def test_a_gated_model_is_told_apart(cache: Path) -> None:
    config = read_chosen(["env=flux_schnell", "device=cpu"]).config
    found = next(iter(doctor.models([doctor.look_for(needed) for needed in doctor.required(config)])))
    assert found.state == "WRONG" and "black-forest-labs/FLUX.1-schnell: gated" in found.text
    assert "accept its licence" in found.todo and "hf auth login" in found.todo


@pytest.mark.parametrize(
    ("answer", "told"), [(None, "the Hub gives"), (OSError("no route"), "no route"), (ValueError("404"), "404")]
)
def test_the_hub_is_asked_where_that_is_wanted(
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    answer: Exception | None,
    told: str,
) -> None:
    asked = []

    def info(self: Any, repository: str, **options: Any) -> None:
        assert 0 < options["timeout"] < 60
        asked.append(repository)
        if answer is not None:
            raise answer

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(doctor.HfApi, "model_info", info)
    monkeypatch.setattr(doctor, "auth_check", lambda repository: None)
    status, text = run(capsys, "env=sd15", "device=cpu", "--online")
    assert status == 1 and told in text and set(HUB.values()) <= set(asked)


# --------------------------------------------------------------------------- memory, disk, software


def finding(findings: list[doctor.Finding], topic: str) -> doctor.Finding:
    return next(found for found in findings if found.topic == topic)


@pytest.mark.parametrize(
    ("gib", "given", "state", "advice"),
    [
        (60, [], "ok", ""),
        (9, ["num_envs=16"], "WRONG", "batch_size="),
        (9, ["num_envs=1"], "ok", ""),
        (9, ["num_envs=16", "batch_size=2"], "ok", ""),
        (2, [], "WRONG", "nothing that the settings offer fits"),
    ],
)
def test_memory_is_what_the_lanes_need(
    monkeypatch: pytest.MonkeyPatch, cache: Path, gib: int, given: list[str], state: str, advice: str
) -> None:
    """By accounting SD 1.5 in float16 needs 7.4 GiB at 16 lanes and 5.7 at one, and a fifth is left free."""
    free = type("Memory", (), {"available": gib * 2**30})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    chosen = read_chosen(["env=sd15", "device=cpu", *given])
    found = next(iter(doctor.memory(chosen, chosen.config, [])))
    assert found.state == state and advice in found.todo, found


def test_a_full_disk_is_told(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    free = type("Usage", (), {"free": 3 * 2**30})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    chosen = read_chosen(["env=sd15", "device=cpu"])
    files = [doctor.look_for(needed) for needed in doctor.required(chosen.config)]
    found = next(iter(doctor.disk(chosen, files)))
    assert found.state == "WRONG" and "3.0 GiB free" in found.text and "HF_HOME" in found.todo


@pytest.mark.parametrize(
    ("versions", "state", "named"),
    [
        ({"gymnasium": "1.1.0"}, "WRONG", "gymnasium 1.1.0"),
        ({"gymnasium": "1.9"}, "WRONG", "gymnasium 1.9"),
        ({"diffusers": None}, "WRONG", "diffusers is not installed"),
        ({"diffusers": "0.99"}, "note", "diffusers 0.99"),
    ],
)
def test_libraries_are_compared_with_the_bounds(
    monkeypatch: pytest.MonkeyPatch, versions: dict[str, str | None], state: str, named: str
) -> None:
    original: Callable[[str], str] = doctor.metadata.version

    def version(name: str) -> str:
        if name in versions and versions[name] is None:
            raise doctor.metadata.PackageNotFoundError(name)
        return versions.get(name) or original(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    findings = [found for found in doctor.software(read_chosen([]).config) if named in found.text]
    assert [found.state for found in findings] == [state]
    assert bool(findings[0].todo) == (state == "WRONG")
