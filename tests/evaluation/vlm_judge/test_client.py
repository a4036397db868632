"""The judge against a local server that speaks the chat protocol: orders, bursts, bad answers, money, and its key."""

import json
import logging
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
from chat_server import KEY, brighter
from PIL import Image
from scipy import optimize

from addiff_env.evaluation.vlm_judge.agreement import bradley_terry, cohens_kappa, rank_methods
from addiff_env.evaluation.vlm_judge.client import CostCeilingError, Judge, JudgeError, parse_answer
from addiff_env.evaluation.vlm_judge.judging import describe
from addiff_env.evaluation.vlm_judge.pairs import Pair, Preference, combine_orders, pairs_of
from addiff_env.evaluation.vlm_judge.settings import JudgeSettings

openai = pytest.importorskip("openai")


@pytest.fixture
def pairs(tmp_path):
    """Four pairs of a bright picture (method good) and a dark one (method bad)."""
    found = []
    for k in range(4):
        paths = []
        for name, level in (("good", 200 + k), ("bad", 10 + k)):
            paths.append(tmp_path / f"{name}{k}.png")
            Image.new("RGB", (8, 8), (level, 0, 0)).save(paths[-1])
        found.append(Pair(f"prompt {k}", k, "good", "bad", *paths))
    return found


@pytest.fixture
def ask(server, tmp_path):
    """Make judges of the local server; they are closed at the end."""
    made = []

    def make(cache="answers.jsonl", **changes):
        values = {"usd_per_million_input": 2.5, "usd_per_million_output": 10.0, "base_url": server.url, "timeout": 20.0}
        made.append(Judge(JudgeSettings("eye-1", **{**values, **changes}), tmp_path / cache))
        return made[-1]

    yield make
    for judge in made:
        judge.close()


def test_both_orders_are_asked_and_agree(server, ask, pairs):
    server.reply = brighter
    found = ask().compare(pairs)
    assert [p.winner for p in found] == ["a"] * 4 and all(p.consistent for p in found)
    assert len(server.requests) == 8
    swapped = [Pair(p.prompt, p.seed, p.method_b, p.method_a, p.image_b, p.image_a) for p in pairs]
    assert [p.winner for p in ask("other.jsonl").compare(swapped)] == ["b"] * 4


def test_a_request_is_structured_and_names_the_prompt(server, ask, pairs):
    ask().compare(pairs[:1])
    body = server.requests[0]
    assert body["model"] == "eye-1" and body["temperature"] == 0
    schema = body["response_format"]["json_schema"]
    assert schema["strict"] and schema["schema"]["properties"]["winner"]["enum"] == ["first", "second", "tie"]
    assert "prompt 0" in body["messages"][0]["content"][0]["text"]
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"


def test_a_model_that_allows_no_temperature_is_sent_none(server, ask, pairs):
    ask(temperature=None).compare(pairs[:1])
    assert "temperature" not in server.requests[0]


@pytest.mark.parametrize("always", ["first", "second"])
def test_position_bias_decides_nothing(server, ask, pairs, always):
    server.reply = lambda first, second: always
    found = ask().compare(pairs)
    assert [(p.winner, p.consistent) for p in found] == [("tie", False)] * 4


def test_orders_are_combined_conservatively():
    assert combine_orders("first", "second") == ("a", True)
    assert combine_orders("second", "first") == ("b", True)
    assert combine_orders("tie", "tie") == ("tie", True)
    assert combine_orders("first", "tie") == ("tie", False)
    assert combine_orders("first", None) == (None, False)


def test_bursts_of_refusals_and_timeouts_are_sat_out(server, ask, pairs):
    server.reply, server.script = brighter, [429, 500, 503, 429, None, 500, "hang"]
    judge = ask(timeout=0.5)
    assert [p.winner for p in judge.compare(pairs[:2])] == ["a", "a"]
    assert len(server.requests) == 4 + 6 and judge.spent_usd == pytest.approx(4 * (1000 * 2.5 + 100 * 10) / 1e6)


def test_what_does_not_pass_is_an_error_and_a_rerun_goes_on(server, ask, pairs):
    server.reply, server.script = brighter, [None, None, None, *[500] * 3]
    with pytest.raises(JudgeError, match="eye-1: InternalServerError"):
        ask(retries=2).compare(pairs)
    assert len(server.requests) == 6
    found = ask().compare(pairs)  # three answers are on disk
    assert [p.winner for p in found] == ["a"] * 4 and len(server.requests) == 6 + 5
    ask().compare(pairs)
    assert len(server.requests) == 11  # nothing is asked twice


PAGE = f"<!doctype html>\n<title>Welcome</title>{' ' * 120}<p>{KEY}</p>".encode() + b"." * 500
NO_COMPLETIONS = [
    (PAGE, "no completion from http://127.*/v1 .*/v1.*: <!doctype html> <title>Welcome</title> <p><key></p>[.]+$"),
    (b'{"error": {"message": "overloaded"}}', "no completion from http://127.*/v1: .*overloaded"),
    (b'{"choices": [], "error": {"message": "\\u0073' + KEY[1:].encode() + b' is busy"}}', "'<key> is busy'"),
    (b'{"id": "1", "choices": []}', "no completion from .*'choices': "),
    (b'{"id": "1", "choices": null}', "no completion from .*'choices': None"),
    (b"null", "no completion from .*: null"),
    (b"[]", "no completion from .*"),
    (b'{"choices": ', "no completion from .*: {"),
]


@pytest.mark.parametrize(("sent", "words"), NO_COMPLETIONS)
def test_what_is_no_completion_is_asked_again_and_costs_nothing(server, ask, pairs, tmp_path, monkeypatch, sent, words):
    waits = []
    monkeypatch.setattr("openai._base_client.time.sleep", waits.append)
    server.reply, server.script = brighter, [None, sent, sent, None, *[sent] * 3]
    judge = ask(retries=2)
    with pytest.raises(JudgeError, match=words) as error:
        judge.compare(pairs[:2])
    assert KEY[:10] not in str(error.value) and len(str(error.value)) < 400
    assert len(waits) == 4 and all(0 < wait <= 1 for wait in waits) and len(server.requests) == 7
    assert judge.spent_usd == pytest.approx(2 * 0.0035)
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 2
    assert [p.winner for p in ask().compare(pairs[:2])] == ["a", "a"] and len(server.requests) == 7 + 2


USAGES = [{}, None, [], {"prompt_tokens": 1000, "completion_tokens": None}, {"prompt_tokens": True}]


@pytest.mark.parametrize("usage", [*USAGES, {"prompt_tokens": 1e3, "completion_tokens": 9}])
def test_an_answer_that_does_not_tell_its_tokens_is_kept_and_costs_the_estimate(server, ask, pairs, usage):
    server.script = [{"usage": usage}] * 2
    judge = ask()
    estimate = judge.estimate_usd(pairs[:1])
    assert judge.compare(pairs[:1])[0].winner == "tie"
    assert judge.spent_usd == ask().spent_usd == pytest.approx(estimate) and ask().estimate_usd(pairs[:1]) == 0


FILTERED = [{"index": 0, "finish_reason": "content_filter", "message": message} for message in (None, {}, "no")]


@pytest.mark.parametrize("choice", [*FILTERED, {}, None, {"message": {"content": [{"type": "text", "text": "tie"}]}}])
def test_a_message_that_is_missing_is_an_unusable_answer(server, ask, pairs, choice):
    server.reply, server.script = brighter, [{"choices": [choice]}] * 2
    judge = ask()
    assert judge.compare(pairs[:1])[0].winner == "a"
    assert judge.spent_usd == pytest.approx(4 * 0.0035) and len(server.requests) == 4


def test_answers_are_cached_by_what_was_asked(server, ask, pairs):
    ask().compare(pairs[:1])
    other = Pair(
        "another prompt", *[getattr(pairs[0], f) for f in ("seed", "method_a", "method_b", "image_a", "image_b")]
    )
    ask().compare([other])
    assert len(server.requests) == 4
    Image.new("RGB", (8, 8), (1, 2, 3)).save(pairs[0].image_a)  # the same name, another picture
    ask().compare(pairs[:1])
    assert len(server.requests) == 6
    ask(base_url=server.url + "/").compare(pairs[:1])  # another endpoint is another judge
    assert len(server.requests) == 8


@pytest.mark.parametrize("bad", ["no json", '{"winner": "left", "reason": ""}', '{"winner": "tie"}', "[]", "", "null"])
def test_a_malformed_answer_is_asked_again(server, ask, pairs, bad):
    assert parse_answer(bad) is None
    server.reply, server.script = brighter, [bad, None, bad, bad]
    assert ask().compare(pairs[:1])[0].winner == "a"
    assert len(server.requests) == 5


def test_a_judge_that_never_answers_properly_gives_no_tie(server, ask, pairs, tmp_path):
    server.script = ["mumble"] * 6
    judge = ask()
    (found,) = judge.compare(pairs[:1])
    assert found.winner is None and not found.consistent
    assert judge.spent_usd == pytest.approx(6 * 0.0035)  # paid for all the same
    again = ask()  # a rerun neither forgets the money nor pays for the same again
    assert again.spent_usd == pytest.approx(6 * 0.0035) and again.estimate_usd(pairs[:1]) == 0
    assert again.compare(pairs[:1])[0].winner is None and len(server.requests) == 6
    server.reply = brighter
    with Judge(again.settings, tmp_path / "answers.jsonl", again=True) as insisting:
        assert insisting.compare(pairs[:1])[0].winner == "a"


def test_the_ceiling_counts_what_earlier_runs_spent(server, ask, pairs):
    first = ask(max_usd=0.05)
    first.compare(pairs[:2])
    assert first.spent_usd == pytest.approx(4 * 0.0035)
    resumed = ask(max_usd=0.03)
    assert resumed.spent_usd == pytest.approx(4 * 0.0035)
    with pytest.raises(CostCeilingError, match=r"\$0.01 is spent"):
        resumed.compare(pairs)  # four more questions are about 0.022, by what the first four were billed
    assert len(server.requests) == 4
    assert ask(max_usd=0.001).compare(pairs[:2])  # answers that are there cost nothing
    assert ask(max_usd=0.05, base_url=server.url + "/").spent_usd == 0  # another judge's money


def test_equal_pictures_are_a_tie_that_nobody_is_asked_about(server, ask, pairs):
    same = Pair("p", 0, "good", "bad", pairs[0].image_a, pairs[0].image_a)
    (found,) = ask().compare([same])
    assert (found.winner, found.consistent) == ("tie", True) and not server.requests


# --------------------------------------------------------------------------- money


def test_the_ceiling_is_checked_before_the_first_call(server, ask, pairs):
    judge = ask(max_usd=0.05)
    # By hand: 2 x 1500 picture tokens and the text in, 300 out, eight times.
    least = 8 * (3000 * 2.5 + 300 * 10) / 1e6
    assert least < judge.estimate_usd(pairs) < 1.3 * least
    with pytest.raises(CostCeilingError, match=r"8 questions to eye-1 cost about \$0.09.*ceiling is \$0.05"):
        judge.compare(pairs)
    assert not server.requests
    judge.compare(pairs[:2])
    assert judge.estimate_usd(pairs[:2]) == 0.0  # cached answers are free


def test_repeats_do_not_pass_the_ceiling(server, ask, pairs):
    server.script = ["mumble"] * 50
    judge = ask(max_usd=0.03, malformed_retries=40)
    with pytest.raises(CostCeilingError, match=r"1 questions to eye-1 .*ceiling is \$0.03"):
        judge.compare(pairs[:1])
    assert judge.spent_usd <= 0.03


def test_dear_pictures_are_found_out_by_the_first_answer(server, ask, pairs, tmp_path):
    server.prompt_tokens = 17_000  # 8,400 a picture, where 1,500 are assumed
    judge = ask(max_usd=0.2)  # assumed to cost 0.09
    real = (17_000 * 2.5 + 100 * 10) / 1e6
    with pytest.raises(CostCeilingError, match=r"7 questions to eye-1 cost about \$0.32, \$0.04 is spent.* is \$0.20"):
        judge.compare(pairs)
    assert len(server.requests) == 1 and judge.spent_usd == pytest.approx(real)
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 1
    resumed = ask(max_usd=0.2)  # by then it is known before any call
    assert resumed.estimate_usd(pairs) == pytest.approx(7 * (17_000 * 2.5 + 300 * 10) / 1e6, rel=1e-3)
    with pytest.raises(CostCeilingError, match="7 questions"):
        resumed.compare(pairs)
    assert len(server.requests) == 1
    told = ask("other.jsonl", max_usd=0.2, image_tokens=8_400)
    with pytest.raises(CostCeilingError, match=r"8 questions to eye-1 cost about \$0.36, \$0.00 is spent"):
        told.compare(pairs)
    assert ask(max_usd=0.5).compare(pairs)[0].winner == "tie" and len(server.requests) == 8


def test_an_unusable_answer_tells_of_dear_pictures_too(server, ask, pairs):
    server.prompt_tokens, server.script = 17_000, ["mumble"] * 3
    with pytest.raises(CostCeilingError, match="8 questions"):
        ask(max_usd=0.2).compare(pairs)
    assert len(server.requests) == 1


def test_the_estimate_is_of_what_answers_are_billed(server, ask, pairs):
    judge = ask()
    assumed = judge.estimate_usd(pairs[1:])
    judge.compare(pairs[:1])
    billed = 6 * (1000 * 2.5 + 300 * 10) / 1e6
    assert judge.estimate_usd(pairs[1:]) == pytest.approx(billed, rel=1e-2) and billed < 0.6 * assumed
    server.script = [{"usage": {"prompt_tokens": 1000, "completion_tokens": 900}}]  # who keeps to no limit
    judge.compare(pairs[1:2])
    assert judge.estimate_usd(pairs[2:]) == pytest.approx(4 * (1000 * 2.5 + 900 * 10) / 1e6, rel=1e-2)


# --------------------------------------------------------------------------- the key


def test_the_key_is_in_no_file_log_message_or_repr(server, ask, pairs, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    server.reply = brighter
    judge = ask()
    judge.compare(pairs[:2])
    server.script = [json.dumps({"winner": "tie", "reason": f"I was told {KEY}"}), 401]  # a server that blabs
    with pytest.raises(JudgeError, match="AuthenticationError.*<key>") as error:
        judge.compare(pairs[2:])
    assert error.value.__cause__ is None and error.value.__suppress_context__
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    texts = [caplog.text, str(error.value), repr(judge.settings), repr(vars(judge))]
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 5
    assert not any(KEY.encode() in content for content in written)
    assert not any(KEY in text for text in texts)


def test_settings_come_from_the_environment(monkeypatch, tmp_path, pairs):
    for name in ("MODEL", "USD_IN", "USD_OUT", "API_KEY", "BASE_URL", "MAX_USD", "IMAGE_TOKENS"):
        monkeypatch.delenv(f"ADDIFF_JUDGE_EYE_{name}", raising=False)
    monkeypatch.setenv("ADDIFF_JUDGE_EYE_MODEL", "m")
    with pytest.raises(ValueError, match="ADDIFF_JUDGE_EYE_USD_IN, ADDIFF_JUDGE_EYE_USD_OUT, ADDIFF_JUDGE_EYE_API_KEY"):
        JudgeSettings.from_environment("eye")
    for name, value in (("USD_IN", "2.5"), ("USD_OUT", "dear"), ("API_KEY", KEY), ("BASE_URL", "http://x/v1")):
        monkeypatch.setenv(f"ADDIFF_JUDGE_EYE_{name}", value)
    with pytest.raises(ValueError, match="USD_OUT must be a number of at least 0, got 'dear'"):
        JudgeSettings.from_environment("eye")
    monkeypatch.setenv("ADDIFF_JUDGE_EYE_USD_OUT", "10")
    monkeypatch.setenv("ADDIFF_JUDGE_EYE_MAX_USD", "3")
    settings = JudgeSettings.from_environment("eye", retries=1)
    assert (settings.temperature, settings.image_tokens) == (0, 1500)
    monkeypatch.setenv("ADDIFF_JUDGE_EYE_IMAGE_TOKENS", "8500")
    assert JudgeSettings.from_environment("eye").image_tokens == 8500
    monkeypatch.setenv("ADDIFF_JUDGE_EYE_TEMPERATURE", "none")
    assert JudgeSettings.from_environment("eye").temperature is None
    assert (settings.base_url, settings.max_usd, settings.retries) == ("http://x/v1", 3.0, 1)
    assert settings.key_variable == "ADDIFF_JUDGE_EYE_API_KEY" and KEY not in repr(settings)
    monkeypatch.delenv("ADDIFF_JUDGE_EYE_API_KEY")
    with pytest.raises(JudgeError, match="no key in the environment variable ADDIFF_JUDGE_EYE_API_KEY"):
        Judge(settings, tmp_path / "c.jsonl").compare(pairs)


@pytest.mark.parametrize("variable", ["USD_IN", "USD_OUT", "MAX_USD", "ANSWER_TOKENS", "IMAGE_TOKENS"])
@pytest.mark.parametrize("value", ["nan", "-1", "inf", "1e400"])
def test_a_price_that_is_none_does_not_lift_the_ceiling(monkeypatch, variable, value):
    for name, usual in {"MODEL": "m", "USD_IN": "1", "USD_OUT": "1", "API_KEY": KEY, variable: value}.items():
        monkeypatch.setenv(f"ADDIFF_JUDGE_EYE_{name}", usual)
    with pytest.raises(ValueError, match=f"ADDIFF_JUDGE_EYE_{variable} must be a number of at least 0, got '{value}'"):
        JudgeSettings.from_environment("eye")
    with pytest.raises(ValueError, match="max_usd of m must be at least 0, got nan"):
        JudgeSettings("m", 1.0, 1.0, max_usd=math.nan)


# --------------------------------------------------------------------------- agreement and ranking


def preferences(winners, method_a="x", method_b="y"):
    return [Preference(f"p{k}", k, method_a, method_b, w, True, "j") for k, w in enumerate(winners)]


def test_kappa_by_hand():
    one = ["a"] * 25 + ["b"] * 25
    other = ["a"] * 20 + ["b"] * 5 + ["a"] * 10 + ["b"] * 15
    assert cohens_kappa(preferences(one), preferences(other)) == pytest.approx(0.4)  # agree .7, by chance .5
    assert cohens_kappa(preferences(["a", "b", "tie"]), preferences(["a", "b", "tie"])) == 1.0
    with_gap = [*one, None], [*other, "a"]
    assert cohens_kappa(*map(preferences, with_gap)) == pytest.approx(0.4)
    with pytest.raises(ValueError, match="always answered 'tie'"):
        cohens_kappa(preferences(["tie"] * 3), preferences(["tie"] * 3))
    with pytest.raises(ValueError, match="other pairs"):
        cohens_kappa(preferences(["a"]), preferences(["a", "b"]))
    with pytest.raises(ValueError, match="none of 1 pairs"):
        cohens_kappa(preferences([None]), preferences(["a"]))


def test_bradley_terry_is_the_maximum_of_its_likelihood(rng):
    wins = rng.integers(1, 20, (5, 5)).astype(float)
    np.fill_diagonal(wins, 0)

    def loss(strength):
        difference = strength[:, None] - strength
        return (wins * np.log1p(np.exp(-difference))).sum() + 1e-3 * strength.sum() ** 2

    expected = optimize.minimize(loss, np.zeros(5), tol=1e-10).x
    assert bradley_terry(wins, prior=0) == pytest.approx(expected - expected.mean(), abs=1e-4)
    two = bradley_terry(np.array([[0.0, 30.0], [10.0, 0.0]]), prior=0)
    assert two[0] - two[1] == pytest.approx(math.log(3))


def test_bradley_terry_stays_finite_and_refuses_islands():
    shutout = bradley_terry(np.array([[0.0, 10.0], [0.0, 0.0]]))
    assert shutout[0] - shutout[1] == pytest.approx(math.log(10.5 / 0.5))
    apart = np.zeros((4, 4))
    apart[0, 1] = apart[2, 3] = 1.0
    with pytest.raises(ValueError, match=r"methods \[2, 3\] never met"):
        bradley_terry(apart)


def test_planted_strengths_are_recovered(rng):
    truth, names = {"agent": 0.8, "ddim": 0.0, "turbo": -0.8}, ["agent", "ddim", "turbo"]
    games = []
    for a, b in (("agent", "ddim"), ("agent", "turbo"), ("ddim", "turbo")):
        chance = 1 / (1 + math.exp(truth[b] - truth[a]))
        winners = ["tie" if rng.random() < 0.1 else "a" if rng.random() < chance else "b" for _ in range(400)]
        games += preferences(winners, a, b)
    games += preferences([None], "agent", "ddim")
    found = rank_methods(games, draws=100)
    assert [s.method for s in found] == names
    for s in found:
        assert s.low < s.estimate < s.high and s.estimate == pytest.approx(truth[s.method], abs=0.25)
    with pytest.raises(ValueError, match="none of 1 pairs has an answer"):
        rank_methods(preferences([None]))


def test_a_single_prompt_gives_no_interval():
    games = [replace(one, prompt="p") for one in preferences(["a"] * 9 + ["b"])]
    found = rank_methods(games)
    assert [(s.method, s.low, s.high) for s in found] == [("x", None, None), ("y", None, None)]
    ranking = [asdict(s) for s in found]
    judged = {"judges": {}, "agreement": [], "together": {"ranking": ranking}}
    assert f"x: {found[0].estimate:+.3f}\n" in describe(judged)


def test_bootstrap_intervals_of_the_ranking_agree_with_theory(rng):
    # Two methods, n games with share s: the log-odds have the standard error 1 / sqrt(n s (1 - s)).
    games = preferences(["a"] * 240 + ["b"] * 160)
    first = rank_methods(games, draws=400)[0]
    error = 1 / math.sqrt(400 * 0.6 * 0.4) / 2  # half the difference, as the mean is zero
    assert first.high - first.low == pytest.approx(2 * 1.96 * error, rel=0.15)


def test_pairs_of_methods(tmp_path):
    places = [("p", 1), ("q", 2)]
    kept = {name: {place: tmp_path / f"{name}{place[1]}.png" for place in places} for name in ("x", "y", "z")}
    pairs = pairs_of(kept, places)
    assert len(pairs) == 6 and {(p.method_a, p.method_b) for p in pairs} == {("x", "y"), ("x", "z"), ("y", "z")}
    assert pairs[0].image_a == tmp_path / "x1.png"
    del kept["y"]["q", 2]
    with pytest.raises(ValueError, match=r"'y' has no picture of 1 places, e.g. \('q', 2\)"):
        pairs_of(kept, places)
