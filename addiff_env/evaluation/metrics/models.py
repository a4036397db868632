"""Which models made a score: tables that show it say so, since with others it would not be the same measurement."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from omegaconf import OmegaConf

from addiff_env.evaluation.files import RunFolder
from addiff_env.storage.files import read_json, read_yaml, write_whole

OFFICIAL = "_official"  # how the names of scores end that `addiff import` brought in
BY_SCRIPT = "the benchmark's official script"
MODELS = "metric_models"  # in a run's provenance
_T2I = {  # which models a score of T2I-CompBench is made by
    "blip_vqa": ("blip",),
    "spatial": ("detector",),
    "spatial_3d": ("detector", "depth"),
    "numeracy": ("detector",),
    "non_spatial": ("clip",),
    "three_in_one": ("blip", "detector", "clip"),
    "t2i_compbench": ("blip", "detector", "depth", "clip"),
}


def metric_models(settings: Sequence[str]) -> dict[str, str]:
    """By which models the scores of metrics are made, in words, by the scores' names.

    GenEval's, GenEval 2's and T2I-CompBench's, and those of scorers whose setting names a file or model. Names that end
    with ``*`` stand for all that begin so.
    """
    found: dict[str, str] = {}
    for setting in settings:
        name, _, rest = setting.partition(":")
        if name == "geneval":
            found |= _geneval(rest)
        elif name == "geneval2":
            found |= _geneval2(rest)
        elif name in _T2I:
            found |= _t2i(name, rest)
        elif rest:
            found[name] = rest
    return found


def _geneval(rest: str) -> dict[str, str]:
    from addiff_env.evaluation.metrics.geneval import read_models

    detector, colors = read_models(rest)
    return {"geneval": f"detector {detector}, colours by {colors}"}


def _geneval2(rest: str) -> dict[str, str]:
    from addiff_env.evaluation.metrics.geneval2 import MODEL, PREFIX

    return {f"{PREFIX}*": f"vision-language model {rest or MODEL}"}


def _t2i(name: str, rest: str) -> dict[str, str]:
    from addiff_env.evaluation.metrics.t2i_compbench import read_models

    models = read_models(name, rest)
    kinds = {"blip": "BLIP-VQA", "detector": "detector", "depth": "depth", "clip": "CLIP"}
    words = {part: f"{kinds[part]} {model}" for part, model in models.items()}
    columns = _T2I if name == "t2i_compbench" else (name,)
    return {column: ", ".join(words[part] for part in _T2I[column]) for column in columns}


def models_of(score: str, models: Mapping[str, str]) -> str:
    """By which of ``models`` a score was made, in words; empty where that is not known, or no question."""
    if score.endswith(OFFICIAL):
        return BY_SCRIPT
    whole = models.get(score)
    return whole or next(
        (words for name, words in models.items() if name[-1:] == "*" and score.startswith(name[:-1])), ""
    )


def model_notes(scores: Iterable[str], models: Mapping[str, str]) -> list[str]:
    """For each of ``scores`` whose models are known a line that names them."""
    pairs = ((score, models_of(score, models)) for score in dict.fromkeys(scores))
    return [f"{score} by {words}" for score, words in pairs if words]


def keep_imported(folder: Path, scores: Iterable[str]) -> None:
    """Note that ``scores`` were brought in, whatever they are called and whoever made such scores before."""
    path = RunFolder(folder).provenance
    if path.exists():
        models = {**read_metric_models(folder), **dict.fromkeys(scores, BY_SCRIPT)}
        write_whole(path, json.dumps({**read_json(path), MODELS: models}, indent=2) + "\n")


def run_models(folder: Path, settings: Sequence[str]) -> dict[str, str]:
    """The models of a run's metrics by their settings, and what was brought into its folder before."""
    imported = {score: by for score, by in read_metric_models(folder).items() if by == BY_SCRIPT}
    return metric_models(settings) | imported


def read_metric_models(folder: Path) -> dict[str, str]:
    """The models of a finished run's scores; of one by an earlier release those that its configuration names."""
    run = RunFolder(folder)
    kept = read_json(run.provenance).get(MODELS) if run.provenance.exists() else None
    if kept is not None:
        return dict(kept)
    config = OmegaConf.to_container(read_yaml(run.config)) if run.config.exists() else {}
    settings = config.get("metrics") if isinstance(config, dict) else None
    return metric_models([settings] if isinstance(settings, str) else list(settings or ()))
