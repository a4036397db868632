"""One evaluation, from Hydra's configuration to a reported run folder; `command` beside it is its command.

Rows are appended to <run folder>/rows.jsonl as they are made; the same configuration goes on where it was stopped, and
may add methods. With other settings than the folder's rows were made with it is refused.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from addiff_env.env.vector import DiffusionDenoiseVectorEnv
from addiff_env.evaluation.methods.controls import MatchedSteps, Replay
from addiff_env.evaluation.methods.registry import AUTO, Method, is_agent, make_method
from addiff_env.evaluation.methods.tuning import resolve, tune, tuning_fingerprint, tuning_items
from addiff_env.evaluation.metrics.base import columns_of
from addiff_env.evaluation.metrics.registry import is_embedded_world, open_metrics, primary_score
from addiff_env.evaluation.run.evaluation_run import EvaluationRun, plain
from addiff_env.evaluation.run.fingerprint import CONTROL
from addiff_env.evaluation.run.made_with import keep_fingerprint, require_same
from addiff_env.evaluation.run.planning import ALL, DISTILLED, Plan, asked_methods, expected_methods, keep_plan, plan
from addiff_env.evaluation.run.progress import RunProgress
from addiff_env.evaluation.run.reporting import measure_whole, open_references, report
from addiff_env.evaluation.run.row_maker import RowMaker
from addiff_env.evaluation.run.rows import append_rows, merge_if_whole, merge_shards, read_rows, shard, write_rows
from addiff_env.evaluation.run.run_folder import is_reported, mark_reported
from addiff_env.evaluation.run.version import code_version
from addiff_env.evaluation.statistics.families import control_names
from addiff_env.evaluation.statistics.rules import rules_of
from addiff_env.storage.files import alone_in, write_whole
from addiff_env.types import ResultRow


def controls_of(
    rows: list[ResultRow], env: DiffusionDenoiseVectorEnv, full: DiffusionDenoiseVectorEnv, agent: str = "agent"
) -> list[Method]:
    """H4's controls: the agent's decisions with refinements of the whole picture, and its NFE in plain steps."""
    scripts = {(row.prompt, row.seed): row for row in rows}
    replayed, continued = control_names(agent)
    return [Replay(full, replayed, scripts), MatchedSteps(env, continued, scripts)]


def plan_run(run: EvaluationRun, maker: RowMaker, metric: str) -> Plan:
    """The methods of the configuration: a misspelt one, or one without its weights, stops us before any work."""
    cfg, env = run.cfg, maker.env
    tunable = bool(cfg.tune.benchmark) or is_embedded_world(run.items)
    asked = asked_methods(cfg.methods, env, run.options, tunable)

    def make(spec: str) -> list[Method]:
        agents = run.agents if is_agent(spec) else {run.agent_name: run.agent}
        return [make_method(spec, env, agent, run.options, run.benchmark, name) for name, agent in agents.items()]

    def tuned(specs: Sequence[str]) -> list[str]:
        return tuned_specs(run, specs, maker, metric)

    found = plan(asked, make, tuned, asked if cfg.allow_missing else DISTILLED if cfg.methods == ALL else ())
    if not found.methods:
        raise ValueError(f"no method to run: methods={asked}" + " (all were left out)" * bool(found.left_out))
    for spec, why in found.left_out.items():
        print(f"left out method {spec!r}: {why}")
    return found


def tuned_specs(run: EvaluationRun, specs: Sequence[str], maker: RowMaker, metric: str) -> list[str]:
    """What those of ``specs`` stand for that are tuned to the agent; see `addiff_env.evaluation.methods.tuning`.

    No prompt of the whole benchmark is tuned on, whatever its limit: a later run with a larger one keeps the tuning.

    Raises:
        ValueError: no prompts to tune on.
    """
    cfg = run.cfg
    name = cfg.tune.benchmark or ("tiny-dev" if is_embedded_world(run.benchmark) else None)
    if name is None:
        raise ValueError(f"{', '.join(AUTO)} need tune.benchmark=<prompts that the evaluation does not use>")
    items = tuning_items(name, cfg.tune.limit, run.benchmark, cfg.benchmark.root, cfg.benchmark.any_length)
    env, agent, price = maker.env, run.agent, run.price
    fingerprint = tuning_fingerprint(agent, env, items, metric, price)
    return resolve(specs, run.files.tuning, fingerprint, lambda: tune(env, agent, items, maker.metrics, metric, price))


def make_rows(run: EvaluationRun, maker: RowMaker, methods: Sequence[Method]) -> list[ResultRow]:
    """Run every method, and H4's controls of the first agent, on the shard's items; what is there is not made again."""
    items, name = shard(run.items, *run.place), run.agent_name
    for method in methods:
        maker.require_scores(method, items)
    expected = {method.name: method.expected_nfe for method in methods}
    controlled = name in expected and run.cfg.controls
    if controlled:
        expected |= dict.fromkeys(control_names(name), expected[name])
    progress = RunProgress(expected, len(items))
    for method in methods:
        progress.keep(method.name, maker.kept(method, items))
    progress.start()
    results = {method.name: maker.run(method, items, progress) for method in methods}
    if controlled:
        full = run.make_env(run.cfg.num_envs, **CONTROL)
        for control in controls_of(results[name], maker.env, full, name):
            results[control.name] = maker.run(control, items, progress)
    progress.close()
    return [row for group in results.values() for row in group]


def evaluate(run: EvaluationRun) -> list[ResultRow]:
    """Make the rows of this process's shard.

    Raises:
        ValueError: the folder's rows were made with other settings; and as the methods and metrics.
    """
    cfg = run.cfg
    require_same(run.folder, run.fingerprint, code_version())
    env = run.make_env(cfg.num_envs)
    metrics, skipped = open_metrics(run.metrics, env.perception, run.items, cfg.allow_missing)
    for setting, why in skipped.items():
        print(f"left out metric {setting!r}: {why}")
    metric = primary_score([columns_of(metrics, item) for item in run.items], cfg.primary)
    rules_of(metric, plain(cfg.rules))  # wrong ones are refused before any picture is made
    maker = RowMaker(run.rows_path, env, metrics, cfg.save_images)
    found = plan_run(run, maker, metric)
    keep_plan(run.folder, cfg.methods, found, skipped)
    # Only now: a command that is refused leaves nothing to agree with.
    keep_fingerprint(run.folder, run.fingerprint, code_version())
    write_whole(run.files.config, OmegaConf.to_yaml(cfg))
    if run.is_split:
        maker.require_one_version(found.methods)
        append_rows(maker.path, [])  # a shard that has nothing to make is whole as well
    return make_rows(run, maker, found.methods)


def whole_run(run: EvaluationRun) -> list[ResultRow] | None:
    """All shards' rows, the first agent's controls included, also written to ``rows.jsonl`` beside what that holds.

    None where a launched run's other processes are at work.
    """
    places = [(item.prompt, item.seed) for item in run.items]
    controls = control_names(run.agent_name) if run.cfg.controls else ()
    methods = expected_methods(run.folder, run.cfg.methods, controls)
    merge = merge_if_whole if run.launched else merge_shards
    rows = merge(run.folder, run.place[1], places, methods)
    if rows is not None:
        merged = {row.key for row in rows}
        others = [row for row in read_rows(run.files.rows) if row.key not in merged]  # not asked for now
        write_rows(run.files.rows, [*rows, *others])
    return rows


def run(cfg: DictConfig, folder: Path, place: tuple[int, int], launched: bool) -> None:
    """Make this shard's rows, or merge those of all, in a folder of this process's own; report once they are whole.

    Args:
        cfg: the configuration.
        folder: of the run.
        place: index of the shard, and number of shards.
        launched: whether a launcher started this process as one of several.
    """
    if launched and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", place[0])))  # each process has its own GPU
    this = EvaluationRun(cfg, folder, place, launched)
    made_with = this.fingerprint  # before anything that takes long
    references = open_references(this, "cuda" if torch.cuda.is_available() else "cpu")
    if not cfg.shard.merge:
        this.rows = evaluate(this)
        if this.is_split:
            print(f"shard {place[0]} of {place[1]}: {len(this.rows)} rows in {this.rows_path}")
            if not launched:
                print("when all are made: shard.merge=true")
                return
    with alone_in(folder):  # a launched run's processes may end together, and one of them reports
        if this.is_split or cfg.shard.merge:
            merged = whole_run(this)
            if merged is None:
                print("the process that finishes last merges them")
                return
            this.rows = merged
        require_same(folder, made_with, this.rows[0].code_version)
        settings = OmegaConf.to_yaml(cfg)
        if launched and this.files.report.exists() and is_reported(folder, settings, this.rows):
            print(f"another process reported them: {this.files.report}")
            return
        measure_whole(this, references)
        report(this)
        mark_reported(folder, settings, this.rows)
