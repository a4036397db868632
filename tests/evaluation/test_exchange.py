"""Export and import: each layout as its official script takes it, and results that find their way back."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from addiff_env.evaluation.benchmarks.items import Item
from addiff_env.evaluation.exchange import LAYOUTS, bring_back, export, main
from addiff_env.evaluation.imported import main as import_main
from addiff_env.evaluation.run.rows import append_rows, read_rows
from addiff_env.evaluation.run.run_folder import write_items, write_provenance
from addiff_env.types import ResultRow

PROMPTS = ["a red circle", 'a "quoted" cat / dog_house', "two blue stars."]
METHODS = ["agent", "best-of-2:ddim-5"]


def make_run(folder: Path, images: int = 2, benchmark: str = "geneval") -> Path:
    """Every picture has a colour of its own."""
    items = [
        Item(prompt, images * k + n, ("color", "spatial")[k % 2], str(k))
        for k, prompt in enumerate(PROMPTS)
        for n in range(images)
    ]
    rows = []
    for m, method in enumerate(METHODS):
        for item in items:
            image = f"images/{m}/{item.seed}.png"
            (folder / image).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (m, item.seed, 0)).save(folder / image)
            rows.append(
                ResultRow(method, item.prompt, item.seed, item.category, "b", "s", method, "float32", "1",
                          scores={"x": 1.0}, image=image)
            )  # fmt: skip
    append_rows(folder / "rows.jsonl", rows)
    write_items(folder, items)
    write_provenance(folder, rows, benchmark=benchmark)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> str:
    place = tmp_path / "data" / "geneval"
    place.mkdir(parents=True)
    lines = [
        {"tag": "colors", "include": [{"class": "cat", "count": 1}], "exclude": [], "prompt": prompt}
        for prompt in PROMPTS
    ]
    (place / "evaluation_metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(tmp_path / "data")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_picture_is_there_once_and_is_the_rows_own(run: Path, tmp_path: Path, data: str, layout: str) -> None:
    out = tmp_path / "out"
    pictures = export(run, layout, out, data)
    assert len({one.file for one in pictures}) == len(pictures) == 12 == len(list(out.rglob("*.png")))
    for one in pictures:
        with Image.open(out / one.file) as picture:
            assert picture.getpixel((0, 0)) == (METHODS.index(one.method), one.seed, 0)
    with pytest.raises(ValueError, match="is not empty"):
        export(run, layout, out, data)


def test_an_export_that_was_cut_short_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, copied = tmp_path / "out", []

    def interrupted(source: Path, target: Path) -> None:
        copied.append(target)
        if len(copied) == 3:
            raise KeyboardInterrupt
        target.write_bytes(source.read_bytes())

    monkeypatch.setattr(shutil, "copyfile", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(run, "flat", out)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]
    monkeypatch.undo()
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "old.png").write_text("of a program that was killed")
    assert len(export(run, "flat", out)) == len(list(out.rglob("*.png"))) == 12
    assert sorted(path.name for path in tmp_path.iterdir() if "out" in path.name and "lock" not in path.name) == ["out"]


def test_geneval_as_its_script_reads_it(run: Path, tmp_path: Path, data: str) -> None:
    out = tmp_path / "out"
    assert main([str(run), "--layout", "geneval", "--out", str(out), "--root", data]) == 0
    folders = sorted(path.name for path in (out / "agent").iterdir())
    assert folders == ["00000", "00001", "00002"]
    assert sorted(p.name for p in (out / "agent" / "00001" / "samples").iterdir()) == ["0000.png", "0001.png"]
    stated = json.loads((out / "agent" / "00001" / "metadata.jsonl").read_text())
    assert stated["prompt"] == PROMPTS[1] and stated["include"] == [{"class": "cat", "count": 1}]
    results = out / "agent" / "results.jsonl"
    lines = [
        {"filename": str(path), "correct": path.name == "0000.png", "tag": "colors"}
        for path in sorted((out / "agent").rglob("*.png"))
    ]
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert import_main([str(run), str(results)]) == 0
    rows = read_rows(run / "rows.jsonl")
    found = {(row.method, row.seed): row.scores.get("geneval_official") for row in rows}
    assert [found["agent", seed] for seed in range(6)] == [1, 0, 1, 0, 1, 0]
    assert all(found[METHODS[1], seed] is None for seed in range(6)) and all(row.scores["x"] == 1 for row in rows)
    with pytest.raises(ValueError, match="geneval_official already: --replace"):
        bring_back(run, results)
    results.write_text(json.dumps({**lines[1], "correct": True}) + "\n")
    assert bring_back(run, results, replace=True) == (["geneval_official"], 1)
    assert read_rows(run / "rows.jsonl")[1].scores["geneval_official"] == 1.0


def test_t2i_compbench_as_its_scripts_read_it(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(run, "t2i-compbench", out)
    names = [path.name for path in (out / "agent" / "color" / "samples").iterdir()]
    names.sort(key=lambda name: int(name.split("_")[-1].split(".")[0]))  # the script's order
    assert [name.split("_")[0] for name in names] == [PROMPTS[0]] * 2 + [PROMPTS[2]] * 2
    results = out / "agent" / "color" / "annotation_blip" / "vqa_result.json"
    results.parent.mkdir()
    results.write_text(json.dumps([{"question_id": k, "answer": f"0.{k}5"} for k in range(4)]))
    assert bring_back(run, results) == (["t2i_compbench_official"], 4)
    scores = {(r.method, r.seed): r.scores.get("t2i_compbench_official") for r in read_rows(run / "rows.jsonl")}
    assert [scores["agent", seed] for seed in (0, 1, 4, 5)] == [0.05, 0.15, 0.25, 0.35]
    assert scores["agent", 2] is None and scores[METHODS[1], 0] is None
    results.write_text(json.dumps([{"question_id": 4, "answer": "1"}]))
    with pytest.raises(ValueError, match="question_id 4 is no picture of agent/color"):
        bring_back(run, results, replace=True)


@pytest.mark.parametrize("as_list", [False, True])
def test_geneval2_scores_are_means_of_their_atoms(run: Path, tmp_path: Path, as_list: bool) -> None:
    out = tmp_path / "out"
    export(run, "geneval2", out)
    paths = json.loads((out / "agent" / "1" / "image_paths.json").read_text())
    assert list(paths) == PROMPTS and all(Path(path).is_file() for path in paths.values())
    atoms = [[0.5, 0.5], [0.9, 0.1, 0.1], [1.0]]
    results = out / "agent" / "1" / "score_lists.json"
    results.write_text(json.dumps(atoms if as_list else dict(zip(PROMPTS, atoms, strict=True))))
    assert bring_back(run, results) == (["soft_tifa_gm_official", "soft_tifa_am_official"], 3)
    scores = {(row.method, row.seed): row.scores for row in read_rows(run / "rows.jsonl")}
    assert scores["agent", 3]["soft_tifa_gm_official"] == pytest.approx(0.009 ** (1 / 3))
    assert scores["agent", 3]["soft_tifa_am_official"] == pytest.approx(1.1 / 3)
    assert "soft_tifa_gm_official" not in scores["agent", 2]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "spreadsheet.csv"])
def test_flat_results_are_named_by_their_columns(run: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    export(run, "flat", out)
    listed = [json.loads(line) for line in (out / "agent" / "prompts.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in listed][::2] == PROMPTS
    results = out / "agent" / f"scores.{kind}"
    lines = [{"file": line["file"], "mine": line["seed"] / 10} for line in listed]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    csv_text = "file,mine\n" + "".join(f"{line['file']},{line['mine']}\n" for line in lines)
    mark = "\ufeff" * kind.startswith("spreadsheet")  # as spreadsheets begin their files
    results.write_text(text if kind == "jsonl" else mark + csv_text, encoding="utf-8")
    assert bring_back(run, results) == (["mine"], 6)
    own = [row.scores["mine"] for row in read_rows(run / "rows.jsonl") if row.method == "agent"]
    assert own == [k / 10 for k in range(6)]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"file": "00000.png", "mine": 2}, "two results of agent/00000.png"),
        ({"file": "00009.png", "mine": 1}, "is no picture of the export"),
        ({"file": "00001.png", "mine": "high"}, "'high' is no number"),
        ({"file": "00001.png", "mine": None}, "None is no number"),
        ({"file": "00001.png", "mine": "nan"}, "mine of agent/00001.png is nan"),
        ({"mine": 1}, "expected a file and scores"),
        ({"file": "00001.png"}, "expected a file and scores"),
    ],
)
def test_bad_results_are_refused_and_nothing_is_written(
    run: Path, tmp_path: Path, line: dict[str, object], words: str
) -> None:
    export(run, "flat", tmp_path / "out")
    results, before = tmp_path / "out" / "agent" / "scores.jsonl", (run / "rows.jsonl").read_bytes()
    results.write_text(json.dumps({"file": "00000.png", "mine": 1}) + "\n" + json.dumps(line) + "\n")
    with pytest.raises(ValueError, match=words):
        bring_back(run, results)
    assert (run / "rows.jsonl").read_bytes() == before


def test_what_is_missing_is_said(run: Path, tmp_path: Path, data: str) -> None:
    with pytest.raises(FileNotFoundError, match="no rows.jsonl"):
        export(tmp_path / "none", "flat", tmp_path / "out")
    with pytest.raises(ValueError, match="unknown layout 'tree'"):
        export(run, "tree", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="results lie below their export"):
        bring_back(run, Path(data) / "geneval" / "evaluation_metadata.jsonl")
    with pytest.raises(ValueError, match="is a run of 'tiny-test'"):
        export(make_run(tmp_path / "other", benchmark="tiny-test"), "geneval", tmp_path / "out", data)
    (run / "images" / "0" / "3.png").unlink()
    with pytest.raises(FileNotFoundError, match="no picture .*3.png"):
        export(run, "flat", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@example(["é" * 250, "日" * 100])
@given(st.lists(st.text(min_size=1, max_size=300), min_size=1, max_size=4, unique=True))
def test_any_prompts_have_files_of_their_own(prompts: list[str]) -> None:
    pairs = [
        (ResultRow("m", prompt, k, "color", "b", "s", "p", "float32", "1"), Item(prompt, k, "color", str(k)))
        for k, prompt in enumerate(prompts)
    ]
    for layout in LAYOUTS.values():
        files = [one.file for one in layout.place(pairs)]
        assert len(set(files)) == len(files)
        assert all(len(Path(file).name.encode()) <= 255 and "\0" not in file for file in files)
        assert not any(part in (".", "..") for file in files for part in file.split("/"))
