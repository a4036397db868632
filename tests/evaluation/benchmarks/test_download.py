"""Fetching the public lists, from a local server instead of their homes."""

import io
import json
import socket
import threading
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from addiff_env.cli import main
from addiff_env.evaluation.benchmarks.download import FILES, FetchError, fetch
from addiff_env.evaluation.benchmarks.items import load_benchmark
from addiff_env.evaluation.benchmarks.readers import SOURCES, T2I_CATEGORIES, read_coco


@pytest.fixture
def home(monkeypatch):
    """What a local server serves, by path; every benchmark's files come from it, under their own names."""
    served: dict[str, Any] = {}  # "<path> headers" are sent with it

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            content = served.get(self.path)
            self.send_response(404 if content is None else 200)
            for header in served.get(f"{self.path} headers", {}).items():
                self.send_header(*header)
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *_):
            pass

    for name in ("HTTP_PROXY", "ALL_PROXY", "http_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    for name, files in FILES.items():
        local = {to: f"http://127.0.0.1:{server.server_port}/{url.rpartition('/')[2]}" for to, url in files.items()}
        monkeypatch.setitem(FILES, name, local)
    yield served
    server.shutdown()
    thread.join()
    server.server_close()


def lines(number, word="mug"):
    return "".join(f"a {word} {k}\n" for k in range(number)).encode()


def test_a_list_is_fetched_and_loads(home, tmp_path, capsys):
    home["/drawbench.txt"] = lines(200)
    main(["download", "drawbench", str(tmp_path)])
    assert capsys.readouterr().out == f"{tmp_path}/drawbench/drawbench.txt\n"
    assert len(load_benchmark("drawbench", root=tmp_path)) == 200
    assert [path.name for path in tmp_path.iterdir()] == ["drawbench"]  # nothing else is left there


def test_other_formats_are_checked_by_their_own_reader(home, tmp_path):
    clause = {"tag": "counting", "include": [{"class": "cup", "count": 1}]}
    found = [json.dumps({**clause, "prompt": f"p{k}"}) for k in range(553)]
    home["/evaluation_metadata.jsonl"] = "\n".join(found).encode()
    home["/PartiPrompts.tsv"] = b"Prompt\tCategory\n" + b"".join(b"p%d\tArts\n" % k for k in range(1632))
    home["/8k_coco.txt"] = lines(8213)
    for name in ("geneval", "partiprompts", "coco-8k"):
        fetch(name, tmp_path)
        assert len(load_benchmark(name, root=tmp_path, images_per_prompt=1)) == SOURCES[name].number
    home["/PartiPrompts.tsv"] = b"<html>busy</html>"
    with pytest.raises(FetchError, match="not the published list: .*no column 'prompt'"):
        fetch("partiprompts", tmp_path)


def test_every_category_of_t2i_compbench_is_whole(home, tmp_path):
    home |= {f"/{name}_val.txt": lines(300, name) for name in T2I_CATEGORIES}
    home |= {f"/complex_val_{kind}.txt": lines(1, "complex") for kind in ("spatial", "action")}
    assert len(fetch("t2i-compbench", tmp_path)) == 10
    items = load_benchmark("t2i-compbench", root=tmp_path, images_per_prompt=1)
    assert len(items) == 2400
    assert {item.metadata["relations"] for item in items if item.category == "complex"} == {"spatial", "both"}
    home["/color_val.txt"], home["/shape_val.txt"] = lines(299, "color"), lines(301, "shape")
    with pytest.raises(FetchError, match="'color': 299, 'shape': 301"):
        fetch("t2i-compbench", tmp_path)


def test_a_list_of_relations_holds_complex_prompts_only(home, tmp_path):
    home |= {f"/{name}_val.txt": lines(300, name) for name in T2I_CATEGORIES}
    home |= {"/complex_val_spatial.txt": lines(20, "complex"), "/complex_val_action.txt": lines(20, "complex")[:-5]}
    with pytest.raises(FetchError, match="complex_val_action.txt has 1 lines of no prompt, e.g. 'a comple'"):
        fetch("t2i-compbench", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_coco_is_taken_out_of_its_archive(home, tmp_path, monkeypatch):
    source = replace(SOURCES["coco-30k"], number=2, read=lambda path: read_coco(path, 2))
    monkeypatch.setitem(SOURCES, "coco-30k", source)
    captions = [{"id": k, "image_id": k, "caption": f"a cat {k}"} for k in range(3)]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("annotations/captions_val2014.json", json.dumps({"annotations": captions}))
        archive.writestr("annotations/captions_train2014.json", "{}")
    home["/annotations_trainval2014.zip"] = buffer.getvalue()
    fetch("coco-30k", tmp_path)
    assert len(load_benchmark("coco-30k", root=tmp_path)) == 2
    assert [path.name for path in (tmp_path / "coco").iterdir()] == ["captions_val2014.json"]
    home["/annotations_trainval2014.zip"] = buffer.getvalue()[:50]
    with pytest.raises(FetchError, match="zip"):
        fetch("coco-30k", tmp_path)


def test_a_cut_list_replaces_nothing(home, tmp_path, capsys):
    home["/drawbench.txt"] = lines(200)
    fetch("drawbench", tmp_path)
    home["/drawbench.txt"] = lines(150, "jug")
    assert main(["download", "drawbench", str(tmp_path)]) == 1
    assert "drawbench: 150 prompts" in capsys.readouterr().err
    assert (tmp_path / "drawbench/drawbench.txt").read_bytes() == lines(200)


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({"Content-Length": "9999"}, "the connection ended [0-9]+ bytes too early"),
        ({"Transfer-Encoding": "chunked"}, "IncompleteRead"),  # there are no chunks
    ],
)
def test_a_broken_connection_is_no_list(home, tmp_path, headers, words):
    home["/drawbench.txt"], home["/drawbench.txt headers"] = lines(200), headers  # as many lines as published
    with pytest.raises(FetchError, match=f"cannot fetch .*{words}.*; put it by hand to"):
        fetch("drawbench", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_answer_is_said_with_where_the_file_belongs(home, tmp_path, monkeypatch, capsys):
    with pytest.raises(
        FetchError, match=r"cannot fetch http://127.*drawbench.txt: HTTP Error 404.*by hand to .*drawbench"
    ):
        fetch("drawbench", tmp_path)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.setitem(FILES, "drawbench", {"drawbench/drawbench.txt": f"http://127.0.0.1:{port}/drawbench.txt"})
    assert main(["download", "drawbench", str(tmp_path)]) == 1
    assert "Connection refused" in capsys.readouterr().err
    with socket.socket() as silent:  # takes the connection and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/drawbench.txt"
        monkeypatch.setitem(FILES, "drawbench", {"drawbench/drawbench.txt": url})
        with pytest.raises(FetchError, match="timed out"):
            fetch("drawbench", tmp_path, timeout=0.2)
    assert list(tmp_path.iterdir()) == []


def test_every_public_benchmark_has_a_home():
    assert set(FILES) == set(SOURCES)
    for name, files in FILES.items():
        assert all(url.startswith("http") for url in files.values())
        assert any(path.startswith(SOURCES[name].paths[0]) for path in files)
    with pytest.raises(ValueError, match="known: coco-30k, coco-8k, drawbench"):
        fetch("tiny-test", None)
