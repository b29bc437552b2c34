"""Simulated citizens: members whose true preferences are known, who write opinions and rate any text.

They are the *gold rater*. Always simulated, never evidence about people. Every rule and constant below is fixed and
explained in ``docs/citizens.md``; results are also reported without the one-person's-voice penalty.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from random import Random

from deliberation.grammar import (
    OPINION_CONCERN,
    OPINION_MEASURE,
    OPINION_REASON,
    OPINION_SHORT,
    OPINION_STANCE,
    Frame,
)
from deliberation.lexicon import load_lexicon
from deliberation.recogniser import Item, Reading, read
from deliberation.types import Deliberation, Question

RATING_NOISE = 0.7
"""Standard deviation of the noise on a 1 to 7 rating, before rounding."""
ATTENTION = 4
"""Items a reader takes in fully; of k > 4 items each counts 4 / k."""
LONG_WORDS = 60
"""Words beyond this cost ``0.05`` each (at most 2.5) on the logistic scale."""
VOICE_PENALTY = 1.4
"""Logistic cost of a text in one person's voice (first person singular, or copied from the rater's own opinion)."""
COPY_OVERLAP = 0.6
"""Share of a text's word triples that stand in the rater's own opinion from which on it counts as copied."""


@dataclass(frozen=True)
class Wish:
    """An item a citizen holds a view on, with the words they use for it.

    Attributes:
        slot, kind, words: as in ``recogniser.Item``.
        text: the phrase as this citizen writes it.
        weight: how much it matters (1 main, 0.6 also).
    """

    slot: str
    kind: str
    words: tuple[str, ...]
    text: str
    weight: float = 1.0


@dataclass(frozen=True)
class Citizen:
    """A simulated member.

    Attributes:
        stance: -2 (firmly against the affirming statement) to 2 (firmly for).
        wants: concerns, measures and reasons they want taken up.
        dislikes: concerns they want set aside.
        red_lines: measures they would never accept.
        condition: a measure that halves the distance to the other side, or None.
        uncompromising: distance to their stance hurts half as much again.
        opinion: what they wrote.
    """

    stance: int
    wants: tuple[Wish, ...]
    dislikes: tuple[Wish, ...]
    red_lines: tuple[Wish, ...]
    condition: Wish | None
    uncompromising: bool
    opinion: str = ""


@dataclass(frozen=True)
class Gold:
    """A noise-free rating with what it is made of.

    Attributes:
        agreement, quality: in (1, 7).
        agreement_without_voice, quality_without_voice: the same without the one-person's-voice penalty.
        parts: the terms on the logistic scale (``stance``, ``met``, ``hurt``, ``form``, ``voice``).
        item_gains: per item of the reading, its signed contribution to agreement on the logistic scale.
    """

    agreement: float
    quality: float
    agreement_without_voice: float
    quality_without_voice: float
    parts: dict[str, float]
    item_gains: tuple[float, ...]


@dataclass(frozen=True)
class Group:
    """A question with its citizens."""

    question: Question
    citizens: tuple[Citizen, ...]

    def deliberation(self, name: str) -> Deliberation:
        """What the models may see of it."""
        opinions = tuple(c.opinion for c in self.citizens)
        return Deliberation(name, self.question.text, opinions, self.question.topic)


# ---------------------------------------------------------------- how citizens rate


def likert(z: float) -> float:
    """Logistic map to the rating scale: 1 + 6 / (1 + exp(-z)), in (1, 7)."""
    return 1.0 + 6.0 / (1.0 + math.exp(-z))


def overlap(a: tuple[str, ...], b: tuple[str, ...]) -> float:
    """Jaccard overlap of two word sets, in [0, 1]."""
    left, right = set(a), set(b)
    return len(left & right) / len(left | right) if left | right else 0.0


def match(item: Item, wish: Wish) -> float:
    """How far a text's item is the one a citizen has in mind, in [0, 1].

    Same kind: 0.4 plus 0.6 times the overlap of the noun phrases. Another kind about the same people (overlap at
    least one half): a quarter of the overlap. Reasons: the overlap itself, from 0.4 on.
    """
    common = overlap(item.words, wish.words)
    if item.slot == "reason" or wish.slot == "reason":
        return common if item.slot == wish.slot and common >= 0.4 else 0.0
    if (item.slot, item.kind) == (wish.slot, wish.kind):
        return 0.4 + 0.6 * common
    return 0.25 * common if common >= 0.5 else 0.0


def _stance_term(citizen: Citizen, reading: Reading, condition_met: float) -> float:
    stance = reading.stance
    distance = abs(citizen.stance - (stance or 0.0))
    if stance is not None and stance * citizen.stance < 0:
        distance *= 1.0 - 0.5 * condition_met
    term = 1.0 - distance / 2.0
    if term < 0 and citizen.uncompromising:
        term *= 1.5
    return term - (0.3 if stance is None else 0.0)


def _wish_gain(wish: Wish, item: Item, up: float, down: float) -> float:
    m = match(item, wish)
    return m * (up if item.value > 0 else down) * wish.weight


def _item_gain(citizen: Citizen, item: Item) -> tuple[float, float]:
    """(gain, hurt) of one item for one citizen on the logistic scale, before attention is shared out."""
    gains = [_wish_gain(w, item, 1.3, -1.5) for w in citizen.wants]
    gains += [_wish_gain(w, item, -0.9, 0.5) for w in citizen.dislikes]
    for wish in citizen.red_lines:
        m = match(item, wish)
        gains.append(-3.0 * m * m if item.value > 0 else 0.7 * m)
    if citizen.condition is not None:
        gains.append(_wish_gain(citizen.condition, item, 0.5, -0.5))
    return max([0.0, *gains]), min([0.0, *gains])


def form_penalty(reading: Reading) -> float:
    """How badly a text is put together, on the logistic scale (0 = nothing wrong)."""
    n = len(reading.words)
    if n == 0:
        return 6.0
    wrong = sum(not ok for ok in reading.ok) / n
    repeated = sum(reading.repeated) / n
    penalty = 5.0 * wrong + 3.0 * repeated
    penalty += min(2.5, 0.05 * max(0, n - LONG_WORDS))
    penalty += 0.35 * max(0, len(reading.items) - ATTENTION - 1)
    penalty += 0.25 * reading.vague
    penalty += 0.4 * (not reading.full_stop) + 0.8 * reading.conflicting + 1.5 * (n < 5)
    return penalty + 0.5 * (not reading.items)


def is_copy(words: list[str], opinion: str) -> bool:
    """Whether a text is mostly the opinion's own word triples."""
    own = opinion.lower().replace(",", " ").replace(".", " ").split()
    triples = {tuple(own[k : k + 3]) for k in range(len(own) - 2)}
    said = [w for w in words if w not in ",;:"]
    spoken = [tuple(said[k : k + 3]) for k in range(len(said) - 2)]
    return bool(spoken) and sum(t in triples for t in spoken) >= COPY_OVERLAP * len(spoken)


def quality_score(reading: Reading, form: float, voice: float) -> float:
    """Quality on the logistic scale: well formed, takes a stance soberly, names two to five concrete points."""
    points = (-1.4, -0.3, 0.6, 1.2, 1.4, 1.2)[min(len(reading.items), 5)]
    stance = 0.5 if reading.stance is not None else -0.2
    blunt = 0.4 if reading.stance is not None and abs(reading.stance) > 1.5 else 0.0
    return points + stance - blunt - form - voice


def rate(citizen: Citizen, reading: Reading) -> Gold:
    """The noise-free rating of a text that ``recogniser.read`` has read."""
    met = [match(i, citizen.condition) for i in reading.items if i.value > 0] if citizen.condition else []
    stance = _stance_term(citizen, reading, max(met, default=0.0))
    share = min(1.0, ATTENTION / max(1, len(reading.items)))
    pairs = [_item_gain(citizen, item) for item in reading.items]
    gain = share * sum(up for up, _ in pairs)
    hurt = sum(down for _, down in pairs)  # what offends is noticed however long the list
    form = form_penalty(reading)
    voice = VOICE_PENALTY if reading.personal or is_copy(reading.words, citizen.opinion) else 0.0
    z = -0.9 + stance + gain + hurt - form
    parts = {"stance": stance, "met": gain, "hurt": hurt, "form": form, "voice": voice}
    gains = tuple(share * up + down for up, down in pairs)
    quality, free = (likert(quality_score(reading, form, penalty)) for penalty in (voice, 0.0))
    return Gold(likert(z - voice), quality, likert(z), free, parts, gains)


def rate_text(citizen: Citizen, question: Question, text: str) -> Gold:
    """The noise-free rating of any text."""
    return rate(citizen, read(text, question))


def noisy_rating(value: float, rng: Random) -> int:
    """A rating as a person gives it: noise of sd ``RATING_NOISE``, rounded, on the scale."""
    return max(1, min(7, round(value + rng.gauss(0.0, RATING_NOISE))))


# ---------------------------------------------------------------- how citizens come about


SLOTS = "ccccmmr"
"""What items are drawn from: concerns, measures and reasons, by their first letters."""


def draw_wish(rng: Random, held_out: bool, slots: str = SLOTS) -> Wish:
    """A new item to hold a view on: c concern, m measure, r reason."""
    lexicon, slot = load_lexicon(), rng.choice(slots)
    if slot == "r":
        text = lexicon.reason(rng, held_out)
        return Wish("reason", "reason", tuple(text.split()), text)
    table = lexicon.concerns if slot == "c" else lexicon.measures
    kind, np = rng.choice(sorted(table)), lexicon.noun_phrase(rng, held_out)
    return Wish("concern" if slot == "c" else "measure", kind, tuple(np.split()), rng.choice(table[kind]).format(np=np))


def in_own_words(wish: Wish, rng: Random, same: float = 0.6) -> Wish:
    """The same item in a paraphrase (with probability ``1 - same``)."""
    if wish.slot == "reason" or rng.random() < same:
        return wish
    lexicon = load_lexicon()
    table = lexicon.concerns if wish.slot == "concern" else lexicon.measures
    return replace(wish, text=rng.choice(table[wish.kind]).format(np=" ".join(wish.words)))


def clause(sentence: str) -> str:
    """A sentence as a clause: first letter lower (unless an acronym), no full stop."""
    text = sentence.strip().rstrip(".")
    return text if text[1:2].isupper() or text.startswith("I ") else text[0].lower() + text[1:]


def side_text(question: Question, stance: float) -> str:
    """The question's clause on the side of ``stance``."""
    return clause(question.affirming if stance >= 0 else question.negating)


def _stance_sentence(question: Question, stance: int, reason: Wish | None, rng: Random, terse: bool) -> str:
    if (terse or rng.random() < 0.25) and reason is None:
        return rng.choice([f for f in OPINION_SHORT if f.value == stance]).fill()
    frame = rng.choice([f for f in OPINION_STANCE if f.value == abs(stance)])
    because = f" because {reason.text}" if reason else ""
    return frame.fill(side_text(question, stance) + because)


def _wish_sentence(wish: Wish, value: float, use: str, rng: Random) -> str:
    frames: list[Frame] = {"concern": OPINION_CONCERN, "measure": OPINION_MEASURE, "reason": OPINION_REASON}[wish.slot]
    fitting = [f for f in frames if f.value == value and f.use == use]
    by_weight = [f for f in fitting if f.weight == wish.weight] or fitting
    return rng.choice(by_weight).fill(wish.text)


def write_opinion(citizen: Citizen, question: Question, rng: Random, terse: bool = False) -> str:
    """The citizen's opinion: stance (perhaps with a reason), concerns in own words, a condition, a red line.

    A ``terse`` citizen takes a side without saying again what the question is.
    """
    wants = list(citizen.wants)
    reasons = [w for w in wants if w.slot == "reason"]
    because = reasons[0] if reasons and citizen.stance and not terse and rng.random() < 0.5 else None
    parts = [_wish_sentence(w, 1, "state", rng) for w in wants if w is not because]
    parts += [_wish_sentence(w, -1, "state", rng) for w in citizen.dislikes]
    parts += [_wish_sentence(w, -1, "red_line", rng) for w in citizen.red_lines]
    if citizen.condition:
        parts.append(_wish_sentence(citizen.condition, 1, "condition", rng))
    rng.shuffle(parts)
    stance = _stance_sentence(question, citizen.stance, because, rng, terse)
    return " ".join([stance, *parts] if rng.random() < 0.8 else [*parts, stance])


def _draw_citizen(
    question: Question, pool: list[Wish], lean: float, rng: Random, held_out: bool, terse: bool
) -> Citizen:
    side = 1 if rng.random() < lean else -1
    stance = rng.choices((0, side, 2 * side), (0.12, 0.53, 0.35))[0]
    wanted = rng.sample(pool, rng.choice((1, 1, 2)))
    wants = tuple(replace(in_own_words(w, rng), weight=1.0 if k == 0 else 0.6) for k, w in enumerate(wanted))
    wants = tuple(replace(w, weight=1.0) if w.slot != "concern" else w for w in wants)
    others = [w for w in pool if w not in wanted]
    dislikes: tuple[Wish, ...] = ()
    red_lines: tuple[Wish, ...] = ()
    condition: Wish | None = None
    extra = rng.random()
    if extra < 0.18:
        concerns = [w for w in others if w.slot == "concern"]
        chosen = rng.choice(concerns) if concerns and rng.random() < 0.7 else draw_wish(rng, held_out, "c")
        dislikes = (in_own_words(chosen, rng),)
    elif extra < 0.36:
        measures = [w for w in others if w.slot == "measure"]
        chosen = rng.choice(measures) if measures and rng.random() < 0.7 else draw_wish(rng, held_out, "m")
        red_lines = (in_own_words(chosen, rng),)
    elif extra < 0.48 and stance:
        condition = draw_wish(rng, held_out, "m")
    citizen = Citizen(stance, wants, dislikes, red_lines, condition, rng.random() < 0.2)
    return replace(citizen, opinion=write_opinion(citizen, question, rng, terse))


def draw_group(
    question: Question, rng: Random, held_out: bool = False, size: int | None = None, slots: str = SLOTS
) -> Group:
    """A group of 3 to 5 citizens who share some concerns and disagree on others.

    Args:
        question: what they talk about.
        rng: all randomness; the same state gives the same group in every process.
        held_out: whether words and phrases that no training world uses may appear.
        size: number of members, if not drawn.
        slots: what their shared items are drawn from.
    """
    pool = [draw_wish(rng, held_out, slots) for _ in range(rng.choice((4, 5, 6)))]
    lean = rng.choice((0.15, 0.3, 0.5, 0.7, 0.85))
    n = size or rng.choices((3, 4, 5), (0.4, 0.4, 0.2))[0]
    terse = rng.random() < 0.2
    return Group(question, tuple(_draw_citizen(question, pool, lean, rng, held_out, terse) for _ in range(n)))
