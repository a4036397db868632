"""Rows that are split, torn, killed and put together again; the code version that marks them."""

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import addiff_env
from addiff_env.evaluation.run.rows import (
    append_rows,
    launched_shard,
    merge_if_whole,
    merge_rows,
    merge_shards,
    read_rows,
    shard,
    shard_path,
    write_rows,
)
from addiff_env.evaluation.run.version import code_version
from addiff_env.storage.jsonl import append_objects, read_objects
from addiff_env.types import ResultRow

PLACES = [(f"prompt {k} – ü\u2028", 100 + k) for k in range(7)]
METHODS = ["ddim-5", "agent"]
ONE_FOLDER = settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])


def row(method="agent", prompt="a red circle", seed=0, **changes):
    blank = ResultRow(method, prompt, seed, "colors", "tiny@packaged", "ddim", f"p-{method}", "float32", "1")
    return replace(blank, actions=[0, 0, 1], nfe=5, scores={"success": 1.0, "clip_score": 0.1 + 0.2}, **changes)


WHOLE = [row(method, *place) for method in METHODS for place in PLACES]


def test_rows_come_back_bit_for_bit(tmp_path):
    append_rows(tmp_path / "rows.jsonl", WHOLE)
    assert read_rows(tmp_path / "rows.jsonl") == WHOLE


@ONE_FOLDER
@given(data=st.data())
def test_any_truncation_recovers(tmp_path, data):
    path = tmp_path / "rows.jsonl"
    path.unlink(missing_ok=True)
    append_rows(path, WHOLE)
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    kept = read_rows(path)
    assert kept == WHOLE[: whole[:cut].count(b"\n")]
    append_rows(path, WHOLE[len(kept) :])  # the rerun goes on
    assert path.read_bytes() == whole


@given(shards=st.integers(1, 9), order=st.randoms(use_true_random=False))
def test_any_split_into_shards_merges_to_the_single_run(shards, order):
    parts = []
    for index in range(shards):
        part = [row(method, *place) for method in METHODS for place in shard(PLACES, index, shards)]
        order.shuffle(part)  # lanes finish in any order
        parts.append(part)
    order.shuffle(parts)
    assert merge_rows(parts, PLACES, METHODS) == WHOLE


@given(st.lists(st.integers(), max_size=20), st.integers(1, 6))
def test_shards_are_a_partition(items, shards):
    parts = [shard(items, index, shards) for index in range(shards)]
    assert sorted(sum(parts, [])) == sorted(items)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@ONE_FOLDER
@given(drop=st.integers(0, len(WHOLE) - 1))
def test_a_gap_is_refused_by_name(drop):
    missing = WHOLE[drop]
    with pytest.raises(ValueError, match="1 of 14 rows are missing") as error:
        merge_rows([WHOLE[:drop], WHOLE[drop + 1 :]], PLACES, METHODS)
    assert repr((missing.method, missing.prompt, missing.seed)) in str(error.value)


def test_rows_of_methods_that_are_not_asked_for_are_left_out():
    old = replace(row("euler-5", *PLACES[0]), code_version="0")
    assert merge_rows([WHOLE, [old, old]], PLACES, METHODS) == WHOLE
    assert merge_rows([WHOLE], PLACES, METHODS[1:]) == WHOLE[len(PLACES) :]


def test_a_method_without_rows_is_a_gap():
    with pytest.raises(ValueError, match="7 of 21 rows are missing.*'euler-5'.*and 2 more"):
        merge_rows([WHOLE], PLACES, [*METHODS, "euler-5"])


@given(twice=st.integers(0, len(WHOLE) - 1))
def test_a_duplicate_is_refused_by_name(twice):
    with pytest.raises(ValueError, match="1 measurements appear more than once") as error:
        merge_rows([WHOLE, [WHOLE[twice]]], PLACES)
    assert str(WHOLE[twice].seed) in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"code_version": "2"}, "2 code versions: '1' .13 rows., '2' .1 rows."),
        ({"policy": "other"}, "'agent' was run with 2 values of policy: 'p-agent' .6 rows., 'other' .1 rows."),
        ({"backbone": "sd15@main"}, "2 values of backbone.*'sd15@main'"),
        ({"dtype": "bfloat16"}, "2 values of dtype.*'bfloat16'"),
        ({"solver": "euler"}, "2 values of solver.*'euler'"),
    ],
)
def test_mixed_configurations_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        merge_rows([WHOLE[:-1], [replace(WHOLE[-1], **change)]], PLACES)


def test_a_row_of_another_benchmark_is_refused():
    with pytest.raises(ValueError, match="1 rows belong to no item.*'a red circle', 0"):
        merge_rows([WHOLE, [row()]], PLACES)


def test_shard_files_are_merged_and_an_absent_one_is_named(tmp_path):
    for index in range(3):
        part = [row(method, *place) for method in METHODS for place in shard(PLACES, index, 3)]
        append_rows(shard_path(tmp_path, index, 3), part)
    assert merge_shards(tmp_path, 3, PLACES) == WHOLE
    shard_path(tmp_path, 1, 3).unlink()
    with pytest.raises(FileNotFoundError, match="1 of 3 shards.*rows-0001-of-0003.jsonl"):
        merge_shards(tmp_path, 3, PLACES)


def test_a_run_that_is_not_split_keeps_its_file_name(tmp_path):
    assert shard_path(tmp_path, 0, 1) == tmp_path / "rows.jsonl"
    with pytest.raises(ValueError, match="no shard 4 of 4"):
        shard_path(tmp_path, 4, 4)


def test_a_score_without_a_value_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match="nan"):
        append_rows(tmp_path / "rows.jsonl", [row(), replace(row(), scores={"clip_score": float("nan")})])
    assert not (tmp_path / "rows.jsonl").exists()


def test_a_long_torn_line_is_cut(tmp_path):
    path = tmp_path / "objects.jsonl"
    append_objects(path, [{"a": 1}])
    with path.open("ab") as file:
        file.write(b'{"b": "' + b"x" * 200_000)
    append_objects(path, [{"c": 2}])
    assert read_objects(path) == [{"a": 1}, {"c": 2}]


def test_lines_that_are_no_objects_are_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match="rows.jsonl:1 is damaged: expected an object"):
        read_rows(path)
    path.write_text(json.dumps({"method": "agent"}) + "\n")
    with pytest.raises(ValueError, match="rows.jsonl:1 is damaged.*prompt"):
        read_rows(path)


def test_processes_of_a_launcher_are_shards():
    assert launched_shard(0, 1, {}) == (0, 1)
    assert launched_shard(2, 4, {}) == (2, 4)
    assert launched_shard(0, 1, {"RANK": "0", "WORLD_SIZE": "1"}) == (0, 1)
    assert launched_shard(2, 4, {"RANK": "0", "WORLD_SIZE": "1"}) == (2, 4)
    assert [launched_shard(0, 1, {"RANK": str(k), "WORLD_SIZE": "3"}) for k in range(3)] == [(0, 3), (1, 3), (2, 3)]
    with pytest.raises(ValueError, match="3 processes were launched.*shard 1 of 2"):
        launched_shard(1, 2, {"RANK": "0", "WORLD_SIZE": "3"})
    with pytest.raises(ValueError, match="'first' and '3'"):
        launched_shard(0, 1, {"RANK": "first", "WORLD_SIZE": "3"})
    with pytest.raises(ValueError, match="no shard 3 of 3"):
        launched_shard(0, 1, {"RANK": "3", "WORLD_SIZE": "3"})


def test_the_last_shard_to_finish_merges(tmp_path):
    for index in range(3):
        assert merge_if_whole(tmp_path, 3, PLACES) is None
        rows = [row(method, *place) for method in METHODS for place in shard(PLACES, index, 3)]
        append_rows(shard_path(tmp_path, index, 3), rows[:-1])
        assert merge_if_whole(tmp_path, 3, PLACES) is None
        append_rows(shard_path(tmp_path, index, 3), rows[-1:])
    assert merge_if_whole(tmp_path, 3, PLACES) == WHOLE
    assert merge_if_whole(tmp_path, 3, PLACES, [*METHODS, "agent, mask=full"]) is None  # all died before it
    append_rows(shard_path(tmp_path, 0, 3), WHOLE[:1])
    with pytest.raises(ValueError, match="appear more than once"):  # waiting would not mend it
        merge_if_whole(tmp_path, 3, PLACES)


def test_a_file_is_written_as_a_whole(tmp_path):
    append_rows(tmp_path / "rows.jsonl", [row(seed=99)])
    write_rows(tmp_path / "rows.jsonl", WHOLE)
    assert read_rows(tmp_path / "rows.jsonl") == WHOLE
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_rows_from_before_peak_memory_are_read(tmp_path):
    append_rows(tmp_path / "rows.jsonl", [replace(row(), peak_memory=123)])
    values = json.loads((tmp_path / "rows.jsonl").read_text())
    assert values.pop("peak_memory") == 123
    (tmp_path / "old.jsonl").write_text(json.dumps(values) + "\n")
    assert read_rows(tmp_path / "old.jsonl") == [row()]


# --------------------------------------------------------------------------- code version


def git(folder, *arguments):
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path) -> Path:
    (tmp_path / "addiff_env").mkdir()
    (tmp_path / "addiff_env" / "__init__.py").write_text("")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "evaluate.yaml").write_text("agents: []\n")
    (tmp_path / "README.md").write_text("words\n")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    return tmp_path


def test_uncommitted_edits_show_in_the_code_version(checkout):
    clean = code_version(checkout)
    assert clean.startswith(addiff_env.__version__ + "+") and "dirty" not in clean
    (checkout / "README.md").write_text("other words\n")
    assert code_version(checkout) == clean  # documentation makes no rows
    seen = {clean}
    for edit in ("x = 1\n", "x = 2\n"):
        (checkout / "addiff_env" / "__init__.py").write_text(edit)
        seen.add(code_version(checkout))
    git(checkout, "add", "addiff_env")
    assert code_version(checkout) in seen  # staging an edit does not change it
    for content in ("y = 1\n", "y = 2\n"):
        (checkout / "addiff_env" / "new.py").write_text(content)
        seen.add(code_version(checkout))
    (checkout / "configs" / "evaluate.yaml").unlink()
    seen.add(code_version(checkout))
    assert len(seen) == 6 and sum(version.startswith(clean + ".dirty-") for version in seen) == 5
    git(checkout, "add", "-A")
    git(checkout, "commit", "-m", "second")
    assert "dirty" not in code_version(checkout) and code_version(checkout) != clean


def test_outside_of_a_checkout_the_files_are_the_version(tmp_path):
    """Whatever a repository of somebody else's says, which the package lies in."""
    git(tmp_path, "init")
    seen = []
    for number, content in enumerate(("x = 1\n", "x = 2\n", "x = 1\n")):
        package = tmp_path / f"place{number}" / "addiff_env"
        (package / "configs").mkdir(parents=True)
        (package / "__pycache__").mkdir()
        (package / "__init__.py").write_text(content)
        (package / "__pycache__" / "env.pyc").write_text(str(number))
        seen.append(code_version(package.parent))
    assert seen[0] == seen[2] != seen[1]
    assert all(re.fullmatch(re.escape(addiff_env.__version__) + r"\+files-[0-9a-f]{10}", version) for version in seen)
