"""Set metrics of an evaluation: FID, KID and CMMD of each method's pictures against a folder of references."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from addiff_env.env.baseline_cache import weights_fingerprint
from addiff_env.evaluation.metrics.set_distances import (
    Fingerprint,
    clip_features,
    cmmd,
    codec_of,
    file_list_hash,
    frechet_distance,
    inception_features,
    inception_name,
    inception_weights,
    kernel_distance,
    reference_features,
)
from addiff_env.evaluation.statistics.summary import NOT_AVAILABLE
from addiff_env.loading.paths import looked_at, resolve_model
from addiff_env.loading.weights import reason
from addiff_env.perception.encoders import load_clip
from addiff_env.types import ResultRow

SET_METRICS = ("fid", "kid", "cmmd")
LEAST = {"fid": 2, "kid": 4, "cmmd": 1}  # pictures that each needs of a method, and as references
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
Extract = Callable[[Sequence[Path]], np.ndarray]


@dataclass(frozen=True)
class SetOptions:
    """Which set metrics, and against what."""

    names: Sequence[str] = ()  # of SET_METRICS
    reference: str | None = None  # folder of pictures, searched with its subfolders
    size: int | None = None  # side in pixels to which FID and KID prepare all pictures first; None: as they are
    resizer: str = "bicubic"  # of that preparation
    inception: str | None = None  # file of FID's network; None: torch-fidelity fetches it
    clip: str = "openai/clip-vit-large-patch14-336"  # of CMMD

    def __post_init__(self) -> None:
        unknown = [name for name in self.names if name not in SET_METRICS]
        if unknown:
            raise ValueError(f"unknown set metrics {unknown}; known: {', '.join(SET_METRICS)}")
        if self.names and not self.reference:
            raise ValueError(f"{', '.join(self.names)} need references: set_metrics.reference=<folder of pictures>")


class References:
    """The features of the references, made or read when this is made, so that what is missing is missed early.

    Args:
        options: what to measure.
        cache: folder in which the features are kept.
        device: where the networks run.

    Raises:
        FileNotFoundError: no such folder, no pictures in it, or the networks' weights are missing; says what to get.
        ImportError: `torch-fidelity` is not installed.
        ValueError: kept features are of other references; fewer references than a metric needs.
    """

    def __init__(self, options: SetOptions, cache: Path, device: str) -> None:
        self.options, self.device = options, device
        self.features: dict[str, np.ndarray] = {}
        self.fingerprints: dict[str, Fingerprint] = {}
        if not options.names:
            return
        paths = pictures_in(Path(resolve_model(str(options.reference))))
        for name in options.names:
            if len(paths) < LEAST[name]:
                raise ValueError(f"{name} needs {LEAST[name]} references, {options.reference!r} holds {len(paths)}")
        for kind in dict.fromkeys(_kind(name) for name in options.names):
            path, extract = cache / f"references-{kind}.npz", self._extract(kind)
            try:
                network = self._network(kind)  # kept features do not need it, the methods' pictures will
                self.fingerprints[kind] = self._fingerprint(kind, paths)
                self.features[kind] = reference_features(path, self.fingerprints[kind], partial(extract, paths))
                del network  # until here, so that it is loaded once
            except OSError as error:  # offline, not cached
                raise FileNotFoundError(
                    f"{kind} features for {', '.join(options.names)}: {reason(error)}; get the network and pass "
                    f"set_metrics.{kind}=<its {'file' if kind == 'inception' else 'folder'}>"
                ) from error

    def _fingerprint(self, kind: str, paths: Sequence[Path]) -> Fingerprint:
        o, of_inception = self.options, kind == "inception"
        size = o.size if of_inception else None
        extractor = inception_name(self._inception) if of_inception else _clip_name(o.clip)
        return Fingerprint(file_list_hash(paths), extractor, size, o.resizer if size else "none", codec_of(paths))

    @property
    def _inception(self) -> Path | None:
        return Path(resolve_model(self.options.inception)) if self.options.inception else None

    def _network(self, kind: str) -> Any:
        """What features are made with, from its file or folder; raises OSError where it is missing."""
        return (
            load_clip(resolve_model(self.options.clip), self.device)
            if kind == "clip"
            else inception_weights(self._inception)
        )

    def _extract(self, kind: str) -> Extract:
        o, weights = self.options, self._inception
        if kind == "clip":
            return lambda paths: clip_features(paths, o.clip, self.device)
        return lambda paths: inception_features(paths, weights, self.device, size=o.size, resizer=o.resizer)

    def measure(self, paths: Sequence[Path]) -> dict[str, float]:
        """The set metrics of some pictures; KID with its standard deviation over subsets.

        Those are absent that need more pictures than there are, see `lacking`.
        """
        names = [name for name in self.options.names if len(paths) >= LEAST[name]]
        own = {kind: self._extract(kind)(paths) for kind in dict.fromkeys(map(_kind, names))}
        found: dict[str, float] = {}
        for name in names:
            pair = own[_kind(name)], self.features[_kind(name)]
            if name == "kid":
                found["kid"], found["kid_std"] = kernel_distance(*pair)
            else:
                found[name] = (frechet_distance if name == "fid" else cmmd)(*pair)
        return found


def lacking(names: Sequence[str], number: int) -> list[str]:
    """Why set metrics of ``number`` pictures are not available, in words."""
    return [f"{name} needs {LEAST[name]} pictures, got {number}" for name in names if number < LEAST[name]]


def _kind(name: str) -> str:
    return "clip" if name == "cmmd" else "inception"


def _clip_name(model: str) -> str:
    """What a `Fingerprint` says of the features of `clip_features`, for local weights with their fingerprint."""
    weights = weights_fingerprint(model)
    return f"CLIP {model}, weights {weights}" if weights else f"CLIP {model}"


def pictures_in(folder: Path) -> list[Path]:
    """The pictures of a folder and its subfolders, by name.

    Raises:
        FileNotFoundError: there is none.
    """
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES and path.is_file())
    if not found:
        raise FileNotFoundError(f"no pictures ({', '.join(PICTURES)}) in the reference folder {looked_at(folder)}")
    return found


def set_scores(rows: Sequence[ResultRow], folder: Path, references: References) -> dict[str, Any]:
    """The set metrics of every method, with the fingerprints of what they were measured against.

    Args:
        rows: with the paths of their pictures, relative to ``folder``.
        folder: of the run.
        references: what they are compared with.

    Raises:
        ValueError: rows whose pictures were not kept.
    """
    lost = [row for row in rows if not row.image]
    if lost:
        raise ValueError(f"set metrics need the pictures: {len(lost)} rows have none (save_images=true keeps them)")
    methods: dict[str, Any] = {}
    notes: list[str] = []
    for method in dict.fromkeys(row.method for row in rows):
        paths = [folder / row.image for row in rows if row.method == method]
        methods[method] = {"pictures": len(paths), **references.measure(paths)}
        notes += [f"{method}: {why}" for why in lacking(references.options.names, len(paths))]
    fingerprints = {kind: asdict(fingerprint) for kind, fingerprint in references.fingerprints.items()}
    return {"references": fingerprints, "methods": methods, "notes": notes}


def describe_sets(scores: Mapping[str, Any]) -> str:
    """One line per method, and one per metric that is not available."""
    lines = []
    for method, values in scores["methods"].items():
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        lines.append(f"{method}: {numbers}")
    lines += [f"{NOT_AVAILABLE}: {note}" for note in scores.get("notes", ())]
    return "\n".join(lines)
