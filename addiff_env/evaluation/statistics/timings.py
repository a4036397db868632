"""Seconds a picture as a cost: measured in turns on one machine, apart from the seconds that rows happened to take.

A method is timed on a sample of a run's prompts, in several rounds. A picture of the run is said to take the method's
median seconds, in proportion to its own net FLOPs: ``seconds = median * net FLOPs / mean net FLOPs of the sample``. So
a policy's pictures cost what they spent, and a sample that happens to be easy makes nobody cheap. How far rounds
differ is part of the uncertainty: a bootstrap draws rounds beside prompts, the same ones for every method, which
were timed side by side.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from addiff_env.evaluation.statistics.summary import counted
from addiff_env.types import ResultRow

TIMED = "timed_seconds"  # the cost, as a row's field
COMMAND = "addiff time RUN"
BUSY = 0.5  # a load average above what the measurement itself explains by so much is another program's
UNEVEN = 0.1  # relative spread of a method's rounds from which on it is remarked


@dataclass(frozen=True)
class MethodTiming:
    """One method's time.

    Attributes:
        seconds: a picture, in each round.
        nfe, net_flops: means over the sample's pictures.
        made_by: backbone, solver, policy and dtype, as the rows that it stands for have them.
    """

    seconds: tuple[float, ...]
    nfe: float
    net_flops: float
    made_by: Mapping[str, str] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """Seconds a picture of the sample."""
        return float(np.median(self.seconds))

    @property
    def spread(self) -> float:
        """Slowest less fastest round, as a share of the median."""
        return (max(self.seconds) - min(self.seconds)) / self.median if self.median else 0.0

    def of(self, row: ResultRow) -> float:
        """Seconds that a row's picture takes, in proportion to its net FLOPs."""
        return self.median * (row.net_flops / self.net_flops if self.net_flops else 1.0)


@dataclass(frozen=True)
class Timings:
    """What a run's methods take, measured in turns.

    Attributes:
        methods: by name; all have the same rounds.
        untimed: why others could not be timed.
        machine: where it was measured: processor, cores, threads, device, versions.
        settings: rounds that were asked for, pictures of the sample, batch size, seed.
        sessions: of each process that measured rounds: date, rounds, load average before and after.
        code_version: of the code that was timed.
        made_with: the settings that the run's rows depend on, as its folder kept them.
    """

    methods: Mapping[str, MethodTiming] = field(default_factory=dict)
    untimed: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    sessions: Sequence[Mapping[str, Any]] = ()
    code_version: str = ""
    made_with: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rounds(self) -> int:
        """How many were finished."""
        return min((len(one.seconds) for one in self.methods.values()), default=0)

    def onto(self, rows: Iterable[ResultRow]) -> list[ResultRow]:
        """The rows with their `TIMED` seconds; None where `why_untimed` has a reason."""
        found = list(rows)
        without = self.why_untimed(found)
        return [
            replace(row, timed_seconds=None if row.method in without else self.methods[row.method].of(row))
            for row in found
        ]

    def why_untimed(self, rows: Sequence[ResultRow]) -> dict[str, str]:
        """Methods of the rows that have no time, each with the reason."""
        found = {}
        for row in {row.method: row for row in rows}.values():
            timing = self.methods.get(row.method)
            if timing is None or not timing.seconds:
                found[row.method] = self.untimed.get(row.method, "it was not among the methods timed")
            elif other := {part: by for part, by in timing.made_by.items() if getattr(row, part) != by}:
                words = [f"{part} {by}, the rows' is {getattr(row, part)}" for part, by in other.items()]
                found[row.method] = f"timed with another {'; '.join(words)}"
        return found

    def factors(self, names: Sequence[str], draws: int, seed: int) -> dict[str, np.ndarray]:
        """By what resampled rounds multiply each method's seconds, (draws,); the same rounds of every method.

        Raises:
            ValueError: a method that was not timed.
        """
        if without := [name for name in names if name not in self.methods]:
            raise ValueError(f"not timed: {', '.join(without)}; timed were {', '.join(self.methods) or 'none'}")
        picked = np.random.default_rng([seed, 1]).integers(self.rounds, size=(draws, self.rounds))
        found = {}
        for name in names:
            timing = self.methods[name]
            found[name] = np.median(np.array(timing.seconds[: self.rounds])[picked], axis=1) / timing.median
        return found

    def cautions(self, rows: Sequence[ResultRow] = ()) -> list[str]:
        """What makes the numbers doubtful, in words; nothing where nothing does."""
        found = []
        threads = float(self.machine.get("threads") or 1)
        for session in self.sessions:
            before, after = session.get("load_before"), session.get("load_after")
            if before is not None and before > BUSY:
                found.append(f"the machine was busy: load average {before:.1f} before the measurement")
            if after is not None and after > threads + BUSY:
                found.append(
                    f"the machine was busy: load average {after:.1f} after the measurement by {threads:g} threads"
                )
        if self.rounds == 1:
            found.append("one round does not tell how far times vary")
        if uneven := [name for name, one in self.methods.items() if one.spread > UNEVEN]:
            worst = max(uneven, key=lambda name: self.methods[name].spread)
            found.append(
                f"the rounds of {len(uneven)} of {len(self.methods)} methods differ by over {100 * UNEVEN:g}%, "
                f"of {worst} by {100 * self.methods[worst].spread:.0f}%"
            )
        versions = {row.code_version for row in rows}
        if self.code_version and versions - {self.code_version}:
            found.append(f"timed by code {self.code_version}, the rows are by {', '.join(sorted(versions))}")
        return list(dict.fromkeys(found))


def check_timings(timings: Timings) -> None:
    """Check that every method has the same rounds, and that all numbers are possible.

    Raises:
        ValueError: which has not.
    """
    for name, one in timings.methods.items():
        if len(one.seconds) != timings.rounds or not one.seconds:
            raise ValueError(f"{name!r} has {len(one.seconds)} rounds, others {timings.rounds}")
        if not all(0 < seconds < np.inf for seconds in one.seconds) or not 0 <= one.net_flops < np.inf:
            raise ValueError(f"impossible numbers of {name!r}: {one.seconds} seconds, {one.net_flops} net FLOPs")


def describe_machine(timings: Timings) -> str:
    """Where and how it was measured, as one line."""
    machine, settings = timings.machine, timings.settings
    place = machine.get("processor", "an unnamed processor")
    if machine.get("device", "cpu") != "cpu":
        place = f"{machine['device']} ({place})"
    dates = sorted({str(session["date"])[:10] for session in timings.sessions if "date" in session})
    loads = [(one.get("load_before"), one.get("load_after")) for one in timings.sessions]
    parts = [
        place,
        *(counted(machine[name], name.removesuffix("s")) for name in ("cores", "threads") if machine.get(name)),
        str(machine.get("dtype", "")),
        f"{counted(timings.rounds, 'round')} in turns over the same {counted(settings.get('pictures', 0), 'picture')}",
        f"batches of {settings.get('batch_size')}",
        f"PyTorch {machine.get('torch')}",
        " and ".join(dates),
        ", ".join(f"load {low:.1f} before and {high:.1f} after" for low, high in loads if None not in (low, high)),
    ]
    return ", ".join(filter(None, parts))
