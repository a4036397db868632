"""Compare a trained agent with fixed-step inference on held-out prompts.

    addiff evaluate                          the demo: the shipped agent, 48 prompts of the embedded world
    addiff evaluate methods=all benchmark.limit=null hydra.run.dir=runs/reproduce     all there is
    addiff evaluate agent=runs/train/tiny-seed0/agent hydra.run.dir=runs/mine
    addiff evaluate shard.index=0 shard.count=4 hydra.run.dir=runs/mine      one quarter; then shard.merge=true
    accelerate launch --multi_gpu evaluate.py hydra.run.dir=runs/mine          one process per GPU, merged by the last
    torchrun --nproc_per_node 2 evaluate.py hydra.run.dir=runs/mine             the same without GPUs
    addiff evaluate methods=all hydra.run.dir=runs/all                       every method that applies to the model
    addiff evaluate agents=[runs/a/agent,runs/b/agent] hydra.run.dir=runs/ab several training seeds
    addiff evaluate benchmark.name=geneval benchmark.root=data metrics=[geneval] methods=all agent=runs/sd15/agent

Rows are appended to <run folder>/rows.jsonl as they are made; the same command goes on where it was stopped, and may
add methods. With other settings than the folder's rows were made with it is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from addiff_env.evaluation.run import runner
from addiff_env.evaluation.run.rows import count_rows, launched_shard, shard_path
from addiff_env.storage.commands import interruptible
from addiff_env.storage.files import claim, told_when_full
from addiff_env.storage.hydra_app import run_hydra


def evaluate(cfg: DictConfig) -> None:
    """Make this shard's rows, or merge those of all; report once they are whole.

    Shards of one split work side by side in a folder, anything else there is refused.
    """
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    asked = (cfg.shard.index, cfg.shard.count)
    place = asked if cfg.shard.merge else launched_shard(*asked)
    path = shard_path(folder := Path(HydraConfig.get().runtime.output_dir), *place)
    is_part = place[1] > 1 and not cfg.shard.merge
    group, member = (f"shards of {place[1]}", str(place[0])) if is_part else ("", "")
    with (
        interruptible(lambda: f"{count_rows(path)} rows are kept in {path}"),
        claim(folder, "an evaluation", group, member, instead="take another folder: hydra.run.dir=..."),
        told_when_full(folder),
    ):
        runner.run(cfg, folder, place, place != asked)


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate as Hydra's command line says; returns the exit status."""
    return run_hydra(evaluate, "evaluate", argv)
