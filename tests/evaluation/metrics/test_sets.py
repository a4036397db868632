"""Set metrics of an evaluation's pictures."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from addiff_env.evaluation.metrics import sets
from addiff_env.evaluation.metrics.set_distances import cmmd, frechet_distance, kernel_distance
from addiff_env.evaluation.metrics.sets import References, SetOptions, describe_sets, pictures_in, set_scores
from addiff_env.types import ResultRow

CLIP = str(Path(__file__).resolve().parents[3] / "addiff_env/tiny/weights/clip")


def pictures(folder: Path, rng: np.random.Generator, number: int, shift: int = 0) -> list[Path]:
    folder.mkdir(parents=True)
    paths = [folder / f"{k:03d}.png" for k in range(number)]
    for path in paths:
        array = np.clip(rng.integers(0, 150, (32, 32, 3)) + shift, 0, 255).astype(np.uint8)
        Image.fromarray(array).save(path)
    return paths


def rows_of(paths: list[Path], method: str, folder: Path) -> list[ResultRow]:
    named = {"category": "c", "backbone": "b", "solver": "s", "policy": "p", "dtype": "float32", "code_version": "1"}
    images = [str(path.relative_to(folder)) for path in paths]
    return [ResultRow(method, "p", k, image=image, **named) for k, image in enumerate(images)]


def colours(paths: Any, *args: Any, **kwargs: Any) -> np.ndarray:
    """Features that stand in for the Inception network's: a few statistics of each channel."""
    arrays = [np.asarray(Image.open(path), np.float64) for path in paths]
    return np.stack([np.concatenate([a.mean((0, 1)), a.std((0, 1))]) for a in arrays])


def test_every_method_is_measured_against_the_references(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch_fidelity")
    monkeypatch.setattr(sets, "inception_features", colours)
    monkeypatch.setattr(sets, "inception_weights", lambda weights: weights)
    reference = pictures(tmp_path / "reference/inner", rng, 12)
    run = tmp_path / "run"
    near, far = pictures(run / "near", rng, 10), pictures(run / "far", rng, 10, shift=80)
    options = SetOptions(["fid", "kid", "cmmd"], str(tmp_path / "reference"), clip=CLIP)
    references = References(options, run, "cpu")
    scores = set_scores(rows_of(near, "near", run) + rows_of(far, "far", run), run, references)
    for name, paths in (("near", near), ("far", far)):
        found = scores["methods"][name]
        assert found["pictures"] == 10
        assert found["fid"] == pytest.approx(frechet_distance(colours(paths), references.features["inception"]))
        assert found["kid"] == pytest.approx(kernel_distance(colours(paths), references.features["inception"])[0])
        clip = sets.clip_features(paths, CLIP)
        assert found["cmmd"] == pytest.approx(cmmd(clip, sets.clip_features(reference, CLIP)), abs=1e-4)
    assert scores["methods"]["far"]["fid"] > scores["methods"]["near"]["fid"]
    assert scores["methods"]["far"]["cmmd"] > scores["methods"]["near"]["cmmd"]
    assert scores["references"]["inception"]["codec"] == "png" and "near: pictures 10  fid" in describe_sets(scores)
    kept = sorted(path.name for path in run.glob("*.npz"))
    assert kept == ["references-clip.npz", "references-inception.npz"]
    pictures(tmp_path / "reference/more", rng, 1)
    with pytest.raises(ValueError, match="features of another reference: id_list_sha256"):
        References(options, run, "cpu")


def test_what_is_missing_is_said_early(tmp_path: Path, rng: np.random.Generator) -> None:
    with pytest.raises(ValueError, match=r"unknown set metrics \['is'\]; known: fid, kid, cmmd"):
        SetOptions(["is"])
    with pytest.raises(ValueError, match="set_metrics.reference=<folder"):
        SetOptions(["fid"])
    with pytest.raises(FileNotFoundError, match="no pictures.*nowhere"):
        References(SetOptions(["fid"], str(tmp_path / "nowhere")), tmp_path, "cpu")
    paths = pictures(tmp_path / "reference", rng, 4)
    assert pictures_in(tmp_path) == paths
    with pytest.raises(FileNotFoundError, match="/nowhere/clip"):
        References(SetOptions(["cmmd"], str(tmp_path / "reference"), clip="/nowhere/clip"), tmp_path, "cpu")
    pytest.importorskip("torch_fidelity")
    options = SetOptions(["fid"], str(tmp_path / "reference"), inception="/nowhere/inception.pth")
    with pytest.raises(FileNotFoundError, match="get the network and pass set_metrics.inception=<its file>"):
        References(options, tmp_path, "cpu")


def test_kept_features_are_of_the_network_that_is_asked_for_and_is_there(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch_fidelity")
    monkeypatch.setattr(sets, "inception_features", colours)
    reference, inception, clip = (tmp_path / name for name in ("reference", "inception.pth", "clip"))
    pictures(reference, rng, 4)
    torch.save({"weight": torch.zeros(2)}, inception)
    shutil.copytree(CLIP, clip)
    asked = [SetOptions([name], str(reference), inception=str(inception), clip=str(clip)) for name in ("fid", "cmmd")]
    first = [References(options, tmp_path, "cpu").fingerprints for options in asked]
    assert [References(options, tmp_path, "cpu").fingerprints for options in asked] == first  # kept
    torch.save({"weight": torch.ones(2)}, inception)  # the same names, other networks
    (weights,) = clip.glob("*.safetensors")
    tensors = load_file(weights)
    save_file({name: tensor + 0.01 if tensor.is_floating_point() else tensor for name, tensor in tensors.items()},
              weights, {"format": "pt"})  # fmt: skip
    for options in asked:
        with pytest.raises(ValueError, match="features of another reference: extractor '.*, weights [0-9a-f]{12}'"):
            References(options, tmp_path, "cpu")
    inception.unlink()
    shutil.rmtree(clip)
    for options, setting in zip(asked, ("inception=<its file>", "clip=<its folder>"), strict=True):
        with pytest.raises(FileNotFoundError, match=f"get the network and pass set_metrics.{setting}"):
            References(options, tmp_path, "cpu")
    # A network that is fetched has no hash in the fingerprint, and is missed as well though its features are kept.
    fetched = SetOptions(["fid"], str(reference))
    monkeypatch.setattr(sets, "inception_weights", lambda weights: weights)
    assert "weights" not in References(fetched, tmp_path / "other", "cpu").fingerprints["inception"].extractor
    monkeypatch.undo()
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", offline)
    with pytest.raises(FileNotFoundError, match="inception features for fid: OSError: offline"):
        References(fetched, tmp_path / "other", "cpu")


def offline(*_: Any, **__: Any) -> None:
    raise OSError("offline")


def test_pictures_have_to_be_there(tmp_path: Path) -> None:
    (row,) = rows_of([tmp_path / "x.png"], "m", tmp_path)
    row.image = ""
    with pytest.raises(ValueError, match="1 rows have none .save_images=true"):
        set_scores([row], tmp_path, References(SetOptions(), tmp_path, "cpu"))
