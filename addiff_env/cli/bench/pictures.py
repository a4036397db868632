"""Comparisons of whole pictures: continuous batching, and how time and memory a picture grow with lanes and prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from addiff_env.cli.bench.memory import peak_of
from addiff_env.cli.bench.rounds import Figure, Side
from addiff_env.cli.bench.subject import Subject
from addiff_env.pipeline import AdaptivePipeline, LaneScheduler
from addiff_env.types import Generated

MIB = 2**20
BASE_LANES, BASE_PROMPTS = 16, 64  # what other numbers of lanes and prompts are compared with
PICTURES_A_SIZE = 128  # of scaling: a size whose run makes more pictures is measured once
BATCHING_ROUNDS = 3  # at most: runs are long


def batching(subject: Subject) -> list[Figure]:
    """Lanes that refill at once against batches that end together, and against full batches of such steps."""
    made: dict[str, list[Generated]] = {}

    def play(name: str, full: bool, together: int, number: int) -> None:
        lanes, requests = LaneScheduler(subject.acting, subject.agent, full_batches=full), subject.requests(number)
        parts = [requests[at : at + together] for at in range(0, number, together)]
        made[name] = [one for part in parts for group in lanes.run(part) for _, one in group]

    def side(name: str, full: bool, together: int) -> Side:
        few = min(subject.lanes, subject.prompts)
        return Side(
            partial(play, name, full, together, subject.prompts), first=partial(play, name, full, together, few)
        )

    sides = {
        "continuous": side("continuous", True, subject.prompts),
        "actions apart": side("actions apart", False, subject.prompts),
        "fixed batches": side("fixed batches", True, subject.lanes),
        "full batch with looks": Side(lambda: subject.continues(subject.acting)),
        "full batch without looks": Side(lambda: subject.continues(subject.blind)),
    }
    found = subject.timed("batching", sides, BATCHING_ROUNDS)
    figures = [
        Figure("batching", f"{name} / continuous", (found[name] / found["continuous"]).tolist())
        for name in ("fixed batches", "actions apart")
    ]
    batches = full_batches([one.nfe for one in made["continuous"]], subject)
    for name in ("full batch with looks", "full batch without looks"):
        share = batches * found[name] / found["continuous"]
        figures.append(Figure("batching", f"share of the ideal, {name.removeprefix('full batch ')}", share.tolist()))
    nfe = float(np.mean([one.nfe for one in made["continuous"]]))
    return [*figures, Figure("batching", "of a picture", [nfe], "NFE")]


def full_batches(nfe: Sequence[int], subject: Subject) -> float:
    """Whole schedules of all lanes that have as many evaluations as pictures of these ``nfe``."""
    return sum(nfe) / (subject.lanes * subject.acting.config.num_inference_steps)


# --------------------------------------------------------------------------- scaling


def scaling(subject: Subject, lanes: Sequence[int], prompts: Sequence[int]) -> Iterator[Figure]:
    """Seconds and memory a picture through the pipeline, for numbers of lanes and of prompts, next to a baseline's.

    The baseline, of `BASE_PROMPTS` pictures on `BASE_LANES` lanes, is timed before and after each run. Memory is what
    a run takes beyond what was in use before it, models not included.
    """
    pipelines: dict[int, AdaptivePipeline] = {}

    def run(num_envs: int, number: int) -> None:
        if num_envs not in pipelines:
            for other in set(pipelines) - {BASE_LANES}:
                del pipelines[other]
            pipelines[num_envs] = AdaptivePipeline(subject.acting_env(num_envs), subject.agent)
            pipelines[num_envs].set_progress_bar_config(disable=True)
        texts = subject.texts(number)
        for _ in pipelines[num_envs].stream(texts, seeds=list(range(number)), price=subject.price):
            pass

    for number in lanes:
        yield from _size(subject, f"{number} lanes", run, number, BASE_PROMPTS)
    for number in prompts:
        yield from _size(subject, f"{number} prompts", run, BASE_LANES, number)


def _size(subject: Subject, name: str, run: Callable[[int, int], None], lanes: int, pictures: int) -> Iterator[Figure]:
    """The figures of one size, a run of which makes so many ``pictures`` on so many ``lanes``."""
    peaks: list[int | None] = []

    def watched() -> None:
        peaks.append(peak_of(partial(run, lanes, pictures), subject.rounds.device))

    sides = {
        "baseline": Side(partial(run, BASE_LANES, BASE_PROMPTS), first=partial(run, BASE_LANES, BASE_LANES)),
        "size": Side(watched, first=partial(run, lanes, min(lanes, pictures))),
    }
    rounds = max(1, min(subject.rounds.number, PICTURES_A_SIZE // pictures))
    turns = [["baseline", "size"]] * rounds + [["baseline"]]
    found = list(
        subject.rounds.whole(
            f"scaling, {name}", turns, lambda side: subject.rounds.seconds(sides[side]), sides.values()
        )
    )
    timed = [turn for turn in found if "size" in turn]
    if not timed:
        raise KeyboardInterrupt
    following = [*found[1:], found[-1]]  # whose baseline was timed after this one's size
    around = [[turn["baseline"], after["baseline"]] for turn, after in zip(timed, following, strict=False)]
    baseline_seconds = np.mean(around, axis=1) / BASE_PROMPTS
    seconds = np.array([turn["size"] for turn in timed]) / pictures
    kept = subject.seconds.setdefault("scaling", {})
    kept[name], kept[f"{name}, baseline"] = seconds.tolist(), baseline_seconds.tolist()
    yield Figure("scaling", f"{name} / baseline, a picture", (seconds / baseline_seconds).tolist())
    yield Figure("scaling", name, seconds.tolist(), "s a picture")
    memory = [peak / MIB for peak in peaks[: len(timed)] if peak is not None]
    if memory:
        yield Figure("scaling", f"{name}, at most", memory, "MiB")
