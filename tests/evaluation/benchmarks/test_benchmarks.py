"""The benchmark loader on small lists of every published format, and on the real lists where they are."""

import json
import math
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from addiff_env.evaluation.benchmarks.complexity import (
    COMPLEXITIES,
    count_content_words,
    count_requirements,
    structured_complexity,
)
from addiff_env.evaluation.benchmarks.items import (
    Item,
    benchmark_record,
    categories_in_turn,
    id_list_hash,
    known_benchmarks,
    load_benchmark,
)
from addiff_env.evaluation.benchmarks.readers import SOURCES, T2I_CATEGORIES, read_coco
from addiff_env.evaluation.methods.tuning import tuning_items


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode("utf-8"))
    return path


@pytest.fixture
def root(tmp_path) -> Path:
    """Small lists of our own making, in the published formats with their oddities."""
    write(tmp_path / "drawbench/drawbench.txt", "Acord made of wodo.\nA lamp\u2028on a mat.\n  Three mugs.\nNo newline")
    write(tmp_path / "coco/coco_8k_captions.txt", "A hat.\n\n A tin of tea\nTwo spoons")
    write(
        tmp_path / "partiprompts/PartiPrompts.tsv",
        "Prompt\tCategory\tChallenge\tNote\n"
        'the words "GO, NOW" on a van\tVehicles\tWriting & Symbols\t\n'
        '"H U M" in chalk\tArts\tBasic\tOne "quoted, note\n'
        "moss\tArts\tBasic\t\n",
    )
    lines = [
        {"tag": "single_object", "include": [{"class": "fork", "count": 1}], "prompt": "a photo of a fork"},
        {
            "tag": "position",
            "include": [{"class": "cup", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}],
            "prompt": "a photo of a cat left of a cup",
        },
    ]
    write(tmp_path / "geneval/evaluation_metadata.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    for index, category in enumerate(T2I_CATEGORIES):  # some with Windows line ends, some without a final newline
        end = "\r\n" if index % 2 else "\n"
        write(
            tmp_path / f"t2i_compbench/{category}_val.txt", f"a {category} mug{end}a {category} pot" + end * (index % 3)
        )
    return tmp_path


def prompts(items):
    return [item.prompt for item in items]


def test_text_list(root):
    items = load_benchmark("drawbench", root=root, any_length=True)
    assert prompts(items) == ["Acord made of wodo.", "A lamp\u2028on a mat.", "Three mugs.", "No newline"]
    assert [item.seed for item in items] == [0, 1, 2, 3]
    assert [item.id for item in items] == ["0", "1", "2", "3"]


def test_caption_list_keeps_its_line_numbers(root):
    items = load_benchmark("coco-8k", 3, root=root, any_length=True)
    assert [(item.prompt, item.category, item.id) for item in items] == [
        ("A hat.", "caption", "0"),
        ("", "blank", "1"),
        ("A tin of tea", "caption", "2"),
    ]


def test_partiprompts_quotes_are_part_of_the_prompt(root):
    items = load_benchmark("partiprompts", root=root, any_length=True)
    assert prompts(items) == ['the words "GO, NOW" on a van', '"H U M" in chalk', "moss"]
    assert [item.category for item in items] == ["Vehicles", "Arts", "Arts"]
    assert items[0].metadata["challenge"] == "Writing & Symbols"
    assert items[1].metadata["note"] == 'One "quoted, note'


def test_geneval_has_four_pictures_a_prompt_and_its_metadata(root):
    items = load_benchmark("geneval", root=root, any_length=True)
    assert len(items) == 8 and [item.seed for item in items] == list(range(8))
    assert Counter(item.category for item in items) == {"single_object": 4, "position": 4}
    position = items[-1]
    assert position.metadata["include"][1]["position"] == ["left of", 0]
    assert position.metadata["prompt"] == position.prompt and position.metadata["tag"] == "position"
    assert (items[0].num_requirements, items[0].complexity) == (1, "simple")
    assert (position.num_requirements, position.complexity) == (3, "mixed")
    assert len(load_benchmark("geneval", root=root, any_length=True, images_per_prompt=1)) == 2


def test_t2i_compbench_has_eight_categories(root):
    items = load_benchmark("t2i-compbench", root=root, any_length=True, images_per_prompt=1)
    assert Counter(item.category for item in items) == dict.fromkeys(T2I_CATEGORIES, 2)
    assert all(item.prompt == item.prompt.strip() for item in items)
    (root / "t2i_compbench" / "color_val.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"color_val.txt.*github.com/Karine-Huang"):
        load_benchmark("t2i-compbench", root=root)


def test_the_lists_of_t2i_compbench_say_which_relations_complex_prompts_have(root):
    def complex_items():
        items = load_benchmark("t2i-compbench", root=root, any_length=True, images_per_prompt=1)
        return {item.prompt: item.metadata for item in items if item.category == "complex"}

    assert complex_items() == {"a complex mug": {}, "a complex pot": {}}
    write(root / "t2i_compbench/complex_val_spatial.txt", "A complex mug. \n")
    assert complex_items() == {"a complex mug": {}, "a complex pot": {}}  # half the lists say nothing
    write(root / "t2i_compbench/complex_val_action.txt", "an other\n")
    kinds = {prompt: metadata["relations"] for prompt, metadata in complex_items().items()}
    assert kinds == {"a complex mug": "spatial", "a complex pot": "both"}


def test_a_list_of_another_length_is_refused(root):
    with pytest.raises(ValueError, match="has 4 prompts, the published list has 200.*dalle3-eval-samples"):
        load_benchmark("drawbench", root=root)


@pytest.mark.parametrize("name", SOURCES)
def test_a_missing_list_is_named_with_its_home(name, tmp_path, monkeypatch):
    monkeypatch.delenv("ADDIFF_DATA", raising=False)
    with pytest.raises(FileNotFoundError) as error:
        load_benchmark(name)
    assert "ADDIFF_DATA" in str(error.value) and SOURCES[name].home in str(error.value)
    with pytest.raises(FileNotFoundError, match="not found below") as error:
        load_benchmark(name, root=tmp_path)
    assert str(tmp_path) in str(error.value) and SOURCES[name].paths[0] in str(error.value)


def test_the_folder_may_be_named_by_the_environment(root, monkeypatch):
    monkeypatch.setenv("ADDIFF_DATA", str(root))
    assert len(load_benchmark("drawbench", any_length=True)) == 4


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match="unknown benchmark 'coco'") as error:
        load_benchmark("coco")
    assert all(name in str(error.value) for name in known_benchmarks())


@pytest.mark.parametrize("number", [0, -1, 2.5, True, "3", math.nan])
def test_numbers_of_prompts_and_pictures_are_whole(number):
    with pytest.raises(ValueError, match=rf"^images_per_prompt must be a whole number of at least 1.*{number}"):
        load_benchmark("tiny-dev", images_per_prompt=number)
    with pytest.raises(ValueError, match=rf"^limit must be a whole number of at least 1.*{number}"):
        load_benchmark("tiny-dev", number)
    with pytest.raises(ValueError, match=rf"^tune.limit must be a whole number of at least 1.*{number}"):
        tuning_items("tiny-dev", number, ())
    assert len(load_benchmark("tiny-dev", np.int64(3))) == 3


# --------------------------------------------------------------------------- files


def test_files_of_the_user(tmp_path):
    text = write(tmp_path / "mine.txt", "\ufeffa cat\r\n\r\na dog\r\n")
    assert [(i.prompt, i.category) for i in load_benchmark(str(text))] == [("a cat", "mine"), ("a dog", "mine")]
    table = write(tmp_path / "mine.csv", 'Prompt,seed,category\n"a cat, asleep",7,pets\n"a ""big"" dog",,pets\n')
    assert [(i.prompt, i.seed) for i in load_benchmark(str(table))] == [("a cat, asleep", 7), ('a "big" dog', 1)]
    lines = write(tmp_path / "mine.jsonl", '{"prompt": "a cat", "seed": 3, "source": "me"}\n\n{"prompt": "a dog"}\n')
    items = load_benchmark(str(lines))
    assert [(i.prompt, i.seed, i.category) for i in items] == [("a cat", 3, "mine"), ("a dog", 1, "mine")]
    digits = write(tmp_path / "digits.jsonl", '{"prompt": "a cat", "seed": "07"}\n{"prompt": "a cat", "seed": 0}\n')
    assert [i.seed for i in load_benchmark(str(digits))] == [7, 0]
    assert items[0].metadata == {"source": "me"}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", "\n\n", "no prompts"),
        ("a.csv", "text\na cat\n", "no column 'prompt' among .'text'."),
        ("a.csv", "prompt,seed\na cat\n", "row 1 has not 2 columns"),
        ("a.csv", "prompt,seed\na cat,x\n", "row 1: expected a whole number as seed, got 'x'"),
        ("a.csv", "prompt,seed\na cat,-5\n", "row 1: expected a whole number as seed, got '-5'; it must be 0 or more"),
        ("a.jsonl", '{"prompt": "a", "seed": 1.5}\n', "a.jsonl:1: expected a whole number as seed, got 1.5"),
        ("a.jsonl", '{"prompt": "a", "seed": true}\n', "a.jsonl:1: expected a whole number as seed, got True"),
        ("a.jsonl", '{"prompt": "a", "seed": 1e400}\n', "a.jsonl:1: expected a whole number as seed, got inf"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": "b", "seed": -5}\n', "a.jsonl:2: expected .* got -5; it must be 0"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": \n', r"a.jsonl:2: no JSON"),
        ("a.jsonl", '{"prompt": 4}\n', "a.jsonl:1: expected a prompt, got 4"),
        ("a.jsonl", "[]\n", "expected an object"),
        ("a.jsonl", '{"prompt": "a", "seed": 1}\n' * 2, "'a' with seed 1 is listed twice"),
    ],
)
def test_damaged_files_are_refused(tmp_path, name, content, words):
    with pytest.raises(ValueError, match=words):
        load_benchmark(str(write(tmp_path / name, content)))


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.csv"):
        load_benchmark(str(tmp_path / "nowhere.csv"))


def test_geneval_metadata_without_clauses_is_refused(root):
    write(root / "geneval/evaluation_metadata.jsonl", '{"tag": "colors", "include": [], "prompt": "a"}\n')
    with pytest.raises(ValueError, match="evaluation_metadata.jsonl:1: no GenEval metadata"):
        load_benchmark("geneval", root=root, any_length=True)


# --------------------------------------------------------------------------- COCO


@pytest.fixture
def captions(tmp_path) -> Path:
    """Five captions for each of 40 pictures, in the layout of captions_val2014.json."""
    rows = [
        {"image_id": 7 * i, "id": 1000 + 5 * i + k, "caption": f"picture {i}\n caption {k}\n"}
        for i in range(40)
        for k in range(5)
    ]
    return write(tmp_path / "coco/captions_val2014.json", json.dumps({"images": [], "annotations": rows}))


def test_coco_takes_one_caption_each_of_distinct_pictures(captions):
    chosen = read_coco(captions, number=30)
    images = [entry.metadata["image_id"] for entry in chosen]
    assert len(chosen) == len(set(images)) == 30
    for entry in chosen:
        picture, caption = divmod(int(entry.id) - 1000, 5)
        assert entry.prompt == f"picture {picture} caption {caption}"
        assert entry.metadata["image_id"] == 7 * picture
    assert len({int(entry.id) % 5 for entry in chosen}) == 5  # not always the first caption


def test_coco_choice_is_fixed_by_the_seed_alone(captions):
    rows = json.loads(captions.read_text())
    rows["annotations"].reverse()
    shuffled = write(captions.parent / "other.json", json.dumps(rows))
    assert read_coco(shuffled, 30) == read_coco(captions, 30)
    assert read_coco(captions, 10) == read_coco(captions, 30)[:10]
    assert read_coco(captions, 30, seed=1) != read_coco(captions, 30)
    with pytest.raises(ValueError, match="captions of 40 pictures, wanted 30000"):
        load_benchmark("coco-30k", root=captions.parent.parent)


def test_the_id_list_hash_depends_on_prompts_seeds_and_order():
    items = load_benchmark("tiny-dev", 16)
    assert id_list_hash(items) == id_list_hash(load_benchmark("tiny-dev", 16))
    assert id_list_hash(items[::-1]) != id_list_hash(items) != id_list_hash(items[:-1])
    record = benchmark_record("tiny-dev", items)
    assert record == {"benchmark": "tiny-dev", "items": 16, "id_list_sha256": id_list_hash(items)}


# --------------------------------------------------------------------------- order, seeds, complexity


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=30), st.integers(1, 30))
def test_categories_take_turns(categories, limit):
    groups = [[Item(f"prompt {k}", k, category)] for k, category in enumerate(categories)]
    order = categories_in_turn(groups)
    assert sorted(group[0].seed for group in order) == list(range(len(groups)))
    kept = Counter(group[0].category for group in order[:limit])
    for category, number in Counter(categories).items():  # no category waits while another is ahead by more than one
        assert kept[category] >= min(number, max(kept.values()) - 1)
        seeds = [group[0].seed for group in order if group[0].category == category]
        assert seeds == sorted(seeds)


def test_a_limit_does_not_move_seeds(root):
    whole = load_benchmark("t2i-compbench", root=root, any_length=True, first_seed=50)
    some = load_benchmark("t2i-compbench", 3, root=root, any_length=True, first_seed=50)
    assert len(whole) == 160 and len(some) == 30 and some == whole[:30]
    assert {item.seed for item in whole} == set(range(50, 210))


def test_stated_seeds_give_distinct_seeds_to_further_pictures():
    items = load_benchmark("tiny-test", 8, images_per_prompt=3)
    assert [item.seed for item in items[::3]] == [item.seed for item in load_benchmark("tiny-test", 8)]
    assert len({item.seed for item in items}) == 24


@pytest.mark.parametrize("name", ["tiny-dev", "tiny-test", "tiny-final"])
def test_the_embedded_worlds_splits_are_benchmarks(name):
    items = load_benchmark(name)
    assert name in known_benchmarks() and len(items) == len({(item.prompt, item.seed) for item in items}) == 1024
    categories = {item.category for item in items}
    limited = load_benchmark(name, len(categories))
    assert limited == items[: len(limited)] and {item.category for item in limited} == categories


def test_requirements_are_counted_as_the_embedded_world_counts_them():
    assert count_content_words("A photo of a red cup, and the cat's well-worn mat!") == 5
    assert count_content_words("") == 0
    cup, red_cat = {"class": "cup", "count": 3}, {"class": "cat", "count": 1, "color": "red", "position": ["above", 0]}
    assert count_requirements([cup]) == 3
    assert count_requirements([cup, red_cat]) == 6
    assert [structured_complexity(*args) for args in ((1, 5), (2, 2), (2, 3), (2, 4))] == [
        "simple",
        "mixed",
        "mixed",
        "full",
    ]
    tiny = {item.prompt: item for item in load_benchmark("tiny-test")}
    assert all(item.complexity in COMPLEXITIES and item.num_requirements for item in tiny.values())


# --------------------------------------------------------------------------- the real lists

DATA = os.environ.get("ADDIFF_DATA")
real = pytest.mark.skipif(not DATA, reason="ADDIFF_DATA names no folder of benchmark lists")


@real
@pytest.mark.parametrize("name", ["coco-8k", "drawbench", "partiprompts", "geneval", "t2i-compbench"])
def test_real_lists_load_whole(name):
    items = load_benchmark(name, images_per_prompt=1)
    assert len(items) == SOURCES[name].number
    assert all(item.complexity in COMPLEXITIES for item in items)
    assert all(item.prompt and item.prompt == item.prompt.strip() for item in items if item.category != "blank")


@real
def test_real_lists_have_their_categories():
    parts = load_benchmark("partiprompts")
    assert len({i.category for i in parts}) == 12 and len({i.metadata["challenge"] for i in parts}) == 11
    assert sum('"' in i.prompt for i in parts) > 10 and sum("," in i.prompt for i in parts) > 50
    tags = Counter(i.category for i in load_benchmark("geneval", images_per_prompt=1))
    assert tags == {
        "position": 100,
        "color_attr": 100,
        "two_object": 99,
        "colors": 94,
        "single_object": 80,
        "counting": 80,
    }
    shares = Counter(i.category for i in load_benchmark("t2i-compbench", images_per_prompt=1))
    assert shares == dict.fromkeys(T2I_CATEGORIES, 300)
    assert Counter(i.category for i in load_benchmark("coco-8k")) == {"caption": 8192, "blank": 21}
