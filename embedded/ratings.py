"""What the base judge reads: groups, contrasting statements, noise-free ratings and what the simulator knows.

The auxiliary labels (stances, matched items, wording) are the simulator's internals: they stand for what a pretrained
language model brings along. The fit of the preference model afterwards uses ratings alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from random import Random

from transformers import PreTrainedTokenizerFast

from deliberation.citizens import Citizen, Gold, Group, draw_wish, rate
from deliberation.grammar import CONNECTORS, STATEMENT_CONCERN, STATEMENT_MEASURE, STATEMENT_REASON, Frame
from deliberation.lexicon import load_lexicon
from deliberation.prompts import one_line, preference_prefix, preference_suffix
from deliberation.recogniser import Item, Reading, read
from deliberation.types import Question
from deliberation.writer import WRITERS, corrupt, write_statement
from embedded.corpus import LEADS_SHARE, training_group
from embedded.disguise import Disguise, draw_disguise
from embedded.leads import own_leads
from embedded.tokenizer import word_pieces
from embedded.words import rename

MEMBERS = 3
STATEMENTS = 6
SHOWN_ONLY_SHARE = 0.5
"""Share of groups in which only words that the member's own prefix shows are made up. In the others a judge meets
made-up words of other members in good statements; met always, a miscopied word would look no worse than those."""
AUX = ("quality", "member_stance", "statement_stance", "stance_term", "met", "hurt", "form", "voice", "items")
"""What the auxiliary head learns to tell at the last token, each roughly within -1 to 1."""
KINDS = ("", "reason", *sorted(load_lexicon().concerns), *sorted(load_lexicon().measures))
"""Classes of the category label at the last token of a phrase (0: no label)."""
USES = ("", "want", "dislike", "red_line", "condition")
"""Classes of the attitude label at the last token of a phrase in an opinion."""
TAKING_UP = [f for f in STATEMENT_CONCERN + STATEMENT_MEASURE + STATEMENT_REASON if f.value == 1]
WORDING = ("", "right", "wrong", "repeated")


@dataclass
class Row:
    """One member and the statements shown to them, packed into one sequence.

    Attributes:
        prefix: ids of question and opinion.
        suffixes: ids of each statement.
        agreement: noise-free agreement of each statement, as a share of the scale: (a - 1) / 6.
        aux: [statements][len(AUX)].
        kinds, uses, wording, gains: labels per token of prefix + suffixes in order; gain NaN where there is none.
    """

    prefix: list[int]
    suffixes: list[list[int]]
    agreement: list[float]
    aux: list[list[float]]
    kinds: list[int]
    uses: list[int]
    wording: list[int]
    gains: list[float]


def _word_ends(text: str) -> list[int]:
    """Character position behind each word of ``recogniser.words_of(text)``."""
    return [m.end() for m in re.finditer(r"[^\s,.;:!?\"“”()]+|[,;:]", text)]


class Labeller:
    """Turns texts and readings into token ids with labels."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.tokenizer, self.pieces = tokenizer, word_pieces(tokenizer)

    def encode(self, text: str, start: int) -> tuple[list[int], list[int | None]]:
        """Ids of ``text`` and, per token, the index of the word of ``text[start:]`` that it ends (or None)."""
        coded = self.tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        word_at = {start + end: k for k, end in enumerate(_word_ends(text[start:]))}
        return coded.input_ids, [word_at.get(end) for _, end in coded.offset_mapping]


def _phrase_labels(items: list[Item], words: list[int | None]) -> tuple[list[int], list[int]]:
    """Category and attitude per token, at the last token of each phrase."""
    ends = {item.span[1] - 1: item for item in items}
    kinds, uses = [0] * len(words), [0] * len(words)
    for t, word in enumerate(words):
        item = ends.get(word) if word is not None else None
        if item is not None:
            kinds[t] = KINDS.index(item.kind)
            attitude = item.use if item.use != "state" else ("want" if item.value > 0 else "dislike")
            uses[t] = USES.index(attitude)
    return kinds, uses


def _aux(citizen: Citizen, reading: Reading, gold: Gold) -> list[float]:
    stance = reading.stance if reading.stance is not None else 0.0
    p = gold.parts
    return [
        (gold.quality - 4) / 3,
        citizen.stance / 2,
        stance / 2,
        p["stance"],
        p["met"] / 2,
        p["hurt"] / 2,
        min(p["form"], 4.0) / 4,
        p["voice"],
        min(len(reading.items), 6) / 6,
    ]


def _suffix_labels(reading: Reading, gold: Gold, words: list[int | None]) -> tuple[list[int], list[float]]:
    """Wording class and item gain per token of a statement."""
    wording, gains = [0] * len(words), [float("nan")] * len(words)
    ends = {item.span[1] - 1: gain for item, gain in zip(reading.items, gold.item_gains, strict=True)}
    for t, word in enumerate(words):
        if word is None or word >= len(reading.ok):
            continue
        wording[t] = 3 if reading.repeated[word] else (1 if reading.ok[word] else 2)
        gains[t] = ends.get(word, float("nan"))
    return wording, gains


def make_row(
    labeller: Labeller,
    question: Question,
    citizen: Citizen,
    statements: list[tuple[str, Reading]],
    disguise: Disguise,
    opinion: str | None = None,
) -> Row:
    """One member's packed row, disguised after all is read and rated.

    ``opinion`` is shown (but for its made-up words) in place of the citizen's own, in other words but of the same
    content. A text whose phrases are not the citizens' has no labels at its words.
    """
    own_text = disguise.rephrase(citizen.opinion)
    prefix_text = preference_prefix(disguise.show(question.text), rename(opinion or own_text, disguise.words))
    start = prefix_text.index("\nOpinion: ") + len("\nOpinion: ")
    ids, ends = labeller.encode(prefix_text, start)
    own = read(citizen.opinion, question)
    labelled = own.items if citizen.opinion == (opinion or own_text) else []  # words that stand elsewhere
    kinds, uses = _phrase_labels(labelled, ends)
    row = Row(ids, [], [], [], kinds, uses, [0] * len(ids), [float("nan")] * len(ids))
    for text, reading in statements:
        gold = rate(citizen, reading)
        shown = disguise.rephrase(text)
        suffix, ends = labeller.encode(preference_suffix(rename(shown, disguise.words)), 1)
        if shown != text:
            ends = [None] * len(ends)
        kinds, _ = _phrase_labels(reading.items, ends)
        wording, gains = _suffix_labels(reading, gold, ends)
        row.suffixes.append(suffix)
        row.agreement.append((gold.agreement - 1) / 6)
        row.aux.append(_aux(citizen, reading, gold))
        row.kinds += kinds
        row.uses += [0] * len(suffix)
        row.wording += wording
        row.gains += gains
    return row


def edit(text: str, group: Group, rng: Random) -> str:
    """A minimal edit that changes what a statement means: other people, another concern, the other side."""
    question = group.question
    items = [i for i in read(text, question).items if i.slot != "reason"]
    if not items or rng.random() < 0.3:
        yes, no = question.affirming[1:-1], question.negating[1:-1]
        return text.replace(no, yes) if no in text else text.replace(yes, no)
    item = rng.choice(items)
    words = " ".join(item.words)
    if rng.random() < 0.6:
        others = [w for c in group.citizens for w in (*c.wants, *c.dislikes, *c.red_lines) if w.slot != "reason"]
        new = rng.choice(others).words if others and rng.random() < 0.5 else draw_wish(rng, False, "cm").words
        return text.replace(words, " ".join(new))
    table = load_lexicon().concerns if item.slot == "concern" else load_lexicon().measures
    for phrase in table[item.kind]:
        old = phrase.format(np=words)
        if old in text:
            return text.replace(old, rng.choice(table[rng.choice(sorted(table))]).format(np=words))
    return text


def say_again(text: str, rng: Random) -> str:
    """``text`` with a point it takes up said once more in another frame, as a language model does; or unchanged."""
    sentences = text.rstrip(".").split(". ")
    for k in rng.sample(range(len(sentences)), len(sentences)):
        if found := _point(sentences[k]):
            frame, content = found
            other = rng.choice([f for f in TAKING_UP if f.slot == frame.slot and f is not frame])
            sentences.insert(rng.randint(k + 1, len(sentences)), other.fill(content).rstrip("."))
            return ". ".join(sentences) + "."
    return text


def _point(sentence: str) -> tuple[Frame, str] | None:
    """The frame of a sentence that takes something up, and what it takes up."""
    opening, _, rest = sentence.partition(", ")
    said = rest if tuple(opening.lower().split()) in CONNECTORS else f"{sentence[:1].lower()}{sentence[1:]}"
    for frame in TAKING_UP:
        pattern = " ".join((*map(re.escape, frame.pre), "(.+)", *map(re.escape, frame.post)))
        if found := re.fullmatch(pattern, said):
            return frame, found.group(1)
    return None


def contrasts(group: Group, other: Group, samples: list[str], disguise: Disguise, rng: Random) -> list[str]:
    """Six statements for one group: written, sampled from a policy, edited, corrupted, off topic."""
    texts = rng.sample(samples, min(3, len(samples)))
    texts += [write_statement(group, rng) for _ in range(2 - len(texts))]
    texts.append(write_statement(group, rng, "balanced"))
    if len(texts) < 4:
        texts.append(write_statement(group, rng, rng.choice(sorted(WRITERS))))
    base = rng.choice(texts)
    texts.append(edit(base, group, rng))
    if rng.random() < 0.25:
        off = write_statement(other, rng, "balanced")
        texts.append(off if rng.random() < 0.5 else rng.choice(other.citizens).opinion)
    else:
        spoil = say_again if rng.random() < 0.3 else corrupt
        spoilt = spoil(disguise.rephrase(rng.choice(texts)), rng)
        texts.append(disguise.phrases_back(spoilt))
    return [one_line(t) or "." for t in texts]


Pool = list[tuple[Group, list[str], Disguise]]
"""Groups with statements sampled from a policy, as the gold rater reads them, and the disguise the policy saw."""


def rows(labeller: Labeller, rng: Random, pool: Pool) -> list[Row]:
    """The rows of one group: a fresh one, or one of ``pool``."""
    if pool and rng.random() < 0.6:
        group, samples, disguise = rng.choice(pool)
    else:
        group, samples = training_group(rng), []
        disguise = draw_disguise(group, rng, labeller.pieces)
    texts = contrasts(group, training_group(rng), [t for t in samples if t], disguise, rng)
    statements = [(t, read(t, group.question)) for t in texts]
    members = rng.sample(group.citizens, MEMBERS)
    opinions = [disguise.rephrase(c.opinion) for c in members]
    if rng.random() < LEADS_SHARE:
        opinions = own_leads(opinions, rng, labeller.pieces)
    shown_only = rng.random() < SHOWN_ONLY_SHARE
    return [
        make_row(
            labeller,
            group.question,
            c,
            statements,
            replace(disguise, words=_shown(disguise.words, group, opinion)) if shown_only else disguise,
            opinion,
        )
        for c, opinion in zip(members, opinions, strict=True)
    ]


def _shown(words: dict[str, str], group: Group, opinion: str) -> dict[str, str]:
    """The entries of ``words`` whose known word stands in the question or the opinion."""
    present = re.findall(r"[a-z]+", f"{group.question.text} {opinion}".lower())
    return {old: new for old, new in words.items() if old in present}
