"""What is made of a run's rows: set metrics, the table, the plot, filmstrips, verdicts and the report."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from addiff_env.agent import Agent
from addiff_env.env.trajectories import filmstrip_figure, record_trajectories
from addiff_env.env.vector import DiffusionDenoiseVectorEnv
from addiff_env.evaluation.benchmarks.items import Item, benchmark_record
from addiff_env.evaluation.metrics.registry import missing, protocol_scores, reported_score
from addiff_env.evaluation.metrics.set_results import PROTOCOLS, SET_METRICS, pictures_of
from addiff_env.evaluation.metrics.sets import References, SetOptions, describe_sets, set_scores
from addiff_env.evaluation.report.figures import plot_quality_against_compute
from addiff_env.evaluation.report.html import write_report
from addiff_env.evaluation.report.text import summary_table
from addiff_env.evaluation.run.planning import ALL, left_out
from addiff_env.evaluation.run.run_folder import (
    Trajectory,
    save_trajectories,
    write_items,
    write_provenance,
    write_verdicts,
)
from addiff_env.evaluation.statistics.decide import decide
from addiff_env.evaluation.statistics.decision import UNDECIDED, Decision, describe
from addiff_env.evaluation.statistics.rules import rules_of
from addiff_env.evaluation.statistics.summary import counted, lead_with, score_value
from addiff_env.pipeline import make_agent_env
from addiff_env.storage.commands import this_program
from addiff_env.storage.files import write_whole
from addiff_env.types import Action, ResultRow


def plain(cfg: DictConfig) -> dict[str, Any]:
    """A group of the configuration as a dictionary."""
    return OmegaConf.to_container(cfg, resolve=True)  # type: ignore[return-value]


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


def record_filmstrips(
    rows: list[ResultRow], items: Sequence[Item], agent: Agent, env: DiffusionDenoiseVectorEnv
) -> list[Trajectory]:
    """Run the rows' items again, one by one, and keep what happened."""
    known = {(item.prompt, item.seed): item for item in items}
    trajectories = []
    for row in rows:
        item = known[row.prompt, row.seed]
        (frames,) = record_trajectories(env, agent.act, [item.prompt], [item.seed])
        trajectories.append(Trajectory(item, row.reason, frames))
    return trajectories


def keep_run(
    cfg: DictConfig,
    folder: Path,
    rows: list[ResultRow],
    items: Sequence[Item],
    agents: Mapping[str, Agent],
    overrides: dict[str, Any],
    metric: str,
) -> None:
    """Keep what the report needs to be made again, and what a reader needs to run this again."""
    first = next(iter(agents.values()))
    name, kwargs = first.environment
    facts = {
        **benchmark_record(cfg.benchmark.name, items),
        "metric": metric,
        "agent": first.fingerprint,
        "agents": {name: agent.fingerprint for name, agent in agents.items()},
        "environment": {"id": name, **kwargs, **overrides},
        "left_out": left_out(folder),
    }
    write_items(folder, items)
    write_provenance(folder, rows, **facts)


def report(
    cfg: DictConfig,
    folder: Path,
    rows: list[ResultRow],
    items: Sequence[Item],
    agents: Mapping[str, Agent],
    overrides: dict[str, Any],
) -> None:
    """Write and print the table and the verdicts; write the plot, the filmstrips, ``report.html`` and its exports."""
    metric = reported_score(rows, cfg.primary)
    whole, rows = rows, lead_with(rows, metric)
    if len(rows) < len(whole):
        print(f"{len(whole) - len(rows)} of {len(whole)} rows have no {metric} and are left out of the report")
    table = summary_table(rows)
    (folder / "table.txt").write_text(table + "\n")
    written = [folder / "table.txt", folder / "rows.jsonl", folder / "quality_vs_compute.png"]
    plot_quality_against_compute(rows, written[-1])
    head = f"{cfg.benchmark.name}, {counted(len(items), 'picture')} a method, {rows[0].dtype}"
    print(f"\n{head}; {metric}, shares in percent")
    print(f"{table}\n")
    name, agent = next(iter(agents.items()))
    own = [row for row in rows if row.method == name]
    trajectories: list[Trajectory] = []
    if own and cfg.filmstrips:
        one_lane = make_agent_env(agent, 1, **overrides)
        trajectories = record_filmstrips(choose_filmstrips(own, cfg.filmstrips, metric), items, agent, one_lane)
        written.append(folder / "filmstrips.png")
        titled = [
            (f"{trajectory.item.prompt!r}: {trajectory.reason}", trajectory.frames) for trajectory in trajectories
        ]
        filmstrip_figure(titled).savefig(written[-1])
    rules = rules_of(metric, plain(cfg.rules))
    facts = {(item.prompt, item.seed): item.facts for item in items}
    verdicts = decide(rows, facts, rules, list(agents))
    print("\n".join(map(describe, verdicts)) if verdicts else "no verdicts: no agent is among the methods")
    print("".join(f"\n{line}\n" for line in what_decides(cfg, verdicts)))
    keep_run(cfg, folder, rows, items, agents, overrides, metric)
    save_trajectories(folder, trajectories)
    write_verdicts(folder, verdicts, rules)
    write_whole(folder / "config.yaml", OmegaConf.to_yaml(cfg))  # a merge has no shard's
    written += [folder / "verdicts.json", *write_report(folder, rows, items, verdicts)]
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


def measure_whole(folder: Path, rows: list[ResultRow], items: Sequence[Item], references: References) -> None:
    """What is measured of a method's pictures together: the benchmark's own protocol, and the set metrics."""
    (folder / PROTOCOLS).unlink(missing_ok=True)  # of other rows
    if scores := protocol_scores(rows):
        (folder / PROTOCOLS).write_text(json.dumps(scores, indent=2) + "\n")
        for metric, methods in scores.items():
            for method, shares in methods.items():
                print(f"{metric}, {method}: " + "  ".join(f"{name} {share:.4f}" for name, share in shares.items()))
    if references.features:
        sets = set_scores(rows, folder, references)
        kept = {**sets, "measured_on": pictures_of(rows, items)}
        (folder / SET_METRICS).write_text(json.dumps(kept, indent=2) + "\n")
        print(describe_sets(sets))


def open_references(cfg: DictConfig, folder: Path, device: str) -> References:
    """The references of set metrics; what they need is missed before any picture is made."""
    options = SetOptions(**plain(cfg.set_metrics))
    if options.names and not cfg.save_images:
        raise ValueError(f"set metrics {list(options.names)} need the pictures: save_images=true")
    try:
        return References(options, folder, device)
    except (FileNotFoundError, ImportError) as error:
        if not cfg.allow_missing:
            raise missing("set metrics", error) from error
        print(f"left out set metrics {list(options.names)}: {error}")
        return References(SetOptions(), folder, device)
