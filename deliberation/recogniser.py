"""Reads any text back into stance, concerns, measures, reasons and defects: what the gold rater rates.

Pure and deterministic. A sentence either matches a frame of ``grammar.py`` (with its slot content checked word by
word) or all its words count as unrecognised.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache, lru_cache

from deliberation.grammar import CONNECTORS, OPINION_FRAMES, STATEMENT_FRAMES, Frame
from deliberation.lexicon import is_noun_phrase, load_lexicon
from deliberation.types import Question

MIN_CLAIM_OVERLAP = 0.7
"""Similarity (difflib ratio over words) from which on a clause counts as one of the question's claims."""
FIRST_PERSON = frozenset({"i", "my", "me", "mine", "myself"})


@dataclass(frozen=True)
class Item:
    """One concern, measure or reason in a text.

    Attributes:
        slot: ``concern``, ``measure`` or ``reason``.
        kind: the category (``cost``, ``grants``, ...); ``reason`` for reasons.
        words: the noun phrase's words (a reason's whole clause).
        value: 1 taken up, -1 set aside.
        weight, use: from the frame (see ``grammar.Frame``).
        span: word positions [start, end) in the text.
    """

    slot: str
    kind: str
    words: tuple[str, ...]
    value: float
    weight: float = 1.0
    use: str = "state"
    span: tuple[int, int] = (0, 0)

    @property
    def key(self) -> tuple[str, str, tuple[str, ...]]:
        """What makes two items the same item."""
        return self.slot, self.kind, self.words


@dataclass
class Reading:
    """What a text says about a question.

    Attributes:
        words: all words, lower case; commas, semicolons and colons are words of their own.
        ok: per word: recognised.
        repeated: per word: part of a sentence or item said before, or the same word twice in a row.
        stances: (stance -2..2, span) per stance sentence.
        items: concerns, measures and reasons in order, repeats left out.
        vague: number of filler sentences.
        personal: speaks in one person's voice.
        full_stop: ends with one.
    """

    words: list[str] = field(default_factory=list)
    ok: list[bool] = field(default_factory=list)
    repeated: list[bool] = field(default_factory=list)
    stances: list[tuple[float, tuple[int, int]]] = field(default_factory=list)
    items: list[Item] = field(default_factory=list)
    vague: int = 0
    personal: bool = False
    full_stop: bool = False

    @property
    def stance(self) -> float | None:
        """Mean stance, -2 (firmly against) to 2 (firmly for); None if the text takes none."""
        return sum(s for s, _ in self.stances) / len(self.stances) if self.stances else None

    @property
    def conflicting(self) -> bool:
        """Whether it takes both sides."""
        values = [s for s, _ in self.stances]
        return bool(values) and min(values) < 0 < max(values)


def words_of(text: str) -> list[str]:
    """Lower-case words without punctuation; commas, semicolons and colons stay as words of their own."""
    return re.findall(r"[^\s,.;:!?\"“”()]+|[,;:]", text.lower().replace("’", "'"))


def claim_words(sentence: str) -> tuple[str, ...]:
    """The words of an affirming or negating sentence."""
    return tuple(w for w in words_of(sentence) if w not in ",;:")


@cache
def _phrases(slot: str) -> tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...]:
    lexicon = load_lexicon()
    table = lexicon.concerns if slot == "concern" else lexicon.measures
    found = []
    for kind in sorted(table):
        for text in table[kind]:
            pre, _, post = text.partition("{np}")
            found.append((kind, tuple(pre.split()), tuple(post.split())))
    return tuple(found)


@lru_cache(maxsize=65536)
def read_phrase(slot: str, words: tuple[str, ...]) -> tuple[str, tuple[str, ...], tuple[bool, ...]] | None:
    """A concern or measure phrase as (kind, noun-phrase words, ok per word); None if no paraphrase fits."""
    best = None
    for kind, pre, post in _phrases(slot):
        inner = len(words) - len(pre) - len(post)
        if inner < 1 or words[: len(pre)] != pre or (post and words[-len(post) :] != post):
            continue
        np = words[len(pre) : len(pre) + inner]
        good = is_noun_phrase(np)
        rank = (good, len(pre) + len(post))
        if best is None or rank > best[0]:
            ok = (True,) * len(pre) + (good,) * inner + (True,) * len(post)
            best = (rank, (kind, np, ok))
    return best[1] if best else None


def _read_claim(content: list[str], question: Question) -> tuple[float, list[bool]] | None:
    """(side +1 or -1, ok per word) if ``content`` is one of the question's claims, nearly enough."""
    best: tuple[float, float, list[bool]] | None = None
    for side, sentence in ((1.0, question.affirming), (-1.0, question.negating)):
        claim = list(claim_words(sentence))
        if content == claim:
            return side, [True] * len(content)
        matcher = difflib.SequenceMatcher(None, content, claim, autojunk=False)
        if best is None or matcher.ratio() > best[0]:
            ok = [False] * len(content)
            for block in matcher.get_matching_blocks():
                ok[block.a : block.a + block.size] = [True] * block.size
            best = (matcher.ratio(), side, ok)
    return (best[1], best[2]) if best and best[0] >= MIN_CLAIM_OVERLAP else None


def split_list(content: list[str]) -> list[tuple[int, list[str]]]:
    """Split ``a , b and c`` into (offset, words) parts."""
    parts: list[tuple[int, list[str]]] = [(0, [])]
    for k, word in enumerate(content):
        if word in (",", "and"):
            parts.append((k + 1, []))
        else:
            parts[-1][1].append(word)
    return parts


@dataclass
class _Match:
    frame: Frame
    ok: list[bool]
    stance: float | None = None
    items: list[Item] = field(default_factory=list)


def _match(frame: Frame, words: list[str], question: Question) -> _Match | None:
    """Fit one frame to a sentence's words; None if it does not fit."""
    pre, post = frame.pre, frame.post
    inner = len(words) - len(pre) - len(post)
    if inner < (frame.slot != "none") or tuple(words[: len(pre)]) != pre:
        return None
    if (frame.slot == "none" and inner) or (post and tuple(words[-len(post) :]) != post):
        return None
    content, start = words[len(pre) : len(pre) + inner], len(pre)
    if frame.slot == "none":
        return _Match(frame, [True] * len(words), frame.value)
    if frame.slot == "claim":
        claim = _read_claim(content, question)
        if claim is None:
            return None
        stance = claim[0] * (frame.value or 0.0)
        return _Match(frame, [True] * len(pre) + claim[1] + [True] * len(post), stance)
    if frame.slot == "reason":
        if not pre and not post and not _is_reason(tuple(content)):
            return None  # a bare clause must be one, or any sentence would do
        return _match_reason(frame, content, start, len(post))
    return _match_items(frame, content, start, len(post))


def _match_reason(frame: Frame, content: list[str], start: int, post: int) -> _Match:
    """A reason is well formed if a noun phrase of the lexicon is followed by a predicate of the lexicon.

    Anything else is so many unrecognised words, and no point made.
    """
    good = _is_reason(tuple(content))
    item = Item(
        "reason", "reason", tuple(content), frame.value or 1.0, frame.weight, frame.use, (start, start + len(content))
    )
    return _Match(frame, [True] * start + [good] * len(content) + [True] * post, None, [item] if good else [])


@cache
def _predicates() -> frozenset[tuple[str, ...]]:
    return frozenset(tuple(p.split()) for p in load_lexicon().predicates)


def _is_reason(words: tuple[str, ...]) -> bool:
    return any(words[k:] in _predicates() and is_noun_phrase(words[:k]) for k in range(1, len(words)))


def _match_items(frame: Frame, content: list[str], start: int, post: int) -> _Match | None:
    """A list of concerns or measures; one part that is none makes the frame not fit only if it is the first."""
    ok, items = [True] * start, []
    separators = [w in (",", "and") for w in content]
    ok += separators
    for offset, words in split_list(content):
        phrase = read_phrase(frame.slot, tuple(words))
        if phrase is None:
            if offset == 0:
                return None
            continue
        kind, np, good = phrase
        ok[start + offset : start + offset + len(words)] = list(good)
        span = (start + offset, start + offset + len(words))
        if all(good):  # half a phrase is no point made
            items.append(Item(frame.slot, kind, np, frame.value or 1.0, frame.weight, frame.use, span))
    return _Match(frame, ok + [True] * post, None, items)


@cache
def _frames_by_first_word() -> dict[str, tuple[Frame, ...]]:
    table: dict[str, list[Frame]] = {}
    for frame in STATEMENT_FRAMES + OPINION_FRAMES:
        table.setdefault(frame.pre[0] if frame.pre else "", []).append(frame)
    return {word: tuple(frames) for word, frames in table.items()}


def _read_because(words: list[str], cut: int, frames: tuple[Frame, ...], question: Question) -> _Match | None:
    """A stance sentence that closes with "because" and a reason."""
    heads = [m for m in (_match(f, words[:cut], question) for f in frames if f.slot == "claim") if m]
    if not heads or cut + 1 >= len(words):
        return None
    best = max(heads, key=lambda m: sum(m.ok))
    tail = _match_reason(Frame((), (), "reason", 1.0, best.frame.personal), words[cut + 1 :], cut + 1, 0)
    return _Match(best.frame, [*best.ok, True, *tail.ok[cut + 1 :]], best.stance, tail.items)


def _read_sentence(words: list[str], question: Question) -> tuple[_Match | None, int]:
    """The best frame for a sentence, and how many opening words are a connector."""
    skip = 0
    for connector in CONNECTORS:
        n = len(connector)
        if tuple(words[:n]) == connector and words[n : n + 1] == [","]:
            skip = n + 1
    rest = words[skip:]
    table = _frames_by_first_word()
    frames = table.get(rest[0], ()) + table.get("", ()) if rest else ()
    if "because" in rest:
        with_reason = _read_because(rest, rest.index("because"), frames, question)
        if with_reason:
            return with_reason, skip
    matches = [m for m in (_match(f, rest, question) for f in frames) if m]
    return (max(matches, key=lambda m: sum(m.ok)) if matches else None), skip


def sentences(text: str) -> Iterable[str]:
    """Split at full stops, exclamation and question marks."""
    return [s for s in re.split(r"[.!?]+", text) if s.strip()]


def read(text: str, question: Question) -> Reading:
    """Read ``text`` as a statement or opinion on ``question``. Never fails, whatever the text."""
    reading = Reading(full_stop=text.rstrip()[-1:] in {".", "!", "?"})
    seen_sentences: set[tuple[str, ...]] = set()
    seen_items: set[tuple] = set()
    for sentence in sentences(text):
        words, base = words_of(sentence), len(reading.words)
        if not words:
            continue
        match, skip = _read_sentence(words, question)
        ok = [True] * skip + match.ok if match else [False] * len(words)
        twice = tuple(words[skip:]) in seen_sentences
        seen_sentences.add(tuple(words[skip:]))
        repeated = [twice or (k > 0 and words[k] == words[k - 1]) for k in range(len(words))]
        for item in match.items if match else ():
            start, end = item.span[0] + skip, item.span[1] + skip
            if item.key in seen_items:
                repeated[start:end] = [True] * (end - start)
                continue
            seen_items.add(item.key)
            reading.items.append(
                Item(item.slot, item.kind, item.words, item.value, item.weight, item.use, (base + start, base + end))
            )
        if match and match.stance is not None and not twice:
            reading.stances.append((match.stance, (base + skip, base + len(words))))
        if match and match.frame.slot == "none" and match.frame.value is None:
            reading.vague += 1
        reading.words += words
        reading.ok += ok
        reading.repeated += repeated
    reading.personal = any(w in FIRST_PERSON for w in reading.words)
    return reading
