"""Noun phrases of a prompt, by word lists and a few rules; no parser has to be installed.

Benchmarks split prompts by spaCy's ``noun_chunks``. These rules are made for the plain captions that most of them
consist of ("a red apple and a wooden desk", "the brown dog was lying on the green mat"). They have not been compared
with spaCy's phrases prompt by prompt, and on free prose they are cruder: a verb or an adverb that is in no list stays
in its phrase ("the clouds drifted lazily"), and so does a word behind its noun ("the only pieces left").
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
_ARTICLES = frozenset("a an the his her its their my your our".split())  # and what stands in their place
_DETERMINERS = (
    _ARTICLES
    | frozenset("this that these those some any no each every another both all several many few".split())
    | frozenset(NUMBERS)
)
_PREPOSITIONS = (
    "of in on at to by for from with without into onto over under above below behind beside besides between near next "
    "past down up through away across against around along alongside toward towards inside outside off out as like "
    "than during before after while beneath underneath among amid upon"
)
_OTHERS = (
    "is are was were be been being has have had do does did can could will would may might must should not and or but "
    "nor who whom whose which what when where why how it they he she we i you there here very"
)
_FINITE = (
    "ate blew drank drove flew held hung lay met ran sang sank sat shone slept stood strode swam told woke wore wrote"
)
_ENDS = frozenset((_PREPOSITIONS + " " + _OTHERS + " " + _FINITE).split())  # words that belong to no phrase
_PLACES = frozenset("top bottom left right side front back".split())  # "on the left of": no thing to be seen
_STANCES = frozenset("hang hangs hung lay lays lie lies ran sat sit sits shone stands stood".split())
_VERBS = _STANCES | frozenset(  # behind a noun; some are adjectives before one ("a hidden door")
    "attract attracted bake boil cast created decorate fell flies grew hidden hold holds illuminate jot keep "
    "kept leads led made makes provide provided reads rides rode rose runs serve shines spread spun stuck "
    "wears write".split()
)
# Nouns too: verbs where an article follows ("slice the bread"), some also where a plural has a preposition behind it.
_STAYS = frozenset("cut nap perch rest stand".split())
_BOTH = _STAYS | frozenset("beat cook display features lit measure mix pound release shape slice stir".split())
_NOUNS = frozenset(  # that look like participles or adjectives
    "awning bed bedding bobsled building carving ceiling clothing crossing drawing dressing duckling dumpling "
    "earring engraving flatbed flooring frosting herring human icing king lightning lining moped painting "
    "pudding railing sapling seating seed seedling shed sibling sled spring speed starling steed stitching "
    "stocking string tart topping wedding weed wing".split()
)
# What makes *ring* a noun; behind another noun, or a colour of no list ("a cyan ring"), it is still taken for a verb.
_RINGS = frozenset("boxing diamond engagement key napkin onion pearl ruby sapphire signet wedding".split())
_QUALITIES = frozenset(
    "red orange yellow green blue purple pink brown black white gray grey gold golden silver beige dark light bright "
    "small big large tall short long round square old new soft hard rough smooth wooden metallic".split()
)

# Further adjectives, mostly those of T2I-CompBench's complex prompts: no list of a language's is ever complete.
_ADJECTIVES = _QUALITIES | frozenset(
    "ancient angular artistic battered beautiful blazing bold brilliant bulky bumpy bustling busy calm challenging "
    "chilled chilly choppy circular clean cold colorful comfortable comforting compact conical cool cozy cracked "
    "crisp crispy crunchy crystal-clear cubic curious curved curvy cylindrical daily damp deep delectable delicate "
    "delicious detailed dim distant dizzying dramatic dry dull dusty dynamic eager early earthy elegant emotional "
    "empty endless enduring fiery floral flowing fluffy fragrant fresh furry fuzzy gentle geometric glossy gnarled "
    "gooey graceful grand greasy hardworking healing healthful heavy hot human icy injured intricate inviting "
    "iridescent jagged juicy lapping low lumpy lush luxurious majestic maternal matte modern multicolored murky "
    "natural oblong opaque open ornate oval peaceful pentagonal perfect pillowy plain plump plush powerful priceless "
    "prickly pungent pyramidal quiet ready rectangular refreshing rich ripe rocky romantic rough-edged rounded rugged "
    "rusted rusty savory seasonal serene sharp sheer shiny silky sizzling sleek slimy slushy soothing sour sparkling "
    "spherical spicy spiky sticky straight streamlined striking striped stunning sturdy stylish sugary sweet tan tart "
    "tech-savvy tender textured therapeutic thick thorny thrilling timeless tiny tired towering translucent "
    "treacherous triangular unique urban vibrant warm weathered welcoming wet winding".split()
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
    *and* joins two adjectives ("black and white cat"), a comma one and what follows. Phrases of place ("the left") are
    left out, and what a verb of stance says of its noun ("stood tall").
    """
    words = list(_WORD.finditer(prompt))
    phrases = [_phrase(prompt, group) for group in _groups(words)]
    return [phrase for phrase in phrases if phrase is not None]


def _groups(words: list[re.Match[str]]) -> Iterator[list[re.Match[str]]]:
    group: list[re.Match[str]] = []
    for at, word in enumerate(words):
        if _joins(words, at) or _is_tin(words, at):
            group.append(word)
            continue
        if _ends(words, at, group):
            yield group
            group = [word] if word[0].lower() in _DETERMINERS else []
        else:
            group.append(word)
    yield group


def _ends(words: list[re.Match[str]], at: int, group: list[re.Match[str]]) -> bool:
    """Whether the word ends the phrase ``group`` before it, of which it is no part."""
    text, begun = words[at][0].lower(), _has_noun(group)
    if text in _DETERMINERS or text in _ENDS or not text[0].isalnum():
        return begun or text not in NUMBERS  # "the two dogs" is one phrase
    if text in _PLACES and _text(words, at + 1) == "of":
        return True  # "a circle left of a star"
    if not group and text in _ADJECTIVES and _text(words, at - 1) in _STANCES:
        return not _goes_on(words, at + 1)  # "a flower stood tall"
    return (begun or (not group and text in _NOUNS)) and _is_verb(words, at, group)


def _is_verb(words: list[re.Match[str]], at: int, group: list[re.Match[str]]) -> bool:
    """Whether the word, behind the noun of ``group`` or at the start of one, is a verb."""
    text, following = words[at][0].lower(), _text(words, at + 1)
    if text in _BOTH and following not in _ARTICLES:
        return text in _STAYS and following in _PREPOSITIONS.split() and _many(words, at, group)
    if text in _NOUNS or (text == "ring" and _text(words, at - 1) in _RINGS):
        return text.endswith("ing") and following in _ARTICLES  # "children building a tower"
    return text in _VERBS | _BOTH or (text.endswith(("ed", "ing")) and not _goes_on(words, at + 1))


def _many(words: list[re.Match[str]], at: int, group: list[re.Match[str]]) -> bool:
    """Whether ``group``, which ends before the word, is a plural or the second of two ("the towel and soap dish")."""
    first, last = group[0][0].lower(), group[-1][0].lower()
    if first in ("a", "an"):
        return False
    return singular(last) != last or (first not in _DETERMINERS and _text(words, at - len(group) - 1) == "and")


def _joins(words: list[re.Match[str]], at: int) -> bool:
    """Whether the word is an *and* between two adjectives, or a comma between one and what it belongs to."""
    text = words[at][0].lower()
    if text not in ("and", ",") or _text(words, at - 1) not in _ADJECTIVES:
        return False
    return _goes_on(words, at + 1) and (text == "," or _text(words, at + 1) in _ADJECTIVES)


def _is_tin(words: list[re.Match[str]], at: int) -> bool:
    """Whether the word is the noun *can*: behind an article or another word of its phrase, and before no verb."""
    before, following = _text(words, at - 1), _text(words, at + 1)
    if _text(words, at) != "can" or before in _ENDS or not before[0].isalnum():
        return False
    return before == "watering" or not (_goes_on(words, at + 1) or following in ("not", "be", "have", "do"))


def _goes_on(words: list[re.Match[str]], at: int) -> bool:
    """Whether a content word stands there."""
    text = _text(words, at)
    return _is_tin(words, at) or (text[0].isalnum() and text not in _ENDS and text not in _DETERMINERS)


def _text(words: list[re.Match[str]], at: int) -> str:
    """The word there in lower case; outside of the prompt a full stop."""
    return words[at][0].lower() if 0 <= at < len(words) else "."


def _content(group: list[re.Match[str]]) -> list[re.Match[str]]:
    return [word for word in group if word[0].lower() not in _DETERMINERS | {"and", ","}]


def _has_noun(group: list[re.Match[str]]) -> bool:
    content = _content(group)
    return bool(content) and content[-1][0].lower() not in _ADJECTIVES - _NOUNS


def _phrase(prompt: str, group: list[re.Match[str]]) -> NounPhrase | None:
    content = _content(group)
    if not content or (len(content) == 1 and _names_nothing(content[0][0].lower(), len(group) > 1)):
        return None
    counted = [NUMBERS[word[0].lower()] for word in group if word[0].lower() in NUMBERS]
    head = content[-1]
    return NounPhrase(prompt[group[0].start() : head.end()], head[0], head.end(), (*counted, 1)[0], bool(counted))


def _names_nothing(word: str, determined: bool) -> bool:
    """Whether a lone word is a place, or (without a determiner) a verb."""
    if determined or word in _NOUNS:
        return word in _PLACES
    return word in _PLACES or word in _VERBS or word.endswith(("ed", "ing"))


def is_quality(word: str) -> bool:
    """Whether the word is one of the list of adjectives."""
    return word.lower() in _ADJECTIVES


def without(prompt: str, unwanted: Callable[[str], bool]) -> str:
    """The prompt's words and punctuation, separated by spaces, without the ``unwanted`` ones."""
    return " ".join(word[0] for word in _WORD.finditer(prompt) if not unwanted(word[0]))


def counted_noun(phrase: NounPhrase) -> str:
    """The one or two words that name what a phrase counts, in the singular: "traffic light" of "two traffic lights".

    Of several it ends with the plural, of one before a verb: what follows is none of it ("two cars stuck").
    """
    words = [word[0].lower() for word in _content(list(_WORD.finditer(phrase.text)))]
    end = (phrase.number > 1 and _plural_end(words)) or _verb_at(words)
    return " ".join([*words[max(0, end - 2) : end - 1], singular(words[end - 1])])


def _plural_end(words: list[str]) -> int:
    """Where the first run of plurals ends ("sports cars parked"); 0 where there is none."""
    plural = [singular(word) != word for word in words] + [False]
    return next((at for at in range(1, len(plural)) if plural[at - 1] and not plural[at]), 0)


def _verb_at(words: list[str]) -> int:
    """Where the first verb behind a noun is; the number of words where there is none."""
    verbs = [word in _VERBS or (word.endswith(("ed", "ing")) and word not in _NOUNS | {"ring"}) for word in words]
    behind = (at for at in range(1, len(words)) if verbs[at] and words[at - 1] not in _ADJECTIVES)
    return next(behind, len(words))


def singular(noun: str) -> str:
    """The singular of a regular English plural and of a few others; a word that is no plural stays."""
    word = noun.lower()
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    for ending, instead in (("ies", "y"), ("sses", "ss"), ("shes", "sh"), ("ches", "ch"), ("xes", "x")):
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
    "buses": "bus",
    "glasses": "glasses",
    "scissors": "scissors",
    "tomatoes": "tomato",
    "potatoes": "potato",
    "bus": "bus",
    "gas": "gas",
    "canvas": "canvas",
    "lens": "lens",
    **{f"{stem}ves": f"{stem}f" for stem in "bookshel cal dwar el hal hoo lea loa scar shea shel thie wol".split()},
    **{f"{stem}ves": f"{stem}fe" for stem in "housewi kni li penkni wi".split()},
    **{f"{one}s": one for one in "brownie calorie cookie genie hoodie magpie movie necktie smoothie zombie".split()},
}
