"""One evaluation, from Hydra's configuration to a reported run folder; `command` beside it is its command.

Rows are appended to <run folder>/rows.jsonl as they are made; the same configuration goes on where it was stopped, and
may add methods. With other settings than the folder's rows were made with it is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from addiff_env.agent import Agent
from addiff_env.env.vector import DiffusionDenoiseVectorEnv
from addiff_env.evaluation.benchmarks.items import Item, load_benchmark
from addiff_env.evaluation.methods.diffusers_methods import MethodOptions
from addiff_env.evaluation.methods.registry import MatchedSteps, Method, PolicyMethod, Replay, make_method
from addiff_env.evaluation.methods.tuning import AUTO, resolve, stamp_of, tune, tuning_items
from addiff_env.evaluation.metrics.base import Metric, columns_of, score_pictures, unmeasured
from addiff_env.evaluation.metrics.registry import default_metrics, is_embedded_world, open_metrics, primary_score
from addiff_env.evaluation.run.fingerprint import CONTROL, keep_fingerprint, require_same, run_fingerprint
from addiff_env.evaluation.run.memory import watched
from addiff_env.evaluation.run.planning import (
    ALL,
    DISTILLED,
    Plan,
    asked_methods,
    expected_methods,
    keep_plan,
    named_agents,
    plan,
)
from addiff_env.evaluation.run.progress import RunProgress
from addiff_env.evaluation.run.reporting import measure_whole, open_references, plain, report
from addiff_env.evaluation.run.rows import (
    append_rows,
    merge_if_whole,
    merge_shards,
    read_rows,
    shard,
    shard_path,
    write_rows,
)
from addiff_env.evaluation.run.run_folder import is_reported, mark_reported
from addiff_env.evaluation.run.version import code_version, model_revision
from addiff_env.evaluation.statistics.families import control_names
from addiff_env.evaluation.statistics.rules import rules_of
from addiff_env.pipeline import make_agent_env
from addiff_env.storage.files import alone_in, file_name, write_whole
from addiff_env.types import Generated, ResultRow


class Evaluation:
    """One run folder: which rows exist, and how new ones are made and kept."""

    def __init__(
        self, path: Path, env: DiffusionDenoiseVectorEnv, metrics: Sequence[Metric], save_images: bool
    ) -> None:
        self.folder, self.env, self.metrics, self.save_images = path.parent, env, metrics, save_images
        self.path, self.version = path, code_version()
        self.rows = read_rows(self.path)

    def blank_row(self, method: Method, item: Item) -> ResultRow:
        """A row that names the measurement and holds no result yet."""
        backbone = method.backbone
        return ResultRow(
            method=method.name,
            prompt=item.prompt,
            seed=item.seed,
            category=item.category,
            backbone=f"{backbone.name}@{model_revision(backbone.name, backbone.revision)}",
            solver=method.solver,
            policy=method.policy,
            dtype=backbone.dtype_name,
            code_version=self.version,
            negative_prompt=self.env.config.negative_prompt,
        )

    def require_scores(self, method: Method, items: Sequence[Item]) -> None:
        """Check that the rows which are there have every score that is wanted, before any more are made.

        Raises:
            ValueError: some lack one.
        """
        done = {row.key: row for row in self.rows}
        for item in items:
            row = done.get(self.blank_row(method, item).key)
            wanted = [name for name in columns_of(self.metrics, item) if row and unmeasured(name) not in row.reason]
            if row and (lacking := set(wanted) - set(row.scores)):
                raise ValueError(
                    f"{self.path} holds rows of {method.name!r} without {', '.join(sorted(lacking))}: it was made with "
                    "other metrics; take another folder: hydra.run.dir=..."
                )

    def require_one_version(self, methods: Sequence[Method]) -> None:
        """Check that a shard's file has rows of today's code only: a merge takes rows of one version.

        Raises:
            ValueError: it has others of ``methods``.
        """
        names = {method.name for method in methods}
        if others := {row.code_version for row in self.rows if row.method in names} - {self.version}:
            raise ValueError(
                f"{self.path} holds rows of code version {', '.join(sorted(others))}, this is {self.version}, and a "
                "merge takes rows of one version: take another folder (hydra.run.dir=...), or the code of before"
            )

    def kept(self, method: Method, items: Sequence[Item]) -> list[ResultRow]:
        """The method's rows for ``items`` that are there."""
        done = {row.key: row for row in self.rows}
        return [done[key] for item in items if (key := self.blank_row(method, item).key) in done]

    def run(self, method: Method, items: Sequence[Item], progress: RunProgress) -> list[ResultRow]:
        """Make what is missing; returns the method's rows for ``items``, in their order.

        Raises:
            ValueError: rows that are there lack a score that is wanted.
        """
        self.require_scores(method, items)
        done = {row.key: row for row in self.rows}
        wanted = [self.blank_row(method, item) for item in items]
        left = [item for item, row in zip(items, wanted, strict=True) if row.key not in done]
        for group, peak in watched(method.make(left) if left else (), method.backbone.device):
            rows = self._keep(method, group, peak)
            done |= {row.key: row for row in rows}
            progress.add(method.name, rows)
        self.rows = list(done.values())
        return [done[row.key] for row in wanted]

    def _keep(self, method: Method, group: list[tuple[Item, Generated]], peak_memory: int) -> list[ResultRow]:
        if not group:
            return []
        items = [item for item, _ in group]
        scored = score_pictures(self.metrics, np.stack([made.picture for _, made in group]), items)
        rows = []
        for (item, made), (scores, reason) in zip(group, scored, strict=True):
            row = self.blank_row(method, item)
            row.actions, row.nfe, row.forward_passes = made.actions, made.nfe, made.forward_passes
            row.net_flops, row.seconds, row.peak_memory = made.net_flops, made.seconds, peak_memory
            row.scores, row.reason = scores, "; ".join(filter(None, (made.note, reason)))
            row.image = self._save_image(row, made) if self.save_images else ""
            rows.append(row)
        append_rows(self.path, rows)
        return rows

    def _save_image(self, row: ResultRow, made: Generated) -> str:
        # By the row's whole key: a folder may hold the same picture in two dtypes, or of two code versions.
        digest = hashlib.sha256(json.dumps(row.key).encode()).hexdigest()[:12]
        relative = Path("images") / file_name(row.method) / f"{row.seed}-{digest}.png"
        (self.folder / relative).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(made.picture).save(self.folder / relative)
        return str(relative)


def controls_of(
    rows: list[ResultRow], env: DiffusionDenoiseVectorEnv, full: DiffusionDenoiseVectorEnv, agent: str = "agent"
) -> list[Method]:
    """H4's controls: the agent's decisions with refinements of the whole picture, and its NFE in plain steps."""
    scripts = {(row.prompt, row.seed): row for row in rows}
    replayed, continued = control_names(agent)
    return [Replay(full, replayed, scripts), MatchedSteps(env, continued, scripts)]


def listed(setting: Any) -> list[str]:
    """A setting that may be one name or a list of names."""
    return [setting] if isinstance(setting, str) else list(setting)


def plan_run(
    cfg: DictConfig, evaluation: Evaluation, benchmark: Sequence[Item], agents: Mapping[str, Agent], metric: str
) -> Plan:
    """The methods of the configuration: a misspelt one, or one without its weights, stops us before any work."""
    options, env, first = MethodOptions.read(plain(cfg.method_options)), evaluation.env, next(iter(agents.values()))
    b, tunable = cfg.benchmark, bool(cfg.tune.benchmark) or is_embedded_world(benchmark)
    # The limit may grow.
    whole = load_benchmark(b.name, root=b.root, images_per_prompt=b.images_per_prompt, any_length=b.any_length)
    asked = asked_methods(cfg.methods, env, options, tunable)

    def make(spec: str) -> list[Method]:
        if spec == "agent":
            return [PolicyMethod(env, agent, name) for name, agent in agents.items()]
        return [make_method(spec, env, first, options, whole)]

    def tuned(specs: Sequence[str]) -> list[str]:
        return tuned_specs(cfg, specs, evaluation, first, metric)

    found = plan(asked, make, tuned, asked if cfg.allow_missing else DISTILLED if cfg.methods == ALL else ())
    if not found.methods:
        raise ValueError(f"no method to run: methods={asked}" + " (all were left out)" * bool(found.left_out))
    for spec, why in found.left_out.items():
        print(f"left out method {spec!r}: {why}")
    return found


def tuned_specs(cfg: DictConfig, specs: Sequence[str], evaluation: Evaluation, agent: Agent, metric: str) -> list[str]:
    """What those of ``specs`` stand for that are tuned to the agent; see `addiff_env.evaluation.methods.tuning`.

    No prompt of the whole benchmark is tuned on, whatever its limit: a later run with a larger one keeps the tuning.

    Raises:
        ValueError: no prompts to tune on.
    """
    benchmark = load_benchmark(cfg.benchmark.name, root=cfg.benchmark.root, any_length=cfg.benchmark.any_length)
    name = cfg.tune.benchmark or ("tiny-dev" if is_embedded_world(benchmark) else None)
    if name is None:
        raise ValueError(f"{', '.join(AUTO)} need tune.benchmark=<prompts that the evaluation does not use>")
    items = tuning_items(name, cfg.tune.limit, benchmark, cfg.benchmark.root, cfg.benchmark.any_length)
    env, metrics = evaluation.env, evaluation.metrics
    return resolve(
        specs,
        evaluation.folder / "tuning.json",
        stamp_of(agent, env, items, metric),
        lambda: tune(env, agent, items, metrics, metric),
    )


def make_rows(
    cfg: DictConfig,
    evaluation: Evaluation,
    items: Sequence[Item],
    methods: Sequence[Method],
    agents: Mapping[str, Agent],
    overrides: dict[str, Any],
) -> list[ResultRow]:
    """Run every method, and H4's controls of the first agent, on ``items``; what is there is not made again."""
    for method in methods:
        evaluation.require_scores(method, items)
    name, agent = next(iter(agents.items()))
    expected = {method.name: method.expected_nfe for method in methods}
    controlled = name in expected and cfg.controls
    if controlled:
        expected |= dict.fromkeys(control_names(name), expected[name])
    progress = RunProgress(expected, len(items))
    for method in methods:
        progress.keep(method.name, evaluation.kept(method, items))
    progress.start()
    results = {method.name: evaluation.run(method, items, progress) for method in methods}
    if controlled:
        full = make_agent_env(agent, cfg.num_envs, **overrides | CONTROL)
        for control in controls_of(results[name], evaluation.env, full, name):
            results[control.name] = evaluation.run(control, items, progress)
    progress.close()
    return [row for group in results.values() for row in group]


def evaluate(
    cfg: DictConfig,
    folder: Path,
    items: Sequence[Item],
    agents: Mapping[str, Agent],
    overrides: dict[str, Any],
    place: tuple[int, int],
    fingerprint: dict[str, Any],
) -> list[ResultRow]:
    """Make the rows of one shard, ``place`` (index, number of shards), of ``items``.

    Raises:
        ValueError: the folder's rows were made with other settings than ``fingerprint`` says; and as the methods and
            metrics.
    """
    require_same(folder, fingerprint, code_version())
    env = make_agent_env(next(iter(agents.values())), cfg.num_envs, **overrides)
    metrics, skipped = open_metrics(metric_settings(cfg, items), env.perception, items, cfg.allow_missing)
    for setting, why in skipped.items():
        print(f"left out metric {setting!r}: {why}")
    metric = primary_score([columns_of(metrics, item) for item in items], cfg.primary)
    rules_of(metric, plain(cfg.rules))  # wrong ones are refused before any picture is made
    evaluation = Evaluation(shard_path(folder, *place), env, metrics, cfg.save_images)
    found = plan_run(cfg, evaluation, items, agents, metric)
    keep_plan(folder, cfg.methods, found, skipped)
    # Only now: a command that is refused leaves nothing to agree with.
    keep_fingerprint(folder, fingerprint, code_version())
    write_whole(folder / "config.yaml", OmegaConf.to_yaml(cfg))
    if place[1] > 1:
        evaluation.require_one_version(found.methods)
        append_rows(evaluation.path, [])  # a shard that has nothing to make is whole as well
    return make_rows(cfg, evaluation, shard(items, *place), found.methods, agents, overrides)


def load_items(cfg: DictConfig) -> list[Item]:
    """The items to make; of a benchmark that has fewer prompts than its limit all, which is said.

    Raises:
        ValueError: a limit that is no whole number of at least 1; and as `load_benchmark`.
    """
    b, limit = cfg.benchmark, cfg.benchmark.limit
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"benchmark.limit must be a whole number of at least 1, or null for all, got {limit!r}")
    items = load_benchmark(b.name, limit, root=b.root, images_per_prompt=b.images_per_prompt, any_length=b.any_length)
    entries = len({(item.id, item.prompt) for item in items})
    if limit is not None and entries < limit:
        print(f"benchmark.limit={limit}: {b.name} has {entries:,} prompts, and all of them are taken")
    return items


def metric_settings(cfg: DictConfig, items: Sequence[Item]) -> list[str]:
    """What is measured of each picture."""
    return default_metrics(items) if cfg.metrics is None else listed(cfg.metrics)


def configured_fingerprint(
    cfg: DictConfig, items: Sequence[Item], agents: Mapping[str, Agent], overrides: dict[str, Any]
) -> dict[str, Any]:
    """What the rows of this configuration depend on; the benchmark as a whole, so that its limit may grow."""
    b = cfg.benchmark
    whole = load_benchmark(b.name, root=b.root, images_per_prompt=b.images_per_prompt, any_length=b.any_length)
    options = MethodOptions.read(plain(cfg.method_options))
    return run_fingerprint(agents, overrides, metric_settings(cfg, items), whole, options, b.name)


def whole_run(
    cfg: DictConfig, folder: Path, items: Sequence[Item], place: tuple[int, int], launched: bool, agent: str
) -> list[ResultRow] | None:
    """All shards' rows, the controls of ``agent`` included, also written to ``rows.jsonl`` beside what that holds.

    None where a launched run's other processes are at work.
    """
    places = [(item.prompt, item.seed) for item in items]
    methods = expected_methods(folder, cfg.methods, control_names(agent) if cfg.controls else ())
    merge = merge_if_whole if launched else merge_shards
    rows = merge(folder, place[1], places, methods)
    if rows is not None:
        path, merged = folder / "rows.jsonl", {row.key for row in rows}
        others = [row for row in read_rows(path) if row.key not in merged]  # of methods or items not asked for now
        write_rows(path, [*rows, *others])
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
    items = load_items(cfg)
    agents = named_agents(cfg.agent, listed(cfg.agents))
    overrides = plain(cfg.env)
    fingerprint = configured_fingerprint(cfg, items, agents, overrides)
    references = open_references(cfg, folder, "cuda" if torch.cuda.is_available() else "cpu")
    rows: list[ResultRow] | None = None
    if not cfg.shard.merge:
        rows = evaluate(cfg, folder, items, agents, overrides, place, fingerprint)
        if place[1] > 1:
            print(f"shard {place[0]} of {place[1]}: {len(rows)} rows in {shard_path(folder, *place)}")
            if not launched:
                print("when all are made: shard.merge=true")
                return
    with alone_in(folder):  # a launched run's processes may end together, and one of them reports
        if place[1] > 1 or cfg.shard.merge:
            rows = whole_run(cfg, folder, items, place, launched, next(iter(agents)))
        if rows is None:
            print("the process that finishes last merges them")
            return
        require_same(folder, fingerprint, rows[0].code_version)
        settings = OmegaConf.to_yaml(cfg)
        if launched and (folder / "report.html").exists() and is_reported(folder, settings, rows):
            print(f"another process reported them: {folder / 'report.html'}")
            return
        measure_whole(folder, rows, items, references)
        report(cfg, folder, rows, items, agents, overrides)
        mark_reported(folder, settings, rows)
