"""Metrics of sets of pictures: CMMD, FID and KID.

FID and KID come from `torch-fidelity` (extra ``metrics``): it reproduces the original Inception network with its own
resizing, works from folders as well as from features, and has a command that anybody can check us against. Its cache is
not used, as it unpickles; reference features are kept here in a plain ``.npz`` that says how they were made, and are
refused where anything about that differs.

Both need thousands of pictures; CMMD is steadier for small sets.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from PIL import Image, UnidentifiedImageError

from addiff_env.loading.weights import reason
from addiff_env.storage.files import replacing
from addiff_env.storage.pictures import open_picture, read_picture

RESIZERS = {"bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS, "box": Image.Resampling.BOX}
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0  # Jayasumana et al. 2024, section 4
_CHUNK = 2048  # rows of a kernel matrix held at a time
INCEPTION, INCEPTION_LAYER = "inception-v3-compat", "2048"


@dataclass(frozen=True)
class Fingerprint:
    """Everything that the features of a set of pictures depend on."""

    id_list_sha256: str  # which pictures, see `benchmarks.id_list_hash` or `file_list_hash`
    extractor: str  # network, layer and local weights, e.g. "inception-v3-compat/2048 of torch-fidelity 0.4.0"
    size: int | None  # side in pixels after `prepare`; None: as the files are
    resizer: str  # of `prepare`, one of RESIZERS, or "none"; the network's own resizing belongs to the extractor
    codec: str  # of the files that were read, e.g. "png" or "jpeg"


def file_list_hash(paths: Sequence[Path]) -> str:
    """SHA-256 of the files' contents in order: the id list of a folder of pictures."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def codec_of(paths: Sequence[Path]) -> str:
    """The one codec of some files, by their names.

    Raises:
        ValueError: none, or several: a compressed half shifts every set metric.
    """
    suffixes = {path.suffix.lower().lstrip(".").replace("jpg", "jpeg") for path in paths}
    if len(suffixes) != 1:
        raise ValueError(f"expected pictures of one codec, got {sorted(suffixes) or 'none'}")
    return suffixes.pop()


def prepare(picture: Image.Image, size: int, resizer: str = "bicubic") -> Image.Image:
    """Crop the central square and resize it to ``size`` x ``size``, antialiased.

    Raises:
        ValueError: an unknown resizer or a size below 1.
    """
    if resizer not in RESIZERS or size < 1:
        raise ValueError(f"expected a size of at least 1 and a resizer of {sorted(RESIZERS)}, got {size}, {resizer!r}")
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.convert("RGB").crop((left, top, left + side, top + side))
    return square if side == size else square.resize((size, size), RESIZERS[resizer])


# --------------------------------------------------------------------------- CMMD


def cmmd(x: np.ndarray, y: np.ndarray) -> float:
    """CLIP maximum mean discrepancy of two sets of CLIP image features (Jayasumana et al. 2024).

    The squared MMD of unit vectors under a Gaussian kernel of width 10, times 1000; the estimator is the biased one
    (means over all pairs, each feature with itself included), so a set's distance to itself is exactly 0. Features are
    those of CLIP ViT-L/14 at 336 pixels where numbers are to be compared with published ones.

    Args:
        x: features (N, C), of any length.
        y: features (M, C).

    Raises:
        ValueError: other shapes, or a feature that is zero or not finite.
    """
    x, y = _unit(x), _unit(y)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"features have {x.shape[1]} and {y.shape[1]} channels")
    return CMMD_SCALE * (_mean_kernel(x, x) + _mean_kernel(y, y) - 2 * _mean_kernel(x, y))


def _unit(features: np.ndarray) -> np.ndarray:
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or not len(features):
        raise ValueError(f"expected features (N, C), got {features.shape}")
    length = np.linalg.norm(features, axis=1, keepdims=True)
    if not np.isfinite(features).all() or not length.all():
        raise ValueError("features must be finite and none of them zero")
    return features / length


def _mean_kernel(x: np.ndarray, y: np.ndarray) -> float:
    """Mean of the Gaussian kernel over all pairs of unit vectors, whose squared distance is 2 - 2 cos."""
    total = 0.0
    for start in range(0, len(x), _CHUNK):
        total += np.exp((x[start : start + _CHUNK] @ y.T - 1) / CMMD_SIGMA**2).sum()
    return total / (len(x) * len(y))


def clip_features(
    paths: Sequence[Path], model: str = "openai/clip-vit-large-patch14-336", device: str = "cpu", batch_size: int = 64
) -> np.ndarray:
    """CLIP image features (N, C), unit vectors, of picture files; resized to the network's side, bicubic, antialiased.

    Raises:
        ValueError: no files; FileNotFoundError: no such model.
    """
    import torch

    from addiff_env.loading.paths import resolve_model
    from addiff_env.perception.encoders import load_clip

    _refuse_empty(paths)
    encoder = load_clip(resolve_model(model), device)
    features = []
    for start in range(0, len(paths), batch_size):
        loaded = [encoder.image_features(_tensor(path).to(device)) for path in paths[start : start + batch_size]]
        features.append(torch.cat(loaded).float().cpu().numpy())
    return np.concatenate(features)


def _tensor(path: Path) -> Any:
    """A picture (1, 3, H, W) in [0, 1]; files may differ in size."""
    import torch

    return torch.from_numpy(read_picture(path).copy()).permute(2, 0, 1)[None].float() / 255


def _refuse_empty(paths: Sequence[Path]) -> None:
    if not paths:
        raise ValueError("no pictures")


# --------------------------------------------------------------------------- FID and KID


def inception_name(weights: Path | None = None) -> str:
    """What a `Fingerprint` says of the features of `inception_features`, for a file of weights with its hash.

    Raises:
        FileNotFoundError: no such file.
    """
    name = f"{INCEPTION}/{INCEPTION_LAYER} of torch-fidelity {metadata.version('torch-fidelity')}"
    return name if weights is None else f"{name}, weights {file_list_hash([weights])[:12]}"


def inception_features(
    paths: Sequence[Path],
    weights: Path | None = None,
    device: str = "cpu",
    batch_size: int = 64,
    size: int | None = None,
    resizer: str = "bicubic",
) -> np.ndarray:
    """Features (N, 2048) of FID's Inception network for picture files.

    Args:
        paths: of the pictures; of one size, or give ``size``.
        weights: the network's file; by default torch-fidelity fetches it.
        device: ``cpu`` or a CUDA device.
        batch_size: pictures at a time.
        size: side to `prepare` them to first; None leaves them as they are.
        resizer: of `prepare`.

    Raises:
        ValueError: no files, or files of several sizes without ``size``.
        ImportError: `torch-fidelity` is not installed.
        pickle.UnpicklingError: a weights file that holds more than tensors.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    from addiff_env.loading.isolation import exclusive

    _refuse_empty(paths)
    path = str(inception_weights(weights))
    with exclusive():
        network = FeatureExtractorInceptionV3(INCEPTION, [INCEPTION_LAYER], feature_extractor_weights_path=path)
    return extract(network, paths, device, batch_size, size, resizer)


def inception_weights(weights: Path | None) -> Path:
    """The network's file, fetched if None, once it is known to hold nothing but tensors: the library unpickles it.

    Raises:
        OSError: there is none, or it cannot be fetched; pickle.UnpicklingError: it holds more than tensors.
        ValueError: it is damaged.
    """
    import torch

    if weights is not None:
        try:
            torch.load(weights, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            text = f"{weights} holds more than tensors, or is damaged: {reason(error)}"
            raise pickle.UnpicklingError(text) from error
        except (RuntimeError, EOFError) as error:
            raise ValueError(f"{weights} is damaged: {reason(error)}") from error
        return weights
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    torch.hub.load_state_dict_from_url(URL_INCEPTION_V3, map_location="cpu", check_hash=True, weights_only=True)
    return Path(torch.hub.get_dir(), "checkpoints", URL_INCEPTION_V3.rsplit("/", 1)[1])


def extract(
    network: Any,
    paths: Sequence[Path],
    device: str = "cpu",
    batch_size: int = 64,
    size: int | None = None,
    resizer: str = "bicubic",
) -> np.ndarray:
    """Features (N, C) of picture files by any of torch-fidelity's extractors that gives one kind of features.

    Raises:
        ValueError: no files, or files of several sizes without a ``size`` that they are prepared to.
    """
    import torch

    from addiff_env.loading.isolation import isolated

    _refuse_empty(paths)
    if size is None:
        _refuse_sizes(paths)
    network = network.eval().requires_grad_(False).to(device)
    found = []
    for start in range(0, len(paths), batch_size):
        batch = [_bytes(path, size, resizer) for path in paths[start : start + batch_size]]
        with isolated():
            (features,) = network(torch.from_numpy(np.stack(batch)).to(device))
            found.append(features.float().cpu().numpy())
    return np.concatenate(found)


def _refuse_sizes(paths: Sequence[Path]) -> None:
    """Sizes are read from the files' heads, so that a folder is refused before any of it has been measured."""
    first: tuple[int, int] | None = None
    for path in paths:
        try:
            with Image.open(path) as picture:
                size = picture.size
        except UnidentifiedImageError as error:  # an OSError, which elsewhere means that a network is missing
            raise ValueError(f"{path} is no readable picture: {error}") from error
        first = first or size
        if size != first:
            sizes = " and ".join("{}x{}".format(*shown) for shown in (first, size))
            raise ValueError(
                f"FID and KID need pictures of one size, got {sizes} ({paths[0]} and {path}); "
                "set_metrics.size=<pixels> crops and resizes all of them first"
            )


def _bytes(path: Path, size: int | None, resizer: str) -> np.ndarray:
    """A picture, uint8 (3, H, W), as torch-fidelity takes it."""
    opened = open_picture(path)
    picture = opened.convert("RGB") if size is None else prepare(opened, size, resizer)
    return np.asarray(picture).transpose(2, 0, 1).copy()


def frechet_distance(x: np.ndarray, y: np.ndarray) -> float:
    """FID of two sets of features (N, C) and (M, C) (Heusel et al. 2017).

    Raises:
        ValueError: fewer than two pictures in a set.
    """
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    one, other = (fid_features_to_statistics(tensor) for tensor in _pair(x, y))
    return float(fid_statistics_to_metric(one, other, verbose=False)[KEY_METRIC_FID])


def kernel_distance(
    x: np.ndarray, y: np.ndarray, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """KID of two sets of features: mean and standard deviation over random subsets (Binkowski et al. 2018).

    Subsets have ``subset_size`` pictures, or half of the smaller set where that is less.

    Raises:
        ValueError: fewer than four pictures in a set.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    smaller = min(len(x), len(y))
    if smaller < 4:
        raise ValueError(f"KID needs four pictures in each set, got {len(x)} and {len(y)}")
    size = min(subset_size, smaller // 2)
    options = {"kid_subsets": subsets, "kid_subset_size": size, "rng_seed": seed, "verbose": False}
    found = kid_features_to_metric(*_pair(x, y), **options)
    return float(found[KEY_METRIC_KID_MEAN]), float(found[KEY_METRIC_KID_STD])


def _pair(x: np.ndarray, y: np.ndarray) -> list[Any]:
    import torch

    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(f"expected features (N, C) and (M, C) of at least two pictures, got {x.shape} and {y.shape}")
    return [torch.from_numpy(np.asarray(features, np.float64)) for features in (x, y)]


# --------------------------------------------------------------------------- reference features


def reference_features(path: Path, fingerprint: Fingerprint, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """Features of a reference set from its file, made and kept there if absent.

    Raises:
        ValueError: the file's fingerprint is another one; says what differs.
    """
    if path.exists():
        return _load_features(path, fingerprint)
    features = np.asarray(compute(), np.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, partial.open("wb") as file:  # shards may measure it at the same time
        np.savez(file, features=features, stamp=np.array(json.dumps(asdict(fingerprint))))
    return features


def _load_features(path: Path, fingerprint: Fingerprint) -> np.ndarray:
    try:
        with np.load(path, allow_pickle=False) as kept:
            found, features = json.loads(str(kept["stamp"])), kept["features"]
    except (ValueError, KeyError, EOFError, BadZipFile) as error:
        raise ValueError(f"{path} holds no features of references ({error}); delete it to make them again") from error
    wanted = asdict(fingerprint)
    other = [f"{key} {found.get(key)!r} instead of {wanted[key]!r}" for key in wanted if found.get(key) != wanted[key]]
    if other:
        raise ValueError(f"{path} holds features of another reference: {', '.join(other)}; delete it or name another")
    return features
