"""A vision-language model as judge of pairs of pictures, through the OpenAI-compatible chat protocol.

Every pair is asked in both orders and a preference counts only where both orders agree, so a judge that prefers
whatever comes first decides nothing (Zheng et al. 2023, section 3.4). Answers are kept on disk with what they cost, the
unusable ones too, so that nothing is paid for twice and the ceiling holds over interrupted runs together. Before the
first call the cost is estimated, and a run that would cost more than its ceiling is refused. What models bill for a
picture differs several times over, so from the first answer on the estimate is of what answers really cost.

`addiff_env.evaluation.vlm_judge.judging` is the command that judges a finished run.

The endpoint, the model and its prices come from environment variables, see `settings.JudgeSettings`. The key is read
when the client is made and goes into the client alone: never into settings, rows, the cache, logs or messages.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from addiff_env.evaluation.vlm_judge.pairs import FIRST, SECOND, TIE, Pair, Preference, combine_orders
from addiff_env.evaluation.vlm_judge.settings import JudgeSettings
from addiff_env.storage.jsonl import append_objects, read_objects

_QUESTION = (
    "Two pictures were made for the prompt below. Which one follows the prompt better (objects, counts, colours, "
    "relations)? Where both follow it equally well, prefer the one with fewer visible defects. Answer 'tie' if neither "
    "is better. Do not let the order of the pictures influence you.\n\nPrompt: {prompt}"
)
_SCHEMA = {
    "name": "preference",
    "strict": True,
    "schema": {
        "type": "object",
        "properties": {"reason": {"type": "string"}, "winner": {"type": "string", "enum": [FIRST, SECOND, TIE]}},
        "required": ["reason", "winner"],
        "additionalProperties": False,
    },
}
_KEPT = 2000  # characters of what a judge said
_DEARER = 1.1  # times the estimate: more than what prompts differ by
_NO_COMPLETION = 599  # the status of what says 200 and is none: the client asks again, as after any of 500 and above
_SHOWN = 200  # characters of what is no completion
_PROTOCOL = hashlib.sha256(json.dumps([_QUESTION, _SCHEMA]).encode()).hexdigest()[:12]  # a new wording asks anew


class JudgeError(RuntimeError):
    """The judge could not be asked; answers so far are kept, and the same call goes on from there."""


class CostCeilingError(JudgeError):
    """Asking would cost more than allowed."""


@dataclass(frozen=True)
class _Question:
    prompt: str
    first: Path
    second: Path
    key: str
    is_trivial: bool  # both pictures are the same


class Judge:
    """Asks one model about pairs; answers live in ``cache``, a JSONL file keyed by what was asked.

    Args:
        settings: model, prices, ceiling.
        cache: file of answers, made if absent; the same file serves several judges.
        again: ask anew what was asked before as often as allowed without a usable answer.
    """

    def __init__(self, settings: JudgeSettings, cache: Path, again: bool = False) -> None:
        self.settings, self.cache, self.ceiling_usd = settings, cache, settings.max_usd
        self.endpoint = _hash([settings.base_url, settings.model])[:12]
        kept = read_objects(cache)
        self.answers: dict[str, str] = {row["key"]: row["winner"] for row in kept if row["winner"]}
        self.unusable = Counter() if again else Counter(row["key"] for row in kept if not row["winner"])
        self.spent_usd = sum(row.get("usd", 0.0) for row in kept if row.get("endpoint") == self.endpoint)
        self._billed: tuple[int, int] | None = None  # tokens of a picture and of an answer, the most so far
        for row in kept:
            if row.get("endpoint") == self.endpoint:
                self._learn(row)
        self._client: Any = None

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the connections go; a later call opens new ones."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def estimate_usd(self, pairs: Iterable[Pair]) -> float:
        """About what asking the pairs costs without repeats, cached answers being free."""
        return sum(self._price_estimate(question) for question in self._pending(pairs))

    def compare(self, pairs: Sequence[Pair], watch: Callable[[list[Any]], Iterable[Any]] = iter) -> list[Preference]:
        """Preferences in the order of the pairs.

        Args:
            pairs: what is asked, both ways round; two equal pictures are a tie without being asked.
            watch: wraps the list of questions as they are asked, e.g. a progress bar.

        Raises:
            CostCeilingError: the estimate exceeds the ceiling (before any call, and before the next one where an answer
                cost more than estimated), or what was spent reaches it.
            JudgeError: the endpoint refuses, stays unreachable or sends no completions, with its words but without the
                key.
            FileNotFoundError: a picture that is not there.
        """
        pending = self._pending(pairs)
        self._require_budget(pending)
        for question in watch(pending):
            self._ask_and_keep(question, pending)
        return [self._preference(pair) for pair in pairs]

    def require_budget(self, pairs: Iterable[Pair]) -> None:
        """Check that asking the pairs, with what was spent before, costs no more than ``ceiling_usd``.

        Raises:
            CostCeilingError: it does.
        """
        self._require_budget(self._pending(pairs))

    def _require_budget(self, questions: Sequence[_Question]) -> None:
        estimate = sum(self._price_estimate(question) for question in questions)
        if questions and self.spent_usd + estimate > self.ceiling_usd:
            shared = ", the other judges' share aside" if self.ceiling_usd < self.settings.max_usd else ""
            raise CostCeilingError(
                f"{len(questions)} questions to {self.settings.model} cost about ${estimate:.2f}, "
                f"${self.spent_usd:.2f} is spent, the ceiling is ${max(self.ceiling_usd, 0.0):.2f}{shared}"
            )

    def _pending(self, pairs: Iterable[Pair]) -> list[_Question]:
        asked = {q.key: q for pair in pairs for q in self._questions(pair)}
        return [question for question in asked.values() if self._is_open(question)]

    def _is_open(self, question: _Question) -> bool:
        """Whether it is to be asked: not answered, not given up, and between two different pictures."""
        if question.key in self.answers or question.is_trivial:
            return False
        return self.unusable[question.key] <= self.settings.malformed_retries

    def _questions(self, pair: Pair) -> tuple[_Question, _Question]:
        a, b = pair.image_a, pair.image_b
        return self._question(pair.prompt, a, b), self._question(pair.prompt, b, a)

    def _question(self, prompt: str, first: Path, second: Path) -> _Question:
        digests = [_digest(first), _digest(second)]
        key = _hash([_PROTOCOL, self.settings.base_url, self.settings.model, prompt, *digests])
        return _Question(prompt, first, second, key, digests[0] == digests[1])

    def _preference(self, pair: Pair) -> Preference:
        asked = self._questions(pair)
        answers = [TIE if question.is_trivial else self.answers.get(question.key) for question in asked]
        winner, consistent = combine_orders(*answers)
        names = (pair.prompt, pair.seed, pair.method_a, pair.method_b)
        return Preference(*names, winner, consistent, self.settings.model)

    # ----------------------------------------------------------------- one question

    def _ask_and_keep(self, question: _Question, pending: Sequence[_Question]) -> None:
        """Ask until the answer is well-formed; one that never is stays unanswered, by a rerun as well.

        Where its answer tells that questions cost more than estimated, what is left of the ``pending`` ones, it among
        them, has to be within the ceiling still.
        """
        while self._is_open(question):
            estimate = self._price_estimate(question)
            self._require_budget([question])
            self._ask_once(question)
            if self._price_estimate(question) > _DEARER * estimate:
                self._require_budget([other for other in pending if self._is_open(other)])

    def _ask_once(self, question: _Question) -> None:
        completion = json.loads(self._post(question))
        text, tokens = _content(completion), _tokens(completion)
        usd = self._dollars(*tokens) if tokens else self._price_estimate(question)
        winner, reason = parse_answer(text) or (None, text or "")
        record = {"key": question.key, "model": self.settings.model, "endpoint": self.endpoint, "usd": usd}
        said = {"prompt": question.prompt, "winner": winner, "reason": self._without_key(reason)[:_KEPT]}
        row = {**record, "tokens": tokens, **said}
        append_objects(self.cache, [row])
        self.spent_usd += usd
        self._learn(row)
        if winner is None:
            self.unusable[question.key] += 1
        else:
            self.answers[question.key] = winner

    def _post(self, question: _Question) -> str:
        """The endpoint's completion, unparsed: of one that lacks a part the client would make whatever was expected."""
        import openai

        try:
            response = self._connected().chat.completions.with_raw_response.create(
                model=self.settings.model,
                messages=_messages(question),
                response_format={"type": "json_schema", "json_schema": _SCHEMA},
                max_completion_tokens=self.settings.answer_tokens,
                **({} if self.settings.temperature is None else {"temperature": self.settings.temperature}),
            )
        except openai.OpenAIError as error:
            # Not chained: the original holds the request and with it the key.
            if isinstance(error, openai.APIStatusError) and error.status_code == _NO_COMPLETION:
                raise JudgeError(self._no_completion(str(error.response.text))) from None
            raise JudgeError(self._without_key(f"{self.settings.model}: {type(error).__name__}: {error}")) from None
        return str(response.http_response.text)

    def _no_completion(self, sent: str) -> str:
        """What to say of it: its error, or how it begins. The key goes before anything is cut, lest a part stays."""
        body = _parsed(sent)
        said = sent if body is None else str((isinstance(body, dict) and body.get("error")) or body)
        shown = " ".join(self._without_key(said).split())[:_SHOWN]
        hint = "" if isinstance(body, dict) else " (is that the base URL of its API, mostly one that ends in /v1?)"
        place = self._without_key(self.settings.base_url or "the default base URL")
        return f"{self.settings.model}: no completion from {place}{hint}: {shown}"

    def _connected(self) -> Any:
        if self._client is None:
            self._client = _connect(self.settings)
        return self._client

    def _without_key(self, text: str) -> str:
        key = os.environ.get(self.settings.key_variable)
        return text.replace(key, "<key>") if key else text

    # ----------------------------------------------------------------- money

    def _price_estimate(self, question: _Question) -> float:
        pictures, answer = self._billed or (self.settings.image_tokens, self.settings.answer_tokens)
        return self._dollars(2 * pictures + _text_tokens(question.prompt), answer)

    def _learn(self, row: Mapping[str, Any]) -> None:
        """Estimate from now on with what this judge's kept answer was billed for."""
        if not row.get("tokens"):
            return
        tokens_in, tokens_out = row["tokens"]
        picture = math.ceil(max(tokens_in - _text_tokens(row["prompt"]), 0) / 2)
        most = self._billed or (0, self.settings.answer_tokens)
        self._billed = max(picture, most[0]), max(tokens_out, most[1])

    def _dollars(self, tokens_in: int, tokens_out: int) -> float:
        settings = self.settings
        return (tokens_in * settings.usd_per_million_input + tokens_out * settings.usd_per_million_output) / 1e6


def _text_tokens(prompt: str) -> int:
    characters = len(_QUESTION) + len(prompt) + len(json.dumps(_SCHEMA))
    return math.ceil(characters / 3)  # about four characters a token; three, to be safe


def _connect(settings: JudgeSettings) -> Any:
    try:
        from openai import DefaultHttpxClient, OpenAI
    except ImportError as error:
        raise JudgeError("the judge needs the package `openai`: pip install 'addiff-env[judge]'") from error
    key = os.environ.get(settings.key_variable)
    if not key:
        raise JudgeError(f"no key in the environment variable {settings.key_variable}")
    # The client backs off exponentially with jitter and honours Retry-After; so it does after what is no completion.
    watched = DefaultHttpxClient(event_hooks={"response": [_fail_without_completion]})
    return OpenAI(
        api_key=key,
        base_url=settings.base_url,
        max_retries=settings.retries,
        timeout=settings.timeout,
        http_client=watched,
    )


def _fail_without_completion(response: Any) -> None:
    """Take the status of success from an answer that is no completion: a web page, or an error."""
    if response.is_success:
        response.read()
        if not _is_completion(response.text):
            response.status_code = _NO_COMPLETION


def _messages(question: _Question) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = [{"type": "text", "text": _QUESTION.format(prompt=question.prompt)}]
    for name, path in (("First picture:", question.first), ("Second picture:", question.second)):
        content += [{"type": "text", "text": name}, {"type": "image_url", "image_url": {"url": _data_url(path)}}]
    return [{"role": "user", "content": content}]


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _is_completion(sent: str) -> bool:
    body = _parsed(sent)
    choices = body.get("choices") if isinstance(body, dict) and not body.get("error") else None
    return isinstance(choices, list) and bool(choices)


def _content(completion: Mapping[str, Any]) -> str | None:
    """What the judge says; None where a filter or the like left nothing."""
    choice = completion["choices"][0]
    message = choice.get("message") if isinstance(choice, dict) else None
    content = message.get("content") if isinstance(message, dict) else None
    return content if isinstance(content, str) else None


def _tokens(completion: Mapping[str, Any]) -> tuple[int, int] | None:
    """Tokens in and out; None where they are not both stated."""
    usage = completion.get("usage")
    stated: dict[str, Any] = usage if isinstance(usage, dict) else {}
    counts: list[Any] = [stated.get("prompt_tokens"), stated.get("completion_tokens")]
    whole = all(isinstance(count, int) and not isinstance(count, bool) and count >= 0 for count in counts)
    return (counts[0], counts[1]) if whole else None


def _data_url(path: Path) -> str:
    kind = "jpeg" if path.suffix.lower() in (".jpg", ".jpeg") else "png"
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _hash(parts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def parse_answer(text: str | None) -> tuple[str, str] | None:
    """Winner and reason from a structured answer; None where it is not one."""
    try:
        values = json.loads(text or "")
        winner, reason = values["winner"], values["reason"]
    except (ValueError, KeyError, TypeError):
        return None
    return (winner, str(reason)) if winner in (FIRST, SECOND, TIE) else None
