"""The rules that a run's verdicts were reached by: each score's margins, and what the run folder says of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from addiff_env.evaluation.files import RunFolder
from addiff_env.evaluation.statistics.decision import Rules
from addiff_env.storage.files import read_json, read_yaml

# Quality lost that still counts as equal, and the smallest gain worth calling one; in the metric's own unit.
MARGINS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("clip_score", "clipscore", "non_spatial", "hpsv2.1"), (0.002, 0.001)),
    **dict.fromkeys(("reward_score", "imagereward", "aesthetic", "pickscore"), (0.05, 0.025)),
}
SHARE = (0.02, 0.01)  # the same of scores in [0, 1] that are shares of something satisfied


def margins_of(metric: str) -> dict[str, float]:
    """`Rules`' margins of a score."""
    margin, worthwhile = MARGINS.get(metric, SHARE)
    return {"margin": margin, "worthwhile": worthwhile}


def read_rules(folder: Path, metric: str) -> Rules:
    """The rules of a finished run: as ``verdicts.json`` states them, else those of ``config.yaml`` over the defaults.

    Args:
        folder: of the run.
        metric: the score that its verdicts speak of.

    Raises:
        ValueError: rules that make no sense.
    """
    run = RunFolder(folder)
    return rules_of(metric, _stated(run.verdicts) or _configured(run.config))


def configured_rules(folder: Path, metric: str) -> Rules:
    """The rules that a run's ``config.yaml`` asks for, over the defaults; raises as `read_rules`."""
    return rules_of(metric, _configured(RunFolder(folder).config))


def rules_of(metric: str, stated: Mapping[str, Any]) -> Rules:
    """A score's own margins and the default levels, unless ``stated`` names others.

    Raises:
        ValueError: a rule that there is not, or rules that make no sense.
    """
    known = [f.name for f in fields(Rules)]
    if unknown := sorted(set(stated) - set(known)):
        raise ValueError(f"unknown rules {unknown}; known: {', '.join(known)}")
    return Rules(**{"metric": metric, **margins_of(metric), **stated})


def _stated(path: Path) -> dict[str, Any]:
    found = read_json(path, object) if path.exists() else []
    return found.get("rules") or {} if isinstance(found, dict) else {}


def _configured(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    found = OmegaConf.to_container(read_yaml(path))
    return found.get("rules") or {} if isinstance(found, dict) else {}
