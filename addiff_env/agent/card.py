"""The model card of an agent: what it does, how to run it, what was measured."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Protocol

from addiff_env.agent.price_table import PriceTable


class Described(Protocol):
    """What a card tells of an agent; `addiff_env.agent.Agent` has it."""

    config: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """Of the weights."""

    @property
    def price_range(self) -> tuple[float, float] | None:
        """Prices that it was trained for."""

    @property
    def price_table(self) -> PriceTable | None:
        """What was measured at which."""


def model_card(agent: Described, repo_id: str) -> str:
    """Markdown for the Hub: what the agent does, how to run it, what was measured."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        model_name=repo_id.split("/")[-1],
        library_name="addiff-env",
        pipeline_tag="text-to-image",
        tags=["reinforcement-learning", "diffusion", "gymnasium"],
        eval_results=_eval_results(agent) or None,
    )
    return f"---\n{data.to_yaml()}\n---\n{_card_text(agent, repo_id)}"


def _eval_results(agent: Described) -> list[Any]:
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="text-to-image",
            dataset_type=benchmark,
            dataset_name=benchmark,
            metric_type=metric,
            metric_value=value,
        )
        for benchmark, metrics in agent.config.get("results", {}).items()
        for metric, value in metrics.items()
    ]


def _card_text(agent: Described, repo_id: str) -> str:
    training, results = agent.config.get("training", {}), agent.config.get("results", {})
    held_out = {f"held_out/{name}": value for name, value in training.get("held_out", {}).items()}
    measured = [_markdown_table(name, values) for name, values in results.items()]
    measured += [_price_section(agent.price_table)] if agent.price_table else []
    numbers = training.get("last_rollout", {}) | held_out
    return _CARD_TEXT.format(
        name=repo_id.split("/")[-1],
        repo_id=repo_id,
        price=_example_price(agent),
        env=agent.config.get("env", {}).get("id", "an unnamed environment"),
        measured="\n\n".join(measured) or "Not yet evaluated on a benchmark.",
        timesteps=training.get("timesteps", "an unknown number of"),
        seed=training.get("seed", "unknown"),
        fingerprint=agent.fingerprint,
        training=_markdown_table("last rollout, held-out prompts", numbers) if numbers else "",
    )


_CARD_TEXT = """
# {name}

A policy that decides, step by step, how a text-to-image diffusion model spends its evaluations: continue, stop, or
refine a region. Trained on `{env}`; the diffusion model's weights are not in here and were not changed.

```python
from addiff_env.pipeline import AdaptivePipeline

pipe = AdaptivePipeline.from_pretrained("{repo_id}")
output = pipe("a red circle left of a blue star", seeds=7{price})
output.images[0].save("picture.png")
print(output.nfe)
```

Two files, `agent.safetensors` and `agent.json`; loading them runs no code.

## Measured

{measured}

## Training

{timesteps} decisions, seed {seed}; weights `{fingerprint}`.

{training}
"""


def _example_price(agent: Described) -> str:
    """The argument that a call needs, if the agent acts by a price."""
    if agent.price_range is None:
        return ""
    table = agent.price_table
    if table is None:
        return f", price={agent.price_range[0]:g}"
    return f", target_nfe={table.points[len(table.points) // 2].nfe:.3g}"


def _price_section(table: PriceTable) -> str:
    """A row for each price that was measured."""
    names = [name for name, value in asdict(table.points[0]).items() if value is not None]
    rows = [[getattr(point, name) for name in names] for point in table.points]
    lines = ["| " + " | ".join("-" if value is None else f"{value:.4g}" for value in row) + " |" for row in rows]
    return "\n".join(["| " + " | ".join(names) + " |", "|---" * len(names) + "|", *lines])


def _markdown_table(title: str, values: dict[str, Any]) -> str:
    rows = [f"| {name} | {value} |" for name, value in values.items()]
    return "\n".join([f"| {title} | value |", "|---|---|", *rows])
