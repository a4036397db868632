"""What is made of a run's rows: set metrics, the table, the plot, filmstrips, verdicts and the report."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence

import numpy as np
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from addiff_env.env.trajectories import filmstrip_figure, record_trajectories
from addiff_env.evaluation.benchmarks.items import benchmark_record
from addiff_env.evaluation.metrics.models import MODELS, model_notes, run_models
from addiff_env.evaluation.metrics.registry import missing, protocol_scores, reported_score
from addiff_env.evaluation.metrics.set_results import pictures_of
from addiff_env.evaluation.metrics.sets import References, SetOptions, describe_sets, set_scores
from addiff_env.evaluation.report.figures import plot_quality_against_compute
from addiff_env.evaluation.report.html import write_report
from addiff_env.evaluation.report.seconds import timing_notes
from addiff_env.evaluation.report.text import summary_table
from addiff_env.evaluation.run.evaluation_run import EvaluationRun, plain
from addiff_env.evaluation.run.planning import ALL, left_out
from addiff_env.evaluation.run.run_folder import (
    Trajectory,
    save_trajectories,
    usable_timings,
    with_timings,
    write_items,
    write_provenance,
    write_verdicts,
)
from addiff_env.evaluation.statistics.decide import decide
from addiff_env.evaluation.statistics.decision import UNDECIDED, Decision
from addiff_env.evaluation.statistics.rules import rules_of
from addiff_env.evaluation.statistics.summary import counted, lead_with, score_value
from addiff_env.evaluation.statistics.tiers import describe_tiers
from addiff_env.storage.commands import this_program
from addiff_env.storage.files import write_whole
from addiff_env.types import Action, ResultRow


def choose_filmstrips(rows: list[ResultRow], number: int, metric: str = "success") -> list[ResultRow]:
    """Trajectories worth seeing: refined and good, never refined, refined and bad, in turn.

    Good is what satisfies its prompt, or where ``metric`` is a number what lies at or above the median; a picture
    without it is neither, and comes last.
    """
    scores = {row.key: value for row in rows if (value := score_value(row, metric)) is not None}
    bound = 0.5 if set(scores.values()) <= {0.0, 1.0} else float(np.median(list(scores.values())))
    scored = [row for row in rows if row.key in scores]
    refined = [row for row in scored if Action.REFINE in row.actions]
    groups = [
        [row for row in refined if scores[row.key] >= bound],
        [row for row in scored if Action.REFINE not in row.actions],
        [row for row in refined if scores[row.key] < bound],
    ]
    turns = [group[k] for k in range(max(map(len, groups))) for group in groups if k < len(group)]
    return [*turns, *(row for row in rows if row.key not in scores)][:number]


def record_filmstrips(run: EvaluationRun, rows: Sequence[ResultRow]) -> list[Trajectory]:
    """Run the rows' items again, one by one, and keep what happened."""
    known = {(item.prompt, item.seed): item for item in run.items}
    env, trajectories = run.make_env(1), []
    for row in rows:
        item = known[row.prompt, row.seed]
        (frames,) = record_trajectories(env, run.agent.act, [item.prompt], [item.seed], price=run.price)
        trajectories.append(Trajectory(item, row.reason, frames))
    return trajectories


def keep_run(run: EvaluationRun, rows: Sequence[ResultRow], metric: str) -> None:
    """Keep what the report needs to be made again, and what a reader needs to run this again."""
    name, kwargs = run.agent.environment
    values = {
        **benchmark_record(run.cfg.benchmark.name, run.items),
        "metric": metric,
        "agent": run.agent.fingerprint,
        "agents": {name: agent.fingerprint for name, agent in run.agents.items()},
        "environment": {"id": name, **kwargs, **run.overrides},
        "left_out": left_out(run.folder),
        MODELS: run_models(run.folder, run.metrics),
    }
    write_items(run.folder, run.items)
    write_provenance(run.folder, rows, **values)
    write_whole(run.files.config, OmegaConf.to_yaml(run.cfg))  # a merge has no shard's


def report(run: EvaluationRun) -> None:
    """Write and print the table and the verdicts; write the plot, the filmstrips, ``report.html`` and its exports."""
    cfg, files, metric = run.cfg, run.files, reported_score(run.rows, run.cfg.primary)
    rows = with_timings(run.folder, lead_with(run.rows, metric))
    if len(rows) < len(run.rows):
        print(f"{len(run.rows) - len(rows)} of {len(run.rows)} rows have no {metric} and are left out of the report")
    notes = [*model_notes([metric], run_models(run.folder, run.metrics)), *timing_notes(run.folder, rows)]
    table = summary_table(rows, notes)
    write_whole(files.table, table + "\n")
    written = [files.table, files.rows, files.plot]
    plot_quality_against_compute(rows, files.plot)
    head = f"{cfg.benchmark.name}, {counted(len(run.items), 'picture')} a method, {rows[0].dtype}"
    print(f"\n{head}; {metric}, shares in percent")
    print(f"{table}\n")
    rules = rules_of(metric, plain(cfg.rules))
    requirements = {(item.prompt, item.seed): item.num_requirements for item in run.items}
    verdicts = decide(rows, requirements, rules, run.runs, usable_timings(run.folder, rows))
    print(describe_tiers(verdicts) if verdicts else "no verdicts: no agent is among the methods")
    print("".join(f"\n{line}\n" for line in what_decides(cfg, verdicts)))
    keep_run(run, rows, metric)
    write_verdicts(run.folder, verdicts, rules)
    own, trajectories = run.own_rows(rows), []
    if own and cfg.filmstrips:  # makes pictures once more: only when everything else is kept
        trajectories = record_filmstrips(run, choose_filmstrips(own, cfg.filmstrips, metric))
        titled = [(f"{strip.item.prompt!r}: {strip.reason}", strip.frames) for strip in trajectories]
        filmstrip_figure(titled).savefig(files.filmstrips)
        written.append(files.filmstrips)
    save_trajectories(run.folder, trajectories)
    written += [files.verdicts, *write_report(run.folder, rows, run.items, verdicts)]
    print("wrote")
    for path in written:
        print(f"  {path}")


def what_decides(cfg: DictConfig, verdicts: Sequence[Decision]) -> list[str]:
    """The command that runs everything, where a run of a part leaves something undecided."""
    is_part = cfg.methods != ALL or cfg.benchmark.limit is not None
    if not is_part or not any(verdict.outcome == UNDECIDED for verdict in verdicts):
        return []
    replaced = ("methods=", "benchmark.limit=", "hydra.run.dir=", "shard.")
    kept = [override for override in HydraConfig.get().overrides.task if not override.startswith(replaced)]
    program = this_program() or ["addiff", "evaluate"]
    words = [*program, *kept, f"methods={ALL}", "benchmark.limit=null", "hydra.run.dir=runs/reproduce"]
    return [
        "A run of some prompts or methods is too small to decide what is undecided above. All of them tell most; that "
        f"takes hours on a few cores, and goes on where it was stopped:\n  {shlex.join(words)}"
    ]


def measure_whole(run: EvaluationRun, references: References) -> None:
    """What is measured of a method's pictures together: the benchmark's own protocol, and the set metrics."""
    run.files.protocols.unlink(missing_ok=True)  # of other rows
    if scores := protocol_scores(run.rows, run.items):
        write_whole(run.files.protocols, json.dumps(scores, indent=2) + "\n")
        for metric, methods in scores.items():
            for method, shares in methods.items():
                print(f"{metric}, {method}: " + "  ".join(f"{name} {share:.4f}" for name, share in shares.items()))
    if references.features:
        sets = set_scores(run.rows, run.folder, references)
        kept = {**sets, "measured_on": pictures_of(run.rows, run.items)}
        write_whole(run.files.set_metrics, json.dumps(kept, indent=2) + "\n")
        print(describe_sets(sets))


def open_references(run: EvaluationRun, device: str) -> References:
    """The references of set metrics; what they need is missed before any picture is made."""
    options = SetOptions(**plain(run.cfg.set_metrics))
    if options.names and not run.cfg.save_images:
        raise ValueError(f"set metrics {list(options.names)} need the pictures: save_images=true")
    try:
        return References(options, run.folder, device)
    except (FileNotFoundError, ImportError) as error:
        if not run.cfg.allow_missing:
            raise missing("set metrics", error) from error
        print(f"left out set metrics {list(options.names)}: {error}")
        return References(SetOptions(), run.folder, device)
