"""Files of prompts: each kind reads back what was written, alike for environment and benchmark, or says why not."""

import csv
import io
import json
import os
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from addiff_env.env.prompts import check_prompt, load_prompts
from addiff_env.env.training_settings import env_settings, held_out_prompts
from addiff_env.evaluation.benchmarks.items import SOURCES, T2I_CATEGORIES, load_benchmark
from addiff_env.evaluation.methods.tuning import tuning_items

KINDS = (".txt", ".csv", ".tsv", ".json", ".jsonl")
SEPARATORS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"  # what str.splitlines takes for line ends, and prompts may hold


def write(folder: Path, name: str, content: str | bytes) -> str:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder / name)


def both(path: str) -> list[str]:
    """The prompts of a file, which have to be the same for an environment and a benchmark."""
    prompts, items = load_prompts(path), load_benchmark(path, images_per_prompt=1)
    assert prompts == [item.prompt for item in sorted(items, key=lambda item: int(item.id))]
    return prompts


# --------------------------------------------------------------------------- what is written is read

CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff")
TEXTS = st.text(CHARACTERS | st.sampled_from(list("\",;\t\n\r'\\ " + SEPARATORS)), min_size=1, max_size=12)
PROMPTS = st.lists(TEXTS.map(str.strip).filter(lambda text: text and text.lower() != "nan"), min_size=1, max_size=6)


def table(prompts: list[str], delimiter: str, end: str, quoting: int) -> str:
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, delimiter=delimiter, lineterminator=end, quoting=quoting)
    writer.writerows([["Note", " Prompt "], *([str(k), prompt] for k, prompt in enumerate(prompts))])
    return buffer.getvalue()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(PROMPTS, st.sampled_from(["\n", "\r\n", "\r"]), st.booleans(), st.booleans())
def test_every_format_reads_back_what_was_written(tmp_path, prompts, end, marked, all_quoted):
    # Of line ends the writer quotes its own alone.
    odd = end != "\r\n" and any(set(prompt) & set("\r\n") for prompt in prompts)
    quoting = csv.QUOTE_ALL if all_quoted or odd else csv.QUOTE_MINIMAL
    lines = [prompt for prompt in prompts if not set(prompt) & set("\r\n")]
    objects = [json.dumps({"prompt": p} if k % 2 else p, ensure_ascii=not k % 3) for k, p in enumerate(prompts)]
    contents = {
        ".txt": (lines, end.join(["", *lines, ""])),
        ".csv": (prompts, table(prompts, ",", end, quoting)),
        ".tsv": (prompts, table(prompts, "\t", end, csv.QUOTE_ALL)),
        ".json": (prompts, "[" + ", ".join(objects) + "]"),
        ".jsonl": (prompts, (end + end).join(objects)),
    }
    for kind, (expected, content) in contents.items():
        if expected:
            path = write(tmp_path, "list" + kind, ("\ufeff" if marked else "") + content)
            assert both(path) == expected, kind


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(KINDS),
    st.binary(max_size=60)
    | st.text(st.sampled_from('[]{}":,prompt\\ud80\n\r\t \0NaN"'), max_size=40).map(str.encode)
    | st.text(st.sampled_from('",\n\r\t a\0'), max_size=30).map(lambda text: b"prompt,seed\n" + text.encode())
    | st.text(st.sampled_from('",\n\r\t a\0'), max_size=30).map(lambda text: b"seed\tPROMPT\r" + text.encode()),
)
def test_any_bytes_are_prompts_or_an_error_that_names_the_file(tmp_path, kind, content):
    path = write(tmp_path, "fuzz" + kind, content)
    try:
        prompts = load_prompts(path)
    except ValueError as error:
        assert path in str(error)
        with pytest.raises(ValueError, match="fuzz"):
            load_benchmark(path)
        return
    assert prompts and all(prompt == check_prompt(prompt.strip()) != "" for prompt in prompts)
    try:
        items = load_benchmark(path)
    except ValueError as error:  # a seed that is none
        assert path in str(error) and "seed" in str(error)
    else:
        assert sorted(item.prompt for item in items) == sorted(prompts)


def test_only_line_ends_end_lines(tmp_path):
    odd = [f"a {mark} b" for mark in SEPARATORS]
    assert both(write(tmp_path, "a.txt", "\n".join(odd))) == odd
    assert both(write(tmp_path, "a.jsonl", "\n".join(json.dumps(p, ensure_ascii=False) for p in odd))) == odd
    assert both(write(tmp_path, "mixed.txt", "a\r\nb\rc\n\r\n d\u3000\n\x0c\n")) == ["a", "b", "c", "d"]


def test_a_tsv_may_quote_fields_as_a_whole(tmp_path):
    rows = (
        'prompt\tn\n"GO" in chalk\t1\n"a ""big"" cat"\t2\n"two\nlines\tand a tab"\t3\n"A" and "B"\t4\n5" nails\t5\t\n'
    )
    path = write(tmp_path, "a.tsv", rows.replace("5\t\n", "5\n"))
    assert both(path) == ['"GO" in chalk', 'a "big" cat', "two\nlines\tand a tab", '"A" and "B"', '5" nails']
    with pytest.raises(ValueError, match=r"a\.tsv:7: row 5 has not 2 columns"):
        load_prompts(write(tmp_path, "a.tsv", rows))


@pytest.mark.parametrize(
    ("name", "content", "prompts"),
    [
        ("a.json", '["a", {"Prompt": " b "}, {"caption": "c", "seed": "7"}]', ["a", "b", "c"]),
        ("a.csv", "Caption,seed\na,1\n", ["a"]),
        ("a.csv", "prompt,caption\na,b\n", ["a"]),
        ("a.csv", "\r\nprompt\r\n\r\na\r\n\r\n", ["a"]),
        ("a.csv", 'prompt\n"two\r\nlines, ""quoted"""\nNone', ['two\r\nlines, "quoted"', "None"]),
        ("A.TXT", "a\na\n", ["a", "a"]),
    ],
)
def test_where_prompts_stand(tmp_path, name, content, prompts):
    assert both(write(tmp_path, name, content)) == prompts


# --------------------------------------------------------------------------- what is not, says so


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf", b"\n \r\n"])
def test_files_without_anything_are_named(tmp_path, kind, content):
    path = write(tmp_path, "empty" + kind, content)
    for read in (load_prompts, load_benchmark):
        with pytest.raises(ValueError) as error:
            read(path)
        assert path in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "prompt\n", "no prompts in"),
        ("a.json", "[]", "no prompts in"),
        ("a.json", '{"prompt": "a"}', "a.json: expected a list"),
        ("a.json", '["a",\n"b"', "a.json:2: no JSON"),
        ("a.json", '["a", 3]', "a.json: item 2: expected an object.*3"),
        ("a.json", '["a", {"text": "b"}]', "a.json: item 2: .*'text'"),
        ("a.json", '["a", "b", NaN]', "a.json: item 3: .*nan"),
        ("a.json", '["a", ""]', "a.json: item 2: expected a prompt, got ''"),
        ("a.json", '["a", "\\ud800"]', r"a.json: item 2: .*\\ud800"),
        ("a.json", "[" * 100_000, "a.json:1: no JSON"),
        ("a.jsonl", '\n\n{"prompt": "a"}\n\n{"prompt": "\\udc00!"}', r"a.jsonl:5: .*\\udc00"),
        ("a.jsonl", '"a"\r\r\n"b" "c"', "a.jsonl:3: no JSON"),
        ("a.jsonl", '{"prompt": "a", "Prompt": "b"}', "a.jsonl:1: 'prompt' is there more than once"),
        ("a.jsonl", '{"prompt": "a", "prompt": "b"}', "a.jsonl:1: .*twice"),
        ("a.jsonl", '"a"\n{"prompt": null}', "a.jsonl:2: expected a prompt, got None"),
        ("a.jsonl", '"a"\n{"prompt": "a\\u0000b"}', "a.jsonl:2: .*NUL"),
        ("a.csv", "Prompt,prompt\na,b\n", "a.csv:1: columns 'prompt' are there more than once"),
        ("a.csv", "prompt;seed\na;3\n", "no column 'prompt' among"),
        ("a.csv", "prompt,seed\n,3\n", "a.csv:2: row 1: expected a prompt, got ''"),
        ("a.csv", "prompt,n\na,1\n\nNaN,3\n", "a.csv:4: row 2: expected a prompt, got 'NaN'"),
        ("a.csv", 'prompt\na\n"b\nc\n', "a.csv:3: no CSV: unexpected end of data"),
        ("a.csv", 'prompt,n\n"a" b,1\n', "a.csv:2: no CSV"),
        ("a.tsv", "prompt\tn\na\t1\nb\n", "a.tsv:3: row 2 has not 2 columns"),
        ("a.txt", "a\n\nb\0c\n", "a.txt:3: .*NUL"),
        ("a.txt", b"a\r\rb\xe9c\n", "a.txt:3: not UTF-8, byte 0xe9"),
        ("a.csv", "prompt\nä\n".encode("latin-1"), "a.csv:2: not UTF-8"),
        ("a.txt", "a cat\n".encode("utf-16"), "a.txt:1: not UTF-8"),
        ("a.txt", "a cat\n".encode("utf-16-le"), "a.txt:1: .*NUL"),
        ("a.parquet", b"PAR1", "a.parquet"),
        ("a.txt.gz", b"\x1f\x8b", "a.txt.gz"),
        ("prompts", "a\n", "prompts"),
    ],
)
def test_what_holds_no_prompts_is_named_with_its_place(tmp_path, name, content, words):
    path = write(tmp_path, name, content)
    for read in (load_prompts, load_benchmark):
        if read is load_benchmark and Path(name).suffix not in KINDS:
            words = f"unknown benchmark .*{name}"
        with pytest.raises(ValueError, match=words):
            read(path)


@pytest.mark.parametrize("seed", ["1.0", '"1e3"', "[1]", "9223372036854775808", '"' + "9" * 5000 + '"', "NaN", '"x"'])
def test_seeds_that_are_none_are_named_with_their_place(tmp_path, seed):
    content = f'"a"\n\n{{"prompt": "b", "Seed": {seed}}}'
    with pytest.raises(ValueError, match=r"a\.jsonl:3: expected a whole number as seed"):
        load_benchmark(write(tmp_path, "a.jsonl", content))
    assert load_prompts(str(tmp_path / "a.jsonl")) == ["a", "b"]  # an environment draws its own


@pytest.mark.parametrize(
    "row",
    [
        '{"tag": "a", "prompt": "a", "include": [3]}',
        '{"tag": "a", "prompt": "a", "include": [{"class": "cup", "count": "2"}]}',
        '{"tag": "a", "prompt": "a", "include": {"class": "cup"}}',
    ],
)
def test_geneval_metadata_of_another_kind_is_named_with_its_line(tmp_path, row):
    (tmp_path / "geneval").mkdir()
    write(tmp_path / "geneval", "evaluation_metadata.jsonl", "\n" + row)
    with pytest.raises(ValueError, match=r"evaluation_metadata\.jsonl:2: no GenEval metadata"):
        load_benchmark("geneval", root=tmp_path, any_length=True)


@pytest.mark.parametrize("content", ["[]", '{"annotations": [3]}', '{"annotations": [{"id": 1, "caption": "a"}]}', "{"])
def test_captions_of_another_kind_are_named(tmp_path, content):
    (tmp_path / "coco").mkdir()
    write(tmp_path / "coco", "captions_val2014.json", content)
    with pytest.raises(ValueError, match=r"captions_val2014\.json"):
        load_benchmark("coco-30k", root=tmp_path)


def test_what_is_no_file_is_named_by_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.txt").mkdir()
    for read in (load_prompts, load_benchmark):
        for name, words in (("nowhere.csv", "there is none"), ("folder.txt", "that is a folder")):
            with pytest.raises(FileNotFoundError, match=words) as error:
                read(name)
            assert name in str(error.value)
        with pytest.raises(FileNotFoundError) as error:
            read("nowhere.csv")
        assert str(tmp_path / "nowhere.csv") in str(error.value)


# --------------------------------------------------------------------------- lists


@pytest.mark.parametrize(
    "prompts", [["a", ""], ("a", ""), np.array(["a", ""]), OmegaConf.create(["a", ""]), iter(["a", ""])]
)
def test_a_list_is_taken_as_it_stands(prompts):
    assert load_prompts(prompts) == ["a", ""]


@pytest.mark.parametrize("prompts", [["a", 3], ["a", None], {"prompt": "a"}, b"a.txt", 3, None, [["a"]]])
def test_lists_of_anything_else_are_refused(prompts):
    with pytest.raises(TypeError, match="prompts"):
        load_prompts(prompts)


def test_a_list_says_which_of_its_prompts_no_tokenizer_takes(small_kwargs):
    with pytest.raises(ValueError, match=r"prompts\[1\] must be text.*\\ud800"):
        gym.make("AdDiffusion-Tiny-v0", **{**small_kwargs, "prompts": ["a", "b\ud800"]})


# --------------------------------------------------------------------------- everybody


def test_environment_training_and_tuning_read_the_same(tmp_path, small_kwargs):
    path = write(tmp_path, "mine.csv", '\ufeffid,Prompt\r\n1," a red circle "\r\n2,"a cat, asleep"\r\n')
    expected = ["a red circle", "a cat, asleep"]
    for source in (path, Path(path), OmegaConf.create(expected)):
        env = gym.make("AdDiffusion-Tiny-v0", **{**small_kwargs, "prompts": source})
        assert env.unwrapped.vector.prompts == expected
        env.close()
        cfg = OmegaConf.create(
            {
                "env": {"id": "AdDiffusion-Tiny-v0", "kwargs": {}},
                "prompts": {"source": source, "held_out": {"source": source, "number": 2}},
                "reward": {"weights": {}},
                "logging": {"held_out_every": 1},
            }
        )
        assert (
            load_prompts(env_settings(cfg)["prompts"]) == sorted(held_out_prompts(cfg), key=expected.index) == expected
        )
    assert [item.prompt for item in tuning_items(path, None, [])] == expected


# --------------------------------------------------------------------------- the real lists

DATA = os.environ.get("ADDIFF_DATA")


@pytest.mark.skipif(not DATA, reason="ADDIFF_DATA names no folder of benchmark lists")
@pytest.mark.parametrize("name", ["coco-8k", "drawbench", "partiprompts", "geneval", "t2i-compbench"])
def test_environments_read_the_real_lists_as_benchmarks_do(name):
    folder = Path(str(DATA))
    paths = [folder / SOURCES[name].paths[0]]
    if name == "t2i-compbench":
        paths = [paths[0] / f"{category}_val.txt" for category in T2I_CATEGORIES]
    items = load_benchmark(name, root=folder, images_per_prompt=1)
    assert sorted(prompt for path in paths for prompt in both(path)) == sorted(i.prompt for i in items if i.prompt)
