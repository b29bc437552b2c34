"""The mixed-quality writer whose statements the base writer has read, and corruptions a judge must see through.

Most of what it writes is mediocre: parroting one member, vague, one-sided, on the wrong side, over-long lists.
"""

from __future__ import annotations

from random import Random

from deliberation.citizens import Citizen, Group, Wish, draw_wish, in_own_words, side_text
from deliberation.grammar import (
    CONNECTORS,
    STATEMENT_CONCERN,
    STATEMENT_MEASURE,
    STATEMENT_REASON,
    STATEMENT_STANCE,
    STATEMENT_VAGUE,
)

FRAMES = {"concern": STATEMENT_CONCERN, "measure": STATEMENT_MEASURE, "reason": STATEMENT_REASON}
MIX = {
    "balanced": 0.12,
    "one_sided": 0.24,
    "vague": 0.22,
    "parrot": 0.16,
    "wrong_side": 0.10,
    "list": 0.07,
    "careless": 0.09,
}
"""How often the mixed-quality writer writes which kind of statement."""


def stance_sentence(group: Group, stance: float, rng: Random) -> str:
    """A group-voice sentence that takes ``stance`` (-2..2; 0 is undecided)."""
    frame = rng.choice([f for f in STATEMENT_STANCE if f.value == abs(stance)])
    return frame.fill(side_text(group.question, stance))


def item_sentences(wishes: list[Wish], rng: Random, value: int = 1) -> list[str]:
    """Sentences that take up (1) or set aside (-1) the wishes; up to two of a kind share a sentence."""
    queues = {slot: [in_own_words(w, rng, 0.75) for w in wishes if w.slot == slot] for slot in FRAMES}
    said = []
    for slot, queue in queues.items():
        while queue:
            take = 1 if slot == "reason" or rng.random() < 0.5 else 2
            texts = [w.text for w in queue[:take]]
            del queue[:take]
            frame = rng.choice([f for f in FRAMES[slot] if f.value == value])
            said.append(frame.fill(" and ".join(texts)))
    rng.shuffle(said)
    return said


def connect(sentences: list[str], rng: Random) -> str:
    """Join sentences, some opened by a connector."""
    joined = sentences[:1]
    for sentence in sentences[1:]:
        if rng.random() < 0.25:
            opening = " ".join(rng.choice(CONNECTORS))
            sentence = f"{opening[0].upper()}{opening[1:]}, {sentence[0].lower()}{sentence[1:]}"
        joined.append(sentence)
    return " ".join(joined)


def _wishes(citizens: tuple[Citizen, ...], rng: Random, at_most: int) -> list[Wish]:
    """One wish of each member in turn until ``at_most``, each item once."""
    queues = [rng.sample(c.wants, len(c.wants)) for c in citizens]
    rng.shuffle(queues)
    chosen: list[Wish] = []
    for turn in range(2):
        for queue in queues:
            if turn < len(queue) and len(chosen) < at_most:
                wish = queue[turn]
                if all((w.slot, w.kind, w.words) != (wish.slot, wish.kind, wish.words) for w in chosen):
                    chosen.append(wish)
    return chosen


def _side(group: Group) -> int:
    return 1 if sum(c.stance for c in group.citizens) >= 0 else -1


def balanced(group: Group, rng: Random) -> str:
    """The middle of the group's stances and a point of each of several members."""
    middle = sum(c.stance for c in group.citizens) / len(group.citizens)
    stance = 0 if abs(middle) < 0.4 else (1 if middle > 0 else -1)
    if rng.random() < 0.2:
        stance = _side(group)
    sentences = item_sentences(_wishes(group.citizens, rng, rng.choice((2, 3, 3))), rng)
    return connect([stance_sentence(group, stance, rng), *sentences], rng)


def one_sided(group: Group, rng: Random) -> str:
    """One member's stance and points, in the group's voice."""
    citizen = rng.choice(group.citizens)
    wishes = list(citizen.wants)[: rng.choice((1, 1, 2))]
    stance = stance_sentence(group, rng.choice((citizen.stance, 2 if citizen.stance >= 0 else -2)), rng)
    return connect([stance, *item_sentences(wishes, rng)], rng)


def vague(group: Group, rng: Random) -> str:
    """Fillers, perhaps with a stance."""
    sentences = [f.fill() for f in rng.sample(STATEMENT_VAGUE, rng.choice((1, 1, 2)))]
    if rng.random() < 0.6:
        sentences.insert(0, stance_sentence(group, rng.choice((0, 1, -1)), rng))
    if rng.random() < 0.3:
        sentences += item_sentences(_wishes(group.citizens, rng, 1), rng)
    return connect(sentences, rng)


def parrot(group: Group, rng: Random) -> str:
    """A member's opinion, word for word or without its last sentence."""
    opinion = rng.choice(group.citizens).opinion
    parts = opinion.split(". ")
    return opinion if len(parts) < 3 or rng.random() < 0.7 else ". ".join(parts[:-1]) + "."


def wrong_side(group: Group, rng: Random) -> str:
    """Against most of the group, with a point or two."""
    sentences = item_sentences(_wishes(group.citizens, rng, rng.choice((1, 2))), rng)
    return connect([stance_sentence(group, -_side(group) * rng.choice((1, 2)), rng), *sentences], rng)


def listing(group: Group, rng: Random) -> str:
    """Everything anybody said, and more."""
    wishes = _wishes(group.citizens, rng, 8)
    wishes += [draw_wish(rng, False, "cm") for _ in range(max(0, rng.choice((5, 6, 7)) - len(wishes)))]
    return connect([stance_sentence(group, _side(group), rng), *item_sentences(wishes, rng)], rng)


def careless(group: Group, rng: Random) -> str:
    """Sets members' points aside, or proposes what a member would never accept."""
    rejected = [w for c in group.citizens for w in c.red_lines]
    disliked = [w for c in group.citizens for w in c.dislikes]
    sentences = item_sentences(rng.sample(rejected, 1), rng) if rejected and rng.random() < 0.6 else []
    if disliked and rng.random() < 0.6:
        sentences += item_sentences(rng.sample(disliked, 1), rng, rng.choice((1, -1)))
    if not sentences or rng.random() < 0.5:
        sentences += item_sentences(_wishes(group.citizens, rng, 1), rng, rng.choice((1, -1)))
    return connect([stance_sentence(group, rng.choice((1, -1, 0)), rng), *sentences], rng)


WRITERS = {
    "balanced": balanced,
    "one_sided": one_sided,
    "vague": vague,
    "parrot": parrot,
    "wrong_side": wrong_side,
    "list": listing,
    "careless": careless,
}


def write_statement(group: Group, rng: Random, kind: str | None = None) -> str:
    """A statement of the given kind, or of a kind drawn from ``MIX``."""
    return WRITERS[kind or rng.choices(list(MIX), list(MIX.values()))[0]](group, rng)


def corrupt(text: str, rng: Random) -> str:
    """Spoil a text the way a language model might: repeats, swaps, lost or foreign words, cut ends, run-ons."""
    words = text.split()
    kinds = "repeat_word repeat_sentence swap drop cut shuffle echo mash splice foreign"
    kind = rng.choice(kinds.split())
    k = rng.randrange(len(words))
    if kind == "repeat_word":
        words[k:k] = words[k : k + rng.choice((1, 2, 3))] * rng.choice((1, 1, 3))
    elif kind == "repeat_sentence":
        return f"{text} {rng.choice([s for s in text.split('. ') if s]).rstrip('.')}."
    elif kind == "swap":
        for _ in range(rng.choice((1, 2, 4))):
            j = rng.randrange(len(words))
            words[k], words[j] = words[j], words[k]
    elif kind == "drop":
        del words[k : k + rng.choice((1, 2, 3))]
    elif kind == "cut":
        words = words[: max(1, k)]
    elif kind == "shuffle":
        rng.shuffle(words)
    elif kind == "echo" and " and " in text:
        first = text.split(" and ")[0].split(" ")[-3:]
        return text.replace(" and ", f" and {' '.join(first).lower()} and ", 1)
    elif kind == "mash":
        letters = "abcdefghijklmnopqrstuvwxyz"
        for _ in range(rng.choice((1, 3, 8))):
            words[rng.randrange(len(words))] = "".join(rng.choices(letters, k=rng.randint(2, 9)))
    elif kind == "splice":
        for _ in range(rng.choice((1, 1, 2, 3))):
            j, k = rng.randrange(len(words)), rng.randrange(len(words))
            words[k] = words[j][: rng.randint(1, 5)] + words[k][-rng.randint(1, 5) :].lower()
    else:
        other = draw_wish(rng, False).text.split()
        words[k : k + 2] = rng.sample(other, min(2, len(other)))
    return " ".join(words)
