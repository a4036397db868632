"""Set metrics: CMMD against brute force, FID and KID against theory and the library's own command."""

import json
import math
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import linalg

from addiff_env.evaluation.metrics.set_distances import (
    Fingerprint,
    clip_features,
    cmmd,
    codec_of,
    extract,
    file_list_hash,
    frechet_distance,
    inception_features,
    kernel_distance,
    prepare,
    reference_features,
)

fidelity = pytest.importorskip("torch_fidelity")
STAMP = Fingerprint("abc", "network/layer", 64, "bicubic", "png")


def pictures(folder: Path, rng, number=12, shift=0, size=(20, 20)) -> list[Path]:
    folder.mkdir()
    paths = [folder / f"{k:03d}.png" for k in range(number)]
    for path in paths:
        Image.fromarray(np.clip(rng.integers(0, 200, (*size, 3)) + shift, 0, 255).astype(np.uint8)).save(path)
    return paths


# --------------------------------------------------------------------------- CMMD


def brute_force_cmmd(x, y):
    """The definition, one pair at a time."""

    def mean_kernel(a, b):
        units = [[v / math.sqrt(sum(v * v)) for v in group] for group in (a, b)]
        values = [math.exp(-sum((u - v) ** 2) / (2 * 10**2)) for u in units[0] for v in units[1]]
        return sum(values) / len(values)

    return 1000 * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))


def test_cmmd_is_its_definition(rng, monkeypatch):
    x, y = rng.normal(size=(9, 5)), rng.normal(1, 1, size=(14, 5))
    expected = brute_force_cmmd(x, y)
    assert expected > 1
    assert cmmd(x, y) == pytest.approx(expected, rel=1e-9)
    assert cmmd(7 * x, y) == pytest.approx(expected, rel=1e-9)  # only directions count
    monkeypatch.setattr("addiff_env.evaluation.metrics.set_distances._CHUNK", 4)
    assert cmmd(x, y) == pytest.approx(expected, rel=1e-9)


def test_cmmd_of_a_set_with_itself_is_zero_and_grows_with_the_shift(rng):
    x = rng.normal(size=(60, 8))
    assert cmmd(x, x) == pytest.approx(0, abs=1e-9)
    shifted = [cmmd(x, x + shift * np.eye(8)[0]) for shift in (0.5, 1, 2)]
    assert 0 < shifted[0] < shifted[1] < shifted[2]


def test_cmmd_refuses_what_has_no_direction(rng):
    x = rng.normal(size=(4, 3))
    for bad in (np.zeros((4, 3)), np.full((4, 3), np.nan)):
        with pytest.raises(ValueError, match="finite and none of them zero"):
            cmmd(x, bad)
    with pytest.raises(ValueError, match="3 and 5 channels"):
        cmmd(x, np.ones((4, 5)))
    with pytest.raises(ValueError, match=r"\(N, C\), got \(3,\)"):
        cmmd(x, np.ones(3))


def test_clip_features_come_from_files_of_any_size(tmp_path, rng, tiny_kwargs):
    folder = tiny_kwargs.get("clip") or str(Path(__file__).parents[3] / "addiff_env/tiny/weights/clip")
    paths = [*pictures(tmp_path / "a", rng, 2), *pictures(tmp_path / "b", rng, 1, size=(64, 48))]
    features = clip_features(paths, folder, batch_size=2)
    assert features.shape[0] == 3 and np.linalg.norm(features, axis=1) == pytest.approx([1, 1, 1], abs=1e-5)
    np.testing.assert_allclose(clip_features(paths[1:], folder), features[1:], atol=1e-5)
    with pytest.raises(ValueError, match="no pictures"):
        clip_features([], folder)


# --------------------------------------------------------------------------- FID and KID


def test_fid_is_the_distance_of_gaussians(rng):
    x, y = rng.normal(size=(400, 6)), rng.normal(0.5, 2, size=(300, 6))
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    gap = x.mean(0) - y.mean(0)
    expected = gap @ gap + np.trace(a + b - 2 * linalg.sqrtm(a @ b).real)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="at least two pictures"):
        frechet_distance(x[:1], y)


def test_kid_is_the_unbiased_polynomial_discrepancy(rng):
    x, y = rng.normal(size=(60, 4)), rng.normal(1, 1, size=(60, 4))

    def kernel(a, b):
        return (a @ b.T / 4 + 1) ** 3

    xx, yy = kernel(x, x), kernel(y, y)
    expected = (xx.sum() - np.trace(xx)) / (60 * 59) + (yy.sum() - np.trace(yy)) / (60 * 59) - 2 * kernel(x, y).mean()
    mean, spread = kernel_distance(x, y, subsets=300)
    assert mean == pytest.approx(expected, rel=0.1) and spread > 0
    same = kernel_distance(x, rng.normal(size=(80, 4)), subsets=300)
    assert abs(same[0]) < 0.1 * mean
    assert kernel_distance(x, y, seed=3) == kernel_distance(x, y, seed=3) != kernel_distance(x, y, seed=4)
    with pytest.raises(ValueError, match="four pictures in each set, got 3 and 60"):
        kernel_distance(x[:3], y)


@pytest.fixture(scope="module")
def small_extractor():
    """A registered extractor of the library: channel means of a 4 x 4 grid."""
    import torch
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

    class Grid(FeatureExtractorBase):
        def __init__(self, name, features_list, **_):
            super().__init__(name, features_list)

        @staticmethod
        def get_provided_features_list():
            return ("grid",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "grid"

        @staticmethod
        def can_be_compiled():
            return False

        @staticmethod
        def get_dummy_input_for_compile():
            raise NotImplementedError

        def forward(self, x):
            return (torch.nn.functional.adaptive_avg_pool2d(x.double(), 2).flatten(1),)

    fidelity.register_feature_extractor("grid", Grid)
    return Grid("grid", ["grid"])


def test_the_library_says_the_same_of_the_same_folders(tmp_path, rng, small_extractor):
    one, other = pictures(tmp_path / "a", rng, 30), pictures(tmp_path / "b", rng, 24, shift=30)
    x, y = extract(small_extractor, one, batch_size=7), extract(small_extractor, other)
    theirs = fidelity.calculate_metrics(
        input1=str(tmp_path / "a"), input2=str(tmp_path / "b"), feature_extractor="grid", fid=True, kid=True,
        kid_subset_size=12, kid_subsets=20, rng_seed=5, cuda=False, cache=False, save_cpu_ram=True, verbose=False,
    )  # fmt: skip
    assert frechet_distance(x, y) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-5)
    mean, spread = kernel_distance(x, y, subsets=20, seed=5)
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-5)
    assert spread == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-5)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6 * np.trace(np.cov(x, rowvar=False)))


def test_pictures_of_several_sizes_need_a_size(tmp_path, rng, small_extractor):
    paths = [*pictures(tmp_path / "a", rng, 3), *pictures(tmp_path / "b", rng, 2, size=(30, 20))]
    with pytest.raises(ValueError, match="20x20 and 20x30 .*set_metrics.size=<pixels>"):
        extract(None, paths, batch_size=2)  # before any network is touched
    assert len(extract(small_extractor, paths, batch_size=2, size=16)) == 5


@pytest.mark.slow
def test_the_librarys_command_says_the_same_with_an_inception_network(tmp_path, rng, monkeypatch):
    import torch
    from torch_fidelity import feature_extractor_inceptionv3 as module

    with monkeypatch.context() as patch:  # the published network is not here: a random one
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    one, other = pictures(tmp_path / "a", rng, 6), pictures(tmp_path / "b", rng, 6, shift=50)
    x, y = (inception_features(paths, tmp_path / "weights.pth") for paths in (one, other))
    command = [str(Path(sys.executable).parent / "fidelity"), "--fid", "--input1", str(tmp_path / "a"), "--input2"]
    command += [str(tmp_path / "b"), "--cpu", "--json", "--silent", "--no-cache", "--save-cpu-ram"]
    command += ["--feature-extractor-weights-path", str(tmp_path / "weights.pth")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    expected = json.loads(result.stdout)["frechet_inception_distance"]
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-3)


class Harmful:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_a_weights_file_that_is_more_than_tensors_is_refused(tmp_path, rng, capsys):
    import torch

    torch.save({"weight": Harmful()}, tmp_path / "weights.pth")
    with pytest.raises(pickle.UnpicklingError):
        inception_features(pictures(tmp_path / "a", rng, 2), tmp_path / "weights.pth")
    assert "must not run" not in capsys.readouterr().out


# --------------------------------------------------------------------------- preparation and references


def test_prepare_crops_the_middle_and_resizes():
    picture = Image.new("RGB", (40, 20), (255, 0, 0))
    picture.paste((0, 0, 255), (10, 0, 30, 20))
    small = prepare(picture, 8)
    assert small.size == (8, 8) and (np.asarray(small) == (0, 0, 255)).all()
    assert prepare(picture.convert("L"), 20).mode == "RGB"
    with pytest.raises(ValueError, match="got 8, 'nearest'"):
        prepare(picture, 8, "nearest")


def test_references_are_kept_and_stamped(tmp_path, rng):
    path, calls = tmp_path / "kept" / "coco.npz", []

    def compute():
        calls.append(1)
        return rng.normal(size=(5, 3))

    first = reference_features(path, STAMP, compute)
    again = reference_features(path, STAMP, compute)
    np.testing.assert_array_equal(first, again)
    assert len(calls) == 1 and [p.name for p in path.parent.iterdir()] == ["coco.npz"]
    other = replace(STAMP, resizer="lanczos", id_list_sha256="xyz")
    with pytest.raises(
        ValueError, match="id_list_sha256 'abc' instead of 'xyz', resizer 'bicubic' instead of 'lanczos'"
    ):
        reference_features(path, other, compute)


def test_a_pickle_in_a_reference_is_refused(tmp_path):
    np.savez(tmp_path / "bad.npz", features=np.array([Harmful()], object), stamp=np.array(json.dumps({})))
    with pytest.raises(ValueError, match="pickle|another reference"):
        reference_features(tmp_path / "bad.npz", STAMP, lambda: np.ones((2, 2)))


def test_codecs_and_lists_are_told_apart(tmp_path, rng):
    paths = pictures(tmp_path / "a", rng, 3)
    assert codec_of(paths) == "png" and codec_of([Path("a.JPG"), Path("b.jpeg")]) == "jpeg"
    with pytest.raises(ValueError, match=r"\['jpeg', 'png'\]"):
        codec_of([Path("a.jpg"), Path("b.png")])
    with pytest.raises(ValueError, match="none"):
        codec_of([])
    assert file_list_hash(paths) == file_list_hash(paths) != file_list_hash(paths[::-1])
