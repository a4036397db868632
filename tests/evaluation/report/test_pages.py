"""The parts of pages that are made of a run: only those, and with the rows' numbers."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from addiff_env.evaluation.benchmarks.items import Item
from addiff_env.evaluation.report.pages import PARTS, Run, check_pages, fill_pages
from addiff_env.evaluation.run.rows import append_rows
from addiff_env.evaluation.run.run_folder import write_items, write_provenance, write_verdicts
from addiff_env.evaluation.statistics.decision import SUPPORTED, Decision, Rules
from addiff_env.types import ResultRow

PROMPTS = [f"prompt {k}" for k in range(20)]
SUCCESS = {"ddim-10": 12, "threshold:5:0.055": 15, "agent": 16, "agent, mask=full": 14}  # of 20, the first ones
NFE = {"ddim-10": 10, "threshold:5:0.055": 9, "agent": 8, "agent, mask=full": 8}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    folder = tmp_path / "a run"
    rows = [
        ResultRow(
            name, prompt, k, "three_objects", "tiny@packaged", "ddim", f"p-{name}", "float32", "1.0+abc",
            nfe=NFE[name], net_flops=NFE[name] * 2.5e9, seconds=1.5, scores={"success": float(k < SUCCESS[name])},
        )
        for name in SUCCESS
        for k, prompt in enumerate(PROMPTS)
    ]  # fmt: skip
    append_rows(folder / "rows.jsonl", rows)
    write_items(folder, [Item(prompt, k, "three_objects", num_requirements=1) for k, prompt in enumerate(PROMPTS)])
    write_provenance(folder, rows, benchmark="tiny-final", metric="success")
    write_verdicts(folder, [Decision("H1", SUPPORTED, "every condition holds", 20)], Rules())
    (folder / "quality_vs_compute.png").write_bytes(b"a plot")
    return Run("main", folder, "addiff reproduce --limit 20", {"threshold:5:0.055": "the hand-made rule"})


def part(name: str, text: str = "old\n") -> str:
    return f"<!-- results: {name} -->\n{text}<!-- end: {name} -->\n"


def filled(run: Run, name: str, tmp_path: Path) -> str:
    page = tmp_path / "page.md"
    page.write_text(part(f"main/{name}"))
    fill_pages([page], run)
    begin, *lines, end = page.read_text().splitlines()
    assert begin + "\n" + end + "\n" == part(f"main/{name}", "")
    return "\n".join(lines)


def test_the_summary_has_the_rows_numbers_and_leaves_out_the_controls(run: Run, tmp_path: Path) -> None:
    text = filled(run, "summary", tmp_path)
    assert text.startswith("20 pictures (20 prompts) of `tiny-final` a method, in float32, code 1.0+abc.\n\n| method |")
    ddim, rule, agent = (line.split(" | ") for line in text.splitlines()[4:])
    assert ddim[0] == "| `ddim-10`" and ddim[1].startswith("60.0 [") and ddim[2:4] == ["10.0", "25.0"]
    assert ddim[4].startswith("+20.0 [+") and rule[4].startswith("+5.0 [")
    assert rule[0] == "| `threshold:5:0.055`, the hand-made rule" and agent[0] == "| `agent`"
    assert all(line.count("|") == 6 for line in text.splitlines()[2:])


def test_the_other_parts(run: Run, tmp_path: Path) -> None:
    command = filled(run, "command", tmp_path)
    assert "took 2 min" in command and "```sh\naddiff reproduce --limit 20\n```" in command
    table = filled(run, "table", tmp_path).splitlines()
    assert table[0] == "```text" and table[-1] == "```" and [line.split("  ")[0] for line in table[3:-1]] == [*SUCCESS]
    differences = filled(run, "differences", tmp_path).splitlines()[2:]
    assert [line.split("`")[1] for line in differences] == ["ddim-10", "threshold:5:0.055", "agent, mask=full"]
    assert (
        filled(run, "verdicts", tmp_path)
        == "```text\nAs stated:\nH1: supported (20 prompts; every condition holds)\n```"
    )


def test_the_plot_lies_where_the_page_looks_for_it(run: Run, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    front, inner = tmp_path / "README.md", tmp_path / "docs" / "results.md"
    for page in (front, inner):
        page.write_text(part("main/plot"))
    written = fill_pages([front, inner], run)
    plot = tmp_path / "docs" / "quality_vs_compute_main.png"
    assert plot.read_bytes() == b"a plot" and set(written) == {front, inner, plot}
    assert "(docs/quality_vs_compute_main.png)" in front.read_text()
    assert "(quality_vs_compute_main.png)" in inner.read_text()


def test_without_an_agent_nothing_is_compared(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "without"
    rows = [row for row in run.rows if not row.method.startswith("agent")]
    append_rows(folder / "rows.jsonl", rows)
    text = filled(replace(run, folder=folder), "summary", tmp_path)
    assert [line.split(" | ")[-1] for line in text.splitlines()[4:]] == [" |", " |"]
    assert len(filled(replace(run, folder=folder), "differences", tmp_path).splitlines()) == 2


between = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\r"), max_size=40)


@given(
    st.lists(st.tuples(between.filter(lambda text: "<!--" not in text), st.sampled_from(sorted(PARTS))), max_size=4),
    between.filter(lambda text: "<!--" not in text),
)
@hypothesis_settings(max_examples=25, deadline=None)
def test_everything_else_on_a_page_stays(tmp_path_factory, parts, end) -> None:
    folder = tmp_path_factory.mktemp("pages")
    page, marked = folder / "page.md", "".join(f"{text}\n{part(f'all/{name}')}" for text, name in parts)
    page.write_text(f"{part('main/verdicts')}{marked}{end}", encoding="utf-8")
    write_verdicts(folder, [], Rules())
    append_rows(folder / "rows.jsonl", [ResultRow("agent", "a", 0, "c", "b", "ddim", "p", "float32", "1")])
    for _ in range(2):  # the second time, nothing changes
        fill_pages([page], Run("main", folder, "", {}))
        text = page.read_text(encoding="utf-8")
        assert text == f"{part('main/verdicts', chr(96) * 3 + 'text' + chr(10) + chr(96) * 3 + chr(10))}{marked}{end}"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nothing", "no part of 'main' on .*page.md"),
        (part("all/table"), "no part of 'main'"),
        (part("main/table") + part("main/tables"), "unknown part 'main/tables'; known: summary"),
        ("<!-- results: main/table -->\n", "markers of 'main/table' do not pair"),
        (part("main/table") + "<!-- end: main/plot -->\n", "markers of 'main/plot' do not pair"),
        ("<!-- results: main/table -->\n" + part("main/table"), "markers of 'main/table' do not pair"),
        ("see <!-- results: main/table --> <!-- end: main/table -->\n", "markers of 'main/table' do not pair"),
    ],
)
def test_a_page_that_cannot_be_filled_is_refused_and_stays(text: str, words: str, run: Run, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(ValueError, match=words):
        check_pages([page], "main")
    with pytest.raises(ValueError, match=words):
        fill_pages([page], run)
    assert page.read_text() == text


def test_a_page_that_is_not_there_is_named(run: Run, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere.md"):
        check_pages([tmp_path / "nowhere.md"], "main")
