"""Have vision-language models judge a finished run: whose picture of the same prompt and noise do they prefer?

    addiff judge runs/mine --judges gpt4o gemini --estimate
    addiff judge runs/mine --judges gpt4o gemini --methods agent ddim-50 --max-usd 5

A judge called ``gpt4o`` is set up by the environment variables ``ADDIFF_JUDGE_GPT4O_MODEL``, ``..._USD_IN`` and
``..._USD_OUT`` (dollars per million tokens), ``..._API_KEY``, and if wanted ``..._BASE_URL``, ``..._MAX_USD``,
``..._ANSWER_TOKENS``, ``..._IMAGE_TOKENS`` (what the model bills for a picture) and ``..._TEMPERATURE``. Every pair of
methods is asked about on every picture, both ways round. What it costs, about, is said first, and nothing is asked
where that, with what earlier runs spent, exceeds the ceiling; where the first answers turn out to cost more, no further
ones are asked for. Answers lie in ``judge-answers.jsonl`` of the run folder, so that the same command goes on where it
was stopped; the result is ``judge.json``, which ``report.html`` shows.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

from tqdm import tqdm

from addiff_env.evaluation.benchmarks.items import check_number
from addiff_env.evaluation.files import RunFolder
from addiff_env.evaluation.report.html import write_report
from addiff_env.evaluation.run.run_folder import read_items, read_verdicts, reported_rows
from addiff_env.evaluation.statistics.summary import by_method
from addiff_env.evaluation.vlm_judge.agreement import cohens_kappa, rank_methods
from addiff_env.evaluation.vlm_judge.client import Judge, JudgeError
from addiff_env.evaluation.vlm_judge.pairs import OUTCOMES, Pair, Preference, pairs_of
from addiff_env.evaluation.vlm_judge.settings import JudgeSettings
from addiff_env.loading.paths import looked_at
from addiff_env.stats import wilson_interval
from addiff_env.storage.commands import interruptible
from addiff_env.storage.files import claim, write_whole
from addiff_env.types import ResultRow

# --------------------------------------------------------------------------- what is judged


def run_pairs(
    folder: Path, rows: Sequence[ResultRow], methods: Sequence[str] | None = None, limit: int | None = None
) -> list[Pair]:
    """Every pair of methods on every picture of a run.

    Args:
        folder: of the run.
        rows: with the paths of their pictures, relative to ``folder``.
        methods: whose pictures are compared; by default all.
        limit: the first prompts only, with all their pictures.

    Raises:
        ValueError: a method that was not run (the known ones are listed), fewer than two, or a limit below 1; pictures
            that were not kept, or that lie outside the run folder.
    """
    known = by_method(rows)
    chosen = list(dict.fromkeys(methods or known))
    if unknown := [name for name in chosen if name not in known]:
        raise ValueError(f"no rows of {unknown}; the run has {', '.join(known)}")
    if len(chosen) < 2:
        raise ValueError(f"a comparison needs two methods, got {chosen}; the run has {', '.join(known)}")
    check_number("limit", limit)
    prompts = set(list(dict.fromkeys(row.prompt for row in rows))[:limit])
    places = list(dict.fromkeys((row.prompt, row.seed) for row in rows if row.prompt in prompts))
    return pairs_of({name: _pictures(folder, known[name]) for name in chosen}, places)


def _pictures(folder: Path, rows: Sequence[ResultRow]) -> dict[tuple[str, int], Path]:
    """The pictures that a method's rows name and that are there."""
    found = {(row.prompt, row.seed): folder / row.image for row in rows if row.image}
    for path in found.values():
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{path} lies outside the run folder {folder}")
    return {place: path for place, path in found.items() if path.exists()}


# --------------------------------------------------------------------------- asking


def open_judges(names: Sequence[str], folder: Path, again: bool = False) -> dict[str, Judge]:
    """The judges by name, see the module; all share the run's file of answers.

    Raises:
        ValueError: no names, one named twice, variables that are missing or no numbers, or two names of one model.
    """
    if not names or len(set(names)) < len(names):
        raise ValueError(f"expected judges, each once, got {list(names)}")
    judges = {
        name: Judge(JudgeSettings.from_environment(name), RunFolder(folder).judge_answers, again) for name in names
    }
    for one, other in combinations(judges, 2):
        if judges[one].endpoint == judges[other].endpoint:
            raise ValueError(f"{one!r} and {other!r} are the same judge, {judges[one].settings.model}")
    return judges


def check_budget(judges: Mapping[str, Judge], pairs: Sequence[Pair], max_usd: float | None) -> None:
    """Say about what asking all judges costs without repeats, before anything is asked.

    Raises:
        CostCeilingError: with what was spent before it exceeds ``max_usd``, or a judge's own ceiling.
    """
    for name, judge in judges.items():
        estimate, spent = judge.estimate_usd(pairs), judge.spent_usd
        print(f"{name} ({judge.settings.model}): {len(pairs)} pairs cost about ${estimate:.2f}, ${spent:.2f} is spent")
    for name, judge in judges.items():
        _share_ceiling(judges, name, pairs, max_usd)
        judge.require_budget(pairs)


def _share_ceiling(judges: Mapping[str, Judge], name: str, pairs: Sequence[Pair], max_usd: float | None) -> None:
    """Leave to a judge what of ``max_usd`` the others have not spent, and will not need."""
    if max_usd is not None:
        others = sum(judge.spent_usd + judge.estimate_usd(pairs) for key, judge in judges.items() if key != name)
        judges[name].ceiling_usd = min(judges[name].settings.max_usd, max_usd - others)


def ask_all(
    judges: Mapping[str, Judge], pairs: Sequence[Pair], max_usd: float | None = None
) -> dict[str, list[Preference]]:
    """Every judge's preferences; raises as `Judge.compare`.

    Repeats of unusable answers cost more than estimated: no judge may spend what those after it were promised.
    """
    found: dict[str, list[Preference]] = {}
    for name, judge in judges.items():
        _share_ceiling(judges, name, pairs, max_usd)
        found[name] = judge.compare(pairs, partial(tqdm, desc=name, unit="question"))
    return found


# --------------------------------------------------------------------------- what they say


def describe_pair(preferences: Sequence[Preference]) -> dict[str, Any]:
    """Shares of wins and ties of two methods' pairs, with 95% intervals.

    Intervals are Wilson's with as many trials as there are prompts, as if the pictures of one prompt always agreed.
    """
    answered = [p for p in preferences if p.winner]
    prompts = len({p.prompt for p in answered})
    shares = {}
    for outcome in OUTCOMES if answered else ():
        share = sum(p.winner == outcome for p in answered) / len(answered)
        low, high = wilson_interval(share * prompts, prompts)
        shares[outcome] = {"share": share, "low": low, "high": high}
    return {
        "method_a": preferences[0].method_a,
        "method_b": preferences[0].method_b,
        "pairs": len(answered),
        "prompts": prompts,
        "unanswered": len(preferences) - len(answered),
        "inconsistent": sum(not p.consistent for p in answered),  # the two orders disagreed: counted as ties
        **shares,
    }


def describe_judge(preferences: Sequence[Preference]) -> dict[str, Any]:
    """One judge's (or all judges') rates and ranking; where there is none it is empty, and a note says why."""
    groups: dict[tuple[str, str], list[Preference]] = {}
    for p in preferences:
        groups.setdefault((p.method_a, p.method_b), []).append(p)
    found: dict[str, Any] = {"pairs": [describe_pair(group) for group in groups.values()], "ranking": [], "note": ""}
    try:
        found["ranking"] = [asdict(strength) for strength in rank_methods(preferences)]
    except ValueError as error:
        found["note"] = str(error)
    return found


def agreement(by_judge: Mapping[str, Sequence[Preference]]) -> list[dict[str, Any]]:
    """How far each two judges agree: share of equal answers, and Cohen's kappa (None, with a note, where undefined)."""
    found = []
    for (one, first), (other, second) in combinations(by_judge.items(), 2):
        both = [(p.winner, q.winner) for p, q in zip(first, second, strict=True) if p.winner and q.winner]
        entry: dict[str, Any] = {"judges": [one, other], "pairs": len(both), "same": None, "kappa": None, "note": ""}
        if both:
            entry["same"] = sum(p == q for p, q in both) / len(both)
        try:
            entry["kappa"] = cohens_kappa(first, second)
        except ValueError as error:
            entry["note"] = str(error)
        found.append(entry)
    return found


def judgement(judges: Mapping[str, Judge], by_judge: Mapping[str, Sequence[Preference]]) -> dict[str, Any]:
    """What ``judge.json`` holds."""
    together = [p for preferences in by_judge.values() for p in preferences]
    places = {(p.prompt, p.seed) for p in together}
    return {
        "prompts": len({prompt for prompt, _ in places}),
        "pictures": len(places),
        "methods": list(dict.fromkeys(name for p in together for name in (p.method_a, p.method_b))),
        "spent_usd": sum(judge.spent_usd for judge in judges.values()),
        "judges": {
            name: {"model": judge.settings.model, "spent_usd": judge.spent_usd, **describe_judge(by_judge[name])}
            for name, judge in judges.items()
        },
        "together": describe_judge(together),
        "agreement": agreement(by_judge),
    }


def write_judgement(folder: Path, found: Mapping[str, Any]) -> Path:
    """Keep it beside the run's rows; a kill leaves the old file or the new one."""
    path = RunFolder(folder).judgement
    write_whole(path, json.dumps(found, indent=2) + "\n")
    return path


def describe(found: Mapping[str, Any]) -> str:
    """The result in a few lines."""
    lines = []
    for name, one in found["judges"].items():
        lines.append(f"{name} ({one['model']}), ${one['spent_usd']:.2f}")
        for pair in one["pairs"]:
            rates = ", ".join(f"{word} {100 * pair[key]['share']:.1f}%" for key, word in _WORDS if key in pair)
            lines.append(
                f"  {pair['method_a']} against {pair['method_b']}: {rates or 'no answers'} ({pair['pairs']} pairs)"
            )
    for pair in found["agreement"]:
        kappa = "undefined" if pair["kappa"] is None else f"{pair['kappa']:.3f}"
        lines.append(f"{' and '.join(pair['judges'])}: kappa {kappa}")
    lines += ["Bradley-Terry log-strengths:"] if found["together"]["ranking"] else []
    for strength in found["together"]["ranking"]:
        low, high = strength["low"], strength["high"]
        ends = "" if low is None else f" [{low:+.3f}, {high:+.3f}]"
        lines.append(f"  {strength['method']}: {strength['estimate']:+.3f}{ends}")
    return "\n".join(lines)


_WORDS = (("a", "won"), ("tie", "tied"), ("b", "lost"))


# --------------------------------------------------------------------------- the command


def _dollars(text: str) -> float:
    try:
        if (value := float(text)) >= 0:  # what is no number would be no ceiling
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text!r}")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="addiff judge",
        description="Have vision-language models compare the pictures of a finished evaluation.",
        epilog="A judge NAME reads ADDIFF_JUDGE_NAME_{MODEL,USD_IN,USD_OUT,API_KEY} and, if set, _{BASE_URL,MAX_USD,"
        "ANSWER_TOKENS,IMAGE_TOKENS,TEMPERATURE} from the environment.",
    )
    parser.add_argument("folder", type=Path, help="run folder of evaluate.py, e.g. runs/evaluate")
    parser.add_argument("--judges", nargs="+", required=True, metavar="NAME", help="names of judges, see below")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="two or more of the run; all, if left out")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N prompts only, with all their pictures")
    parser.add_argument(
        "--max-usd",
        type=_dollars,
        metavar="USD",
        help="ceiling of all judges together, what earlier runs spent included",
    )
    parser.add_argument("--again", action="store_true", help="ask anew what never got a usable answer")
    parser.add_argument("--estimate", action="store_true", help="say about what it would cost, and ask nothing")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Judge a run, write ``judge.json`` and make the report again; returns the exit status."""
    options = _arguments(argv)
    if not RunFolder(options.folder).rows.exists():
        raise FileNotFoundError(f"no rows.jsonl in {looked_at(options.folder)}")
    held = nullcontext() if options.estimate else claim(options.folder, "judging")
    try:
        with interruptible(lambda: f"the answers so far are kept in {RunFolder(options.folder).judge_answers}"), held:
            return _judge(options)
    except JudgeError as error:
        raise OSError(str(error)) from error


def _judge(options: argparse.Namespace) -> int:
    rows = reported_rows(options.folder)
    pairs = run_pairs(options.folder, rows, options.methods, options.limit)
    with ExitStack() as stack:
        judges = open_judges(options.judges, options.folder, options.again)
        for judge in judges.values():
            stack.enter_context(judge)
        check_budget(judges, pairs, options.max_usd)
        if options.estimate:
            return 0
        found = judgement(judges, ask_all(judges, pairs, options.max_usd))
    print(describe(found))
    print(write_judgement(options.folder, found))
    for path in write_report(options.folder, rows, read_items(options.folder), read_verdicts(options.folder)):
        print(path)
    return 0
