"""Per-image metrics by name: what an evaluation writes into each row's ``scores``.

| setting | scores | of |
|---|---|---|
| ``checker`` | success (0 or 1), requirements | captions of the embedded world, and no others |
| ``clip_score``, ``reward_score`` | the same | the environment's own CLIP and reward model |
| ``imagereward``, ``hpsv2.1``, ``aesthetic``, ``pickscore``, ``clipscore:<CLIP setting>`` | the same | any prompt |
| ``geneval`` | geneval (0 or 1) | GenEval's prompts, by their metadata |
| ``geneval2`` | soft_tifa_gm, soft_tifa_am, and one of each skill | GenEval 2's prompts, by their questions |
| ``blip_vqa``, ``spatial``, ``spatial_3d``, ``numeracy``, ``non_spatial``, ``three_in_one`` | same | T2I-CompBench |
| ``t2i_compbench`` | t2i_compbench, and the one of the above that is its category's own | T2I-CompBench |

Behind a colon follows what `addiff_env.scorers.load_scorer` takes, or the model of
`addiff_env.evaluation.metrics.geneval` and `addiff_env.evaluation.metrics.t2i_compbench`: ``imagereward:<file>``,
``geneval:<detector>,colors=<CLIP>``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch

from addiff_env.evaluation.benchmarks.items import Item
from addiff_env.evaluation.metrics.base import Metric, Scored, as_tensor, category_means
from addiff_env.evaluation.statistics.rules import MARGINS as MARGINS
from addiff_env.evaluation.statistics.rules import SHARE as SHARE
from addiff_env.evaluation.statistics.rules import margins_of as margins_of
from addiff_env.evaluation.statistics.summary import NO_SCORE, score_value, scores_of
from addiff_env.loading.isolation import isolated
from addiff_env.perception.features import Perception
from addiff_env.perception.scorers import Scorer, load_scorer
from addiff_env.tiny.checker import check_picture
from addiff_env.tiny.prompts import parse_caption
from addiff_env.types import ResultRow

SCORERS = {name: name for name in ("imagereward", "aesthetic", "pickscore", "clipscore")} | {"hpsv2.1": "hps"}
IN_LOOP_METRICS = (
    "clip_score",
    "reward_score",
)  # what policies look at or are paid by: headline where nothing else is


# --------------------------------------------------------------------------- the metrics


class Checker:
    """The embedded world's exact checker: ``success`` (0 or 1) and ``requirements`` (share met)."""

    name = "checker"

    def columns(self, item: Item) -> tuple[str, ...]:
        """Always the same two."""
        return "success", "requirements"

    def score(self, pictures: np.ndarray, items: Sequence[Item]) -> list[Scored]:
        """Verdicts with their reasons."""
        results = [check_picture(picture, item.prompt) for picture, item in zip(pictures, items, strict=True)]
        return [({"success": float(v.satisfied), "requirements": v.score}, v.reason) for v in results]


class ModelScore:
    """One number per picture from a frozen model: ``score`` of pictures (B, 3, H, W) in [0, 1] and prompts."""

    def __init__(
        self, name: str, score: Callable[[torch.Tensor, list[str]], torch.Tensor], device: torch.device | str
    ) -> None:
        self.name, self.device, self._score = name, device, score

    def columns(self, item: Item) -> tuple[str, ...]:
        """Its name."""
        return (self.name,)

    @isolated()
    def score(self, pictures: np.ndarray, items: Sequence[Item]) -> list[Scored]:
        """Scores without words."""
        values = self._score(as_tensor(pictures, self.device), [item.prompt for item in items])
        return [({self.name: value}, "") for value in values.float().tolist()]


def clip_score(perception: Perception) -> Callable[[torch.Tensor, list[str]], torch.Tensor]:
    """The cosine of the environment's own CLIP."""
    clip = perception.clip
    return lambda pictures, prompts: (clip.image_features(pictures) * clip.text_features(prompts)).sum(1)


def reward_score(perception: Perception) -> Callable[[torch.Tensor, list[str]], torch.Tensor]:
    """The environment's own reward model, within its limits, as policies see it."""
    limit, scorer = perception.score_limit, perception.scorer
    return lambda pictures, prompts: scorer.score(pictures, prompts).clamp(-limit, limit)


# --------------------------------------------------------------------------- metrics by name


def known_metrics() -> tuple[str, ...]:
    """Names that `open_metric` takes."""
    from addiff_env.evaluation.metrics.t2i_compbench import T2I_METRICS

    return ("checker", *IN_LOOP_METRICS, *SCORERS, "geneval", "geneval2", *T2I_METRICS)


def default_metrics(items: Sequence[Item]) -> list[str]:
    """What is measured where nothing is said: the checker where it can judge, else HPS v2.1; and what policies see."""
    return ["checker" if is_embedded_world(items) else "hpsv2.1", *IN_LOOP_METRICS]


def is_embedded_world(items: Sequence[Item]) -> bool:
    """Whether every prompt is a caption of the embedded world, so that its checker can judge pictures of it."""
    try:
        for item in items:
            parse_caption(item.prompt)
    except ValueError:
        return False
    return bool(items)


def open_metrics(
    settings: Sequence[str], perception: Perception, items: Sequence[Item], allow_missing: bool = False
) -> tuple[list[Metric], dict[str, str]]:
    """The metrics of ``settings``, and why those are left out whose weights are missing.

    Raises:
        FileNotFoundError, ImportError: weights or a package are missing and that is not allowed; says what to get.
        ValueError: an unknown name (the known ones are listed), one named twice, one that judges none of ``items``,
            or none left.
    """
    metrics: list[Metric] = []
    skipped: dict[str, str] = {}
    for setting in settings:
        try:
            metrics.append(open_metric(setting, perception, items))
        except (FileNotFoundError, ImportError) as error:
            if not allow_missing:
                raise missing(f"metric {setting!r}", error) from error
            skipped[setting] = str(error)
    names = [metric.name for metric in metrics]
    if len(set(names)) < len(names) or not names:
        raise ValueError(f"expected metrics, each once, got {list(settings)}, of which {names or 'none'} can be had")
    return metrics, skipped


def missing(what: str, error: Exception) -> Exception:
    """The same kind of error, saying of what and how to go on without it."""
    kind = ImportError if isinstance(error, ImportError) else FileNotFoundError
    return kind(f"{what}: {error} (allow_missing=true leaves it out)")


def open_metric(setting: str, perception: Perception, items: Sequence[Item]) -> Metric:
    """One metric by its setting; raises as `open_metrics`."""
    name, _, rest = setting.partition(":")
    if name not in known_metrics():
        raise ValueError(f"unknown metric {setting!r}; known: {', '.join(known_metrics())}")
    metric = _open(name, rest, perception, items)
    if not any(metric.columns(item) for item in items):
        raise ValueError(f"metric {setting!r} judges none of the {len(items)} items, e.g. {items[0].prompt!r}")
    return metric


def _open(name: str, rest: str, perception: Perception, items: Sequence[Item]) -> Metric:
    device = str(perception.device)
    if name == "checker":
        if not is_embedded_world(items):
            raise ValueError("metric 'checker' reads the embedded world's pictures only; these prompts are of another")
        return Checker()
    if name in IN_LOOP_METRICS:
        return ModelScore(name, (clip_score if name == "clip_score" else reward_score)(perception), device)
    if name in SCORERS:
        scorer: Scorer = load_scorer(f"{SCORERS[name]}:{rest}" if rest else SCORERS[name], device)
        return ModelScore(name, scorer.score, device)
    if name == "geneval":
        from addiff_env.evaluation.metrics.geneval import open_geneval

        return open_geneval(rest, device)
    if name == "geneval2":
        from addiff_env.evaluation.metrics.geneval2 import open_geneval2

        return open_geneval2(rest, device)
    from addiff_env.evaluation.metrics.t2i_compbench import open_t2i

    return open_t2i(name, rest, device, items)


def primary_score(measured: Sequence[Collection[str]], wanted: str | None = None) -> str:
    """The score that tables and verdicts speak of: the one ``wanted``, else one that no policy looks at, if there is.

    Of those the one that most pictures have is taken, the first named of equals.

    Args:
        measured: names of the scores of every picture (or item), in the metrics' order.
        wanted: its name, or None.

    Raises:
        ValueError: no such score.
    """
    counts = Counter(name for names in measured for name in names)
    if not counts or (wanted is not None and wanted not in counts):
        raise ValueError(f"no score {wanted!r} is measured; measured are: {', '.join(counts) or 'none'}")
    return wanted or max(counts, key=lambda name: (name not in IN_LOOP_METRICS, counts[name]))


def scores_of_all_methods(rows: Sequence[ResultRow]) -> list[list[str]]:
    """Names of every row's scores that each method has, for `primary_score`: rows of before may have further ones.

    Raises:
        ValueError: the methods share no score.
    """
    names: dict[str, set[str]] = {}
    for row in rows:
        names.setdefault(row.method, set()).update(scores_of(row))
    shared = set.intersection(*names.values()) if names else set()
    if names and not shared:
        had = "; ".join(f"{method}: {', '.join(sorted(own)) or 'none'}" for method, own in names.items())
        raise ValueError(f"the methods have no score in common ({had})")
    return [[name for name in scores_of(row) if name in shared] for row in rows]


def reported_score(rows: Sequence[ResultRow], wanted: str | None = None) -> str:
    """The score that the report on ``rows`` leads with: ``wanted``, else the `primary_score` of those all methods have.

    Where the methods have none in common it is that of most pictures, and where nothing was measured `NO_SCORE`.
    """
    if wanted is not None:
        return wanted
    try:
        return primary_score(scores_of_all_methods(rows))
    except ValueError:
        measured = [list(scores_of(row)) for row in rows]
        return primary_score(measured) if any(measured) else NO_SCORE


def protocol_scores(rows: Sequence[ResultRow], items: Sequence[Item] = ()) -> dict[str, dict[str, dict[str, float]]]:
    """What benchmarks with a protocol of their own report: per metric, method and category (or tag) the mean score.

    GenEval's has its headline number besides, under ``overall``: the mean over tags. GenEval 2's, for which ``items``
    with their metadata are needed, has skills and numbers of atoms, see `geneval2.summarize`.
    """
    from addiff_env.evaluation.metrics.geneval import summarize

    found: dict[str, dict[str, dict[str, float]]] = {}
    for metric in ("geneval", "t2i_compbench"):
        having = [row for row in rows if score_value(row, metric) is not None]
        for method in dict.fromkeys(row.method for row in having):
            pairs = [(row.category, row.scores[metric]) for row in having if row.method == method]
            found.setdefault(metric, {})[method] = (summarize if metric == "geneval" else category_means)(pairs)
    return found | _soft_tifa(rows, items)


def _soft_tifa(rows: Sequence[ResultRow], items: Sequence[Item]) -> dict[str, dict[str, dict[str, float]]]:
    """GenEval 2's own numbers of every method."""
    from addiff_env.evaluation.metrics.geneval2 import AM, GM, is_geneval2, summarize

    skills = {(item.prompt, item.seed): item.metadata["skills"] for item in items if is_geneval2(item)}
    methods: dict[str, dict[str, float]] = {}
    for method in dict.fromkeys(row.method for row in rows):
        own = [row for row in rows if row.method == method and (row.prompt, row.seed) in skills]
        own = [row for row in own if {GM, AM} <= set(scores_of(row))]
        if own:
            asked = [skills[row.prompt, row.seed] for row in own]
            methods[method] = summarize([(row.category, scores_of(row)) for row in own], asked)
    return {"geneval2": methods} if methods else {}
