"""Noun phrases of a prompt, by word lists and a few rules; no parser has to be installed.

Benchmarks split prompts by spaCy's ``noun_chunks``. On the plain captions that they consist of ("a red apple and a
wooden desk", "the brown dog was lying on the green mat") these rules find the same phrases; on free prose they are
cruder: a verb that is in no list and not followed by a function word stays in its phrase.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*|[.,;:!?()\"]")
NUMBERS = {
    word: number
    for number, word in enumerate("one two three four five six seven eight nine ten eleven twelve".split(), 1)
}
_DETERMINERS = frozenset(
    "a an the this that these those his her its their my your our some any no each every another both all several "
    "many few".split()
) | frozenset(NUMBERS)
_PREPOSITIONS = (
    "of in on at to by for from with without into onto over under above below behind beside besides between near next "
    "past down up through away across against around along toward towards inside outside off out as like than during "
    "before after while beneath underneath among amid upon"
)
_OTHERS = (
    "is are was were be been being has have had do does did can could will would may might must should not and or but "
    "nor who whom whose which what when where why how it they he she we i you there here very"
)
_ENDS = frozenset((_PREPOSITIONS + " " + _OTHERS).split())  # words that belong to no phrase
_PLACES = frozenset("top bottom left right side front back".split())  # "on the left of": no thing to be seen
_VERBS = frozenset(
    "lay lays lie lies sat sits stood stands hung hangs held holds hidden ran runs flew flies shone rose fell ate "
    "drank wore wears rode rides grew made makes cast spread swam leads led met".split()
)
_QUALITIES = frozenset(
    "red orange yellow green blue purple pink brown black white gray grey gold golden silver beige dark light bright "
    "small big large tall short long round square old new soft hard rough smooth wooden metallic".split()
)

# Further adjectives, those of T2I-CompBench's complex prompts: no list of a language's is ever complete.
_ADJECTIVES = _QUALITIES | frozenset(
    "ancient angular artistic battered beautiful blazing bold brilliant bulky bumpy bustling busy calm challenging "
    "chilled chilly choppy circular clean cold colorful comfortable comforting compact conical cool cozy cracked "
    "crisp crispy crunchy crystal-clear curious curved curvy cylindrical daily damp deep delectable delicate "
    "delicious detailed dim distant dizzying dramatic dry dull dusty dynamic eager early earthy elegant emotional "
    "endless enduring fiery floral flowing fluffy fragrant fresh furry fuzzy gentle geometric glossy gnarled gooey "
    "graceful grand greasy hardworking healing healthful heavy hot human icy injured intricate inviting iridescent "
    "jagged juicy lapping low lumpy lush luxurious majestic maternal matte modern multicolored murky natural opaque "
    "open ornate oval peaceful pentagonal perfect pillowy plain plump plush powerful priceless prickly pungent quiet "
    "ready rectangular refreshing rich ripe rocky romantic rough-edged rounded rugged rusted rusty savory seasonal "
    "serene sharp sheer shiny silky sizzling sleek slimy slushy soothing sour sparkling spherical spicy spiky sticky "
    "straight streamlined striking striped stunning sturdy stylish sugary sweet tart tech-savvy tender textured "
    "therapeutic thick thorny thrilling timeless tiny tired towering translucent treacherous triangular unique urban "
    "vibrant warm weathered welcoming wet winding".split()
)


@dataclass(frozen=True)
class NounPhrase:
    """A thing a prompt speaks of."""

    text: str  # as in the prompt, its determiner included
    head: str  # its noun, as in the prompt: the last word
    end: int  # where the head ends in the prompt, characters
    number: int = 1  # how many, by its number word ...
    counted: bool = False  # ... if it has one


def noun_phrases(prompt: str) -> list[NounPhrase]:
    """The noun phrases of ``prompt``, in order.

    A phrase begins with its determiner, if it has one, and ends before a preposition, an auxiliary, a conjunction, a
    punctuation mark, the next determiner, or a verb (of a list; or in -ed or -ing and followed by one of these).
    *and* joins two qualities ("black and white cat"). Phrases of place ("the left") are left out.
    """
    words = list(_WORD.finditer(prompt))
    phrases = [_phrase(prompt, group) for group in _groups(words)]
    return [phrase for phrase in phrases if phrase is not None]


def _groups(words: list[re.Match[str]]) -> Iterator[list[re.Match[str]]]:
    group: list[re.Match[str]] = []
    for at, word in enumerate(words):
        if _joins(words, at):
            group.append(word)
            continue
        if _ends(words, at, _has_noun(group)):
            yield group
            group = [word] if word[0].lower() in _DETERMINERS else []
        else:
            group.append(word)
    yield group


def _ends(words: list[re.Match[str]], at: int, begun: bool) -> bool:
    """Whether the word ends the phrase before it, of which it is no part."""
    text = words[at][0].lower()
    if text in _DETERMINERS or text in _ENDS or not text[0].isalnum():
        return begun or text not in NUMBERS  # "the two dogs" is one phrase
    if text in _PLACES and at + 1 < len(words) and words[at + 1][0].lower() == "of":
        return True  # "a circle left of a star"
    return begun and (text in _VERBS or (text.endswith(("ed", "ing")) and not _goes_on(words, at + 1)))


def _joins(words: list[re.Match[str]], at: int) -> bool:
    """Whether the word is an *and* between two qualities, or a comma between a quality and what it belongs to."""
    text = words[at][0].lower()
    if text not in ("and", ",") or at == 0 or words[at - 1][0].lower() not in _QUALITIES:
        return False
    return _goes_on(words, at + 1) and (text == "," or words[at + 1][0].lower() in _QUALITIES)


def _goes_on(words: list[re.Match[str]], at: int) -> bool:
    """Whether a content word stands there."""
    text = words[at][0].lower() if at < len(words) else "."
    return text[0].isalnum() and text not in _ENDS and text not in _DETERMINERS


def _content(group: list[re.Match[str]]) -> list[re.Match[str]]:
    return [word for word in group if word[0].lower() not in _DETERMINERS | {"and", ","}]


def _has_noun(group: list[re.Match[str]]) -> bool:
    content = _content(group)
    return bool(content) and content[-1][0].lower() not in _QUALITIES


def _phrase(prompt: str, group: list[re.Match[str]]) -> NounPhrase | None:
    content = _content(group)
    if not content or (len(content) == 1 and _names_nothing(content[0][0].lower(), len(group) > 1)):
        return None
    counted = [NUMBERS[word[0].lower()] for word in group if word[0].lower() in NUMBERS]
    head = content[-1]
    return NounPhrase(prompt[group[0].start() : head.end()], head[0], head.end(), (*counted, 1)[0], bool(counted))


def _names_nothing(word: str, determined: bool) -> bool:
    """Whether a lone word is a place, or (without a determiner) a verb."""
    return word in _PLACES or (not determined and (word in _VERBS or word.endswith(("ed", "ing"))))


def is_quality(word: str) -> bool:
    """Whether the word is one of the list of adjectives."""
    return word.lower() in _ADJECTIVES


def without(prompt: str, unwanted: Callable[[str], bool]) -> str:
    """The prompt's words and punctuation, separated by spaces, without the ``unwanted`` ones."""
    return " ".join(word[0] for word in _WORD.finditer(prompt) if not unwanted(word[0]))


def singular(noun: str) -> str:
    """The singular of a regular English plural and of a few others; a word that is no plural stays."""
    word = noun.lower()
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    for ending, instead in (("ies", "y"), ("ves", "f"), ("sses", "ss"), ("shes", "sh"), ("ches", "ch"), ("xes", "x")):
        if word.endswith(ending) and len(word) > len(ending) + 1:
            return word.removesuffix(ending) + instead
    return word[:-1] if word.endswith("s") and not word.endswith(("ss", "us", "is")) else word


_IRREGULAR = {
    "people": "person",
    "men": "man",
    "women": "woman",
    "children": "child",
    "mice": "mouse",
    "geese": "goose",
    "sheep": "sheep",
    "fish": "fish",
    "knives": "knife",
    "leaves": "leaf",
    "buses": "bus",
    "glasses": "glasses",
    "scissors": "scissors",
    "tomatoes": "tomato",
    "potatoes": "potato",
    "cookies": "cookie",
    "bus": "bus",
    "gas": "gas",
    "canvas": "canvas",
    "lens": "lens",
}
