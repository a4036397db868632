"""Compare a trained agent with fixed-step inference on held-out prompts.

    python evaluate.py                          the shipped agent, 256 prompts of the embedded world
    python evaluate.py benchmark.limit=null     the whole test split
    python evaluate.py agent=runs/train/tiny-seed0/agent hydra.run.dir=runs/mine
    python evaluate.py shard.index=0 shard.count=4 hydra.run.dir=runs/mine      one quarter; then shard.merge=true

Rows are appended to <run folder>/rows.jsonl as they are made; the same command goes on where it was stopped.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from tqdm import tqdm

from addiff_env.agent import Agent
from addiff_env.env import DiffusionDenoiseVectorEnv
from addiff_env.evaluation.baselines import MatchedSteps, Method, Replay, make_method
from addiff_env.evaluation.benchmarks import Item, benchmark_record, load_benchmark
from addiff_env.evaluation.html import write_report
from addiff_env.evaluation.hypotheses import CONTINUED, FULL_IMAGE, Verdict, all_verdicts, describe
from addiff_env.evaluation.metrics import score_pictures
from addiff_env.evaluation.report import plot_filmstrips, plot_quality_against_compute, record_trajectory, summary_table
from addiff_env.evaluation.rows import append_rows, merge_shards, read_rows, shard, shard_path
from addiff_env.evaluation.runs import Strip, save_strips, write_items, write_provenance, write_verdicts
from addiff_env.evaluation.version import code_version
from addiff_env.pipeline import make_agent_env
from addiff_env.types import Action, Generated, ResultRow


class Evaluation:
    """One run folder: which rows exist, and how new ones are made and kept."""

    def __init__(self, path: Path, env: DiffusionDenoiseVectorEnv, save_images: bool) -> None:
        self.folder, self.env, self.save_images = path.parent, env, save_images
        self.path, self.version = path, code_version()
        self.rows = read_rows(self.path)

    def blank_row(self, method: Method, item: Item) -> ResultRow:
        """A row that names the measurement and holds no result yet."""
        backbone = self.env.backbone
        return ResultRow(
            method=method.name,
            prompt=item.prompt,
            seed=item.seed,
            category=item.category,
            backbone=f"{backbone.name}@{backbone.revision or 'packaged'}",
            solver=method.solver,
            policy=method.policy,
            dtype=backbone.dtype_name,
            code_version=self.version,
        )

    def run(self, method: Method, items: Sequence[Item]) -> list[ResultRow]:
        """Make what is missing; returns the method's rows for ``items``, in their order."""
        done = {row.key: row for row in self.rows}
        wanted = [self.blank_row(method, item) for item in items]
        missing = [item for item, row in zip(items, wanted, strict=True) if row.key not in done]
        with tqdm(total=len(items), initial=len(items) - len(missing), desc=method.name, unit="image") as bar:
            for group in method.make(missing) if missing else ():
                rows = self._keep(method, group)
                done |= {row.key: row for row in rows}
                bar.update(len(rows))
        self.rows = list(done.values())
        return [done[row.key] for row in wanted]

    def _keep(self, method: Method, group: list[tuple[Item, Generated]]) -> list[ResultRow]:
        if not group:
            return []
        items = [item for item, _ in group]
        scored = score_pictures(self.env.perception, np.stack([made.picture for _, made in group]), items)
        rows = []
        for (item, made), (scores, reason) in zip(group, scored, strict=True):
            row = self.blank_row(method, item)
            row.actions, row.nfe, row.forward_passes = made.actions, made.nfe, made.forward_passes
            row.net_flops, row.seconds, row.scores, row.reason = made.net_flops, made.seconds, scores, reason
            row.image = self._save_image(method, made) if self.save_images else ""
            rows.append(row)
        append_rows(self.path, rows)
        return rows

    def _save_image(self, method: Method, made: Generated) -> str:
        name = f"{made.seed}-{zlib.crc32(made.prompt.encode()):08x}.png"  # a file may repeat seeds over prompts
        relative = Path("images") / method.name.replace(":", "_") / name
        (self.folder / relative).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(made.picture).save(self.folder / relative)
        return str(relative)


def choose_filmstrips(rows: list[ResultRow], number: int) -> list[ResultRow]:
    """Trajectories worth seeing: refined and satisfied, refined and failed, never refined, in turn."""
    refined = [row for row in rows if Action.REFINE in row.actions]
    groups = [
        [row for row in refined if row.scores.get("success")],
        [row for row in rows if Action.REFINE not in row.actions],
        [row for row in refined if not row.scores.get("success")],
    ]
    turns = [group[k] for k in range(max(map(len, groups))) for group in groups if k < len(group)]
    return turns[:number]


def record_filmstrips(
    rows: list[ResultRow], items: Sequence[Item], agent: Agent, env: DiffusionDenoiseVectorEnv
) -> list[Strip]:
    """Run the rows' items again, one by one, and keep what happened."""
    known = {(item.prompt, item.seed): item for item in items}
    strips = []
    for row in rows:
        item = known[row.prompt, row.seed]
        strips.append(Strip(item, row.reason, record_trajectory(env, agent.act, item)))
    return strips


def controls_of(rows: list[ResultRow], env: DiffusionDenoiseVectorEnv, full: DiffusionDenoiseVectorEnv) -> list[Method]:
    """H4's controls: the agent's decisions with refinements of the whole picture, and its NFE in plain steps."""
    scripts = {(row.prompt, row.seed): row for row in rows}
    return [Replay(full, FULL_IMAGE, scripts), MatchedSteps(env, CONTINUED, scripts)]


def decide(rows: list[ResultRow], items: Sequence[Item]) -> list[Verdict]:
    """Verdicts on H1-H4 from the rows."""
    return all_verdicts(rows, {(item.prompt, item.seed): item.facts for item in items})


def make_rows(
    cfg: DictConfig, evaluation: Evaluation, items: Sequence[Item], agent: Agent, overrides: dict[str, Any]
) -> list[ResultRow]:
    """Run every method and H4's controls on ``items``; what is there already is not made again."""
    env = evaluation.env
    methods = [make_method(spec, env, agent) for spec in cfg.methods]  # a misspelt one stops us before any work
    results = {method.name: evaluation.run(method, items) for method in methods}
    if "agent" in results and cfg.controls:
        full = make_agent_env(agent, cfg.num_envs, **overrides | {"mask": "full"})
        for control in controls_of(results["agent"], env, full):
            results[control.name] = evaluation.run(control, items)
    return [row for group in results.values() for row in group]


def keep_run(
    cfg: DictConfig, folder: Path, rows: list[ResultRow], items: Sequence[Item], agent: Agent, overrides: dict[str, Any]
) -> None:
    """Keep what the report needs to be made again, and what a reader needs to run this again."""
    env = agent.config["env"]
    environment = {"id": env["id"], **env["kwargs"], **overrides}
    record = benchmark_record(cfg.benchmark.name, items)
    write_items(folder, items)
    write_provenance(folder, rows, **record, agent=agent.fingerprint, environment=environment)


def report(
    cfg: DictConfig, folder: Path, rows: list[ResultRow], items: Sequence[Item], agent: Agent, overrides: dict[str, Any]
) -> None:
    """Write and print the table and the verdicts; write the plot, the filmstrips, ``report.html`` and its exports."""
    table = summary_table(rows)
    (folder / "table.txt").write_text(table + "\n")
    written = [folder / "table.txt", folder / "rows.jsonl", folder / "quality_vs_compute.png"]
    plot_quality_against_compute(rows, written[-1])
    print(f"\n{cfg.benchmark.name}, {len(items)} prompts, {rows[0].dtype}; success (%) by the exact checker")
    print(f"{table}\n")
    own = [row for row in rows if row.method == "agent"]
    strips: list[Strip] = []
    if own and cfg.filmstrips:
        one_lane = make_agent_env(agent, 1, **overrides)
        strips = record_filmstrips(choose_filmstrips(own, cfg.filmstrips), items, agent, one_lane)
        written.append(folder / "filmstrips.png")
        plot_filmstrips(strips, written[-1])
    verdicts = decide(rows, items) if own else []
    print("\n".join(map(describe, verdicts)) + "\n")
    keep_run(cfg, folder, rows, items, agent, overrides)
    save_strips(folder, strips)
    write_verdicts(folder, verdicts)
    written += [folder / "verdicts.json", *write_report(folder, rows, items, verdicts)]
    print("wrote")
    for path in written:
        print(f"  {path}")


@hydra.main(version_base="1.3", config_path="configs", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    """Make this shard's rows, or merge those of all; report once they are whole."""
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    folder = Path(HydraConfig.get().runtime.output_dir)
    items = load_benchmark(cfg.benchmark.name, cfg.benchmark.limit)
    agent = Agent.load(cfg.agent)
    overrides: dict[str, Any] = OmegaConf.to_container(cfg.env)  # type: ignore[assignment]
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(cfg))
    if cfg.shard.merge:
        rows = merge_shards(folder, cfg.shard.count, [(item.prompt, item.seed) for item in items])
        (folder / "rows.jsonl").unlink(missing_ok=True)
        append_rows(folder / "rows.jsonl", rows)
    else:
        path = shard_path(folder, cfg.shard.index, cfg.shard.count)
        evaluation = Evaluation(path, make_agent_env(agent, cfg.num_envs, **overrides), cfg.save_images)
        rows = make_rows(cfg, evaluation, shard(items, cfg.shard.index, cfg.shard.count), agent, overrides)
        if cfg.shard.count > 1:
            print(f"shard {cfg.shard.index} of {cfg.shard.count}: {len(rows)} rows in {path}; then: shard.merge=true")
            return
    report(cfg, folder, rows, items, agent, overrides)


if __name__ == "__main__":
    main()
