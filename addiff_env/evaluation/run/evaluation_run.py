"""One evaluation, as its steps share it: configuration, folder, benchmark, agents and, once they are made, rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from addiff_env.agent import Agent
from addiff_env.env.vector import DiffusionDenoiseVectorEnv
from addiff_env.evaluation.benchmarks.items import Item, check_number, load_prompts
from addiff_env.evaluation.files import RunFolder
from addiff_env.evaluation.methods.diffusers_methods import MethodOptions
from addiff_env.evaluation.methods.registry import first_price
from addiff_env.evaluation.metrics.registry import default_metrics
from addiff_env.evaluation.run.fingerprint import run_fingerprint
from addiff_env.evaluation.run.planning import named_agents
from addiff_env.evaluation.run.rows import shard_path
from addiff_env.evaluation.statistics.families import at_price
from addiff_env.pipeline import make_agent_env
from addiff_env.types import ResultRow


def plain(cfg: DictConfig) -> dict[str, Any]:
    """A group of the configuration as a dictionary."""
    return OmegaConf.to_container(cfg, resolve=True)  # type: ignore[return-value]


def listed(setting: Any) -> list[str]:
    """A setting that may be one name or a list of names."""
    return [setting] if isinstance(setting, str) else list(setting)


@dataclass
class EvaluationRun:
    """What a configuration asks for, in a run folder; each part is read when it is first asked for, and once.

    Args:
        cfg: the configuration.
        folder: of the run.
        place: index of this process's shard, and number of shards.
        launched: whether a launcher started this process as one of several.
        rows: of the methods asked for, once they are made.
    """

    cfg: DictConfig
    folder: Path
    place: tuple[int, int] = (0, 1)
    launched: bool = False
    rows: list[ResultRow] = field(default_factory=list)

    @property
    def files(self) -> RunFolder:
        """The run's files."""
        return RunFolder(self.folder)

    @property
    def rows_path(self) -> Path:
        """Where this process writes its rows."""
        return shard_path(self.folder, *self.place)

    @property
    def is_split(self) -> bool:
        """Whether the rows are made in several shards."""
        return self.place[1] > 1

    @cached_property
    def prompts(self) -> list[list[Item]]:
        """The whole benchmark, whatever its limit, which may grow: the pictures of each prompt."""
        b = self.cfg.benchmark
        return load_prompts(b.name, root=b.root, images_per_prompt=b.images_per_prompt, any_length=b.any_length)

    @property
    def benchmark(self) -> list[Item]:
        """All items of the whole benchmark."""
        return [item for group in self.prompts for item in group]

    @cached_property
    def items(self) -> list[Item]:
        """The items to make; of a benchmark that has fewer prompts than its limit all, which is said.

        Raises:
            ValueError: a limit that is no whole number of at least 1; and as `load_prompts`.
        """
        limit = self.cfg.benchmark.limit
        check_number("benchmark.limit", limit)
        if limit is not None and (number := len(self.prompts)) < limit:
            print(
                f"benchmark.limit={limit}: {self.cfg.benchmark.name} has {number:,} prompts, and all of them are taken"
            )
        return [item for group in self.prompts[:limit] for item in group]

    @cached_property
    def agents(self) -> dict[str, Agent]:
        """Agents by the name of their rows; raises as `named_agents`."""
        return named_agents(self.cfg.agent, listed(self.cfg.agents))

    @property
    def agent(self) -> Agent:
        """The first one."""
        return next(iter(self.agents.values()))

    @cached_property
    def price(self) -> float | None:
        """Of an evaluation, at which agents are judged: the first that a method names; None: they have no price input.

        Raises:
            ValueError: as `first_price`.
        """
        return first_price([] if isinstance(self.cfg.methods, str) else self.cfg.methods, self.agent)

    @property
    def runs(self) -> list[str]:
        """Names of the agents' rows that verdicts are about."""
        return [at_price(name, self.price) for name in self.agents]

    @property
    def agent_name(self) -> str:
        """The first one's, whose controls are made."""
        return self.runs[0]

    @cached_property
    def overrides(self) -> dict[str, Any]:
        """Settings of the environment that differ from the agents' own."""
        return plain(self.cfg.env)

    @cached_property
    def options(self) -> MethodOptions:
        """Of the methods."""
        return MethodOptions.read(plain(self.cfg.method_options))

    @cached_property
    def metrics(self) -> list[str]:
        """What is measured of each picture, as settings."""
        return default_metrics(self.items) if self.cfg.metrics is None else listed(self.cfg.metrics)

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What the rows depend on; of the benchmark the whole, so that its limit may grow. Raises as `run_fingerprint`.

        Benchmark and agents are read for it: whatever is wrong with them is found here.
        """
        metrics, name = self.metrics, self.cfg.benchmark.name
        return run_fingerprint(self.agents, self.overrides, metrics, self.benchmark, self.options, name)

    def make_env(self, num_envs: int, **further: Any) -> DiffusionDenoiseVectorEnv:
        """The environment that the first agent acts in."""
        return make_agent_env(self.agent, num_envs, **self.overrides | further)

    def own_rows(self, rows: Sequence[ResultRow]) -> list[ResultRow]:
        """Those of ``rows`` that the first agent made."""
        return [row for row in rows if row.method == self.agent_name]
