"""The nouns of the house. Plain frozen dataclasses that check themselves."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

MAX_MEMBERS = 1000
"""Members of one deliberation (serving and training share the limit)."""

MAX_OPINION_CHARS = 2000
"""Characters one opinion (or question) may have: about 200 words, the paper's upper limit, with room to spare."""

RATING_SCALE = (1, 2, 3, 4, 5, 6, 7)
"""Agreement and quality are integers on this scale; 4 is neutral."""


class InputError(ValueError):
    """Bad input, said so that it can be mended: the field, the value and the mend.

    Attributes:
        field: dotted name of the field, e.g. ``opinions[2]``.
        value: the offending value (shortened in the middle when shown).
        mend: what to do about it.
    """

    def __init__(self, field: str, value: object, mend: str):
        self.field, self.value, self.mend = field, value, mend
        shown = repr(value)
        shown = shown if len(shown) <= 80 else f"{shown[:37]} ... {shown[-38:]}"  # a path's end says most
        super().__init__(f"{field} = {shown}: {mend}")

    def __reduce__(self) -> tuple:
        """Survive pickling, so that a Ray actor's error arrives whole."""
        return type(self), (self.field, self.value, self.mend)


def check_text(field: str, value: object, *, limit: int = MAX_OPINION_CHARS) -> str:
    """Return ``value`` if it is a non-blank string of at most ``limit`` characters.

    Raises:
        InputError: naming ``field``.
    """
    if not isinstance(value, str):
        raise InputError(field, value, "must be a string")
    if not value.strip():
        raise InputError(field, value, "is empty; write at least one word")
    if len(value) > limit:
        raise InputError(field, value, f"has {len(value)} characters; shorten it to at most {limit}")
    return value


_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_LOCAL_FOLDERS = ("runs", "embedded")
_FILE_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".safetensors", ".bin", ".pt")


def is_hub_name(name: str) -> bool:
    """Whether a name that is no file or folder here may be one of the hub: ``model`` or ``owner/model``.

    What looks like a path is not asked for there: a file name, or a name below a folder that exists (or below
    ``runs`` and ``embedded``, where ours would be).
    """
    owner, slash, _ = name.partition("/")
    local = bool(slash) and (owner in _LOCAL_FOLDERS or Path(owner).is_dir())
    return _HUB_NAME.fullmatch(name) is not None and not local and not name.endswith(_FILE_SUFFIXES)


@dataclass(frozen=True)
class Question:
    """A yes/no debate question with a statement of either side.

    Attributes:
        id: unique id.
        text: the question, e.g. ``Should school meals be free?``.
        affirming: the yes side as a full sentence.
        negating: the no side as a full sentence.
        topic: topic slug; splits never cut through a topic.
    """

    id: str
    text: str
    affirming: str
    negating: str
    topic: str


@dataclass(frozen=True)
class Deliberation:
    """A question with the opinions of a group's members.

    Attributes:
        id: unique id.
        question: the question's text.
        opinions: one text a member, in the members' order; 1 to ``MAX_MEMBERS``.
        topic: topic slug, for splits; may be empty.

    Raises:
        InputError: on an empty group, or an empty or over-long text.
    """

    id: str
    question: str
    opinions: tuple[str, ...]
    topic: str = ""

    def __post_init__(self) -> None:
        check_text("question", self.question)
        if not self.opinions:
            raise InputError("opinions", self.opinions, "the group is empty; give at least one opinion")
        if len(self.opinions) > MAX_MEMBERS:
            raise InputError("opinions", f"{len(self.opinions)} opinions", f"give at most {MAX_MEMBERS}")
        for i, opinion in enumerate(self.opinions):
            check_text(f"opinions[{i}]", opinion)


@dataclass(frozen=True)
class Rating:
    """One member's rating of one statement.

    Attributes:
        deliberation_id: the deliberation it belongs to.
        member: the member's index in it.
        question, opinion, statement: the texts a preference model reads.
        agreement, quality: integers 1 to 7.
        topic: topic slug, for splits.

    Raises:
        InputError: on a rating off the scale or an empty text.
    """

    deliberation_id: str
    member: int
    question: str
    opinion: str
    statement: str
    agreement: int
    quality: int
    topic: str = ""

    def __post_init__(self) -> None:
        for name in ("question", "opinion", "statement"):
            check_text(name, getattr(self, name))
        for name in ("agreement", "quality"):
            if isinstance(getattr(self, name), bool) or getattr(self, name) not in RATING_SCALE:
                raise InputError(name, getattr(self, name), "must be an integer from 1 to 7")


@dataclass(frozen=True)
class Vote:
    """One member's vote on one statement: 1 agree, -1 disagree, 0 pass (as in Polis exports).

    Attributes: as of ``Rating``, with ``vote`` in place of ``agreement`` and ``quality``.

    Raises:
        InputError: on any other vote or an empty text.
    """

    deliberation_id: str
    member: int
    question: str
    opinion: str
    statement: str
    vote: int
    topic: str = ""

    def __post_init__(self) -> None:
        for name in ("question", "opinion", "statement"):
            check_text(name, getattr(self, name))
        if isinstance(self.vote, bool) or self.vote not in (-1, 0, 1):
            raise InputError("vote", self.vote, "must be 1 (agree), -1 (disagree) or 0 (pass)")


@dataclass(frozen=True)
class SoftVote:
    """How likely one member is to agree with one statement, as a teacher says: for distillation (Hinton et al. 2015).

    Attributes: as of ``Rating``, with ``p_agree`` in place of ``agreement`` and ``quality``.

    Raises:
        InputError: on anything but a number from 0 to 1, or an empty text.
    """

    deliberation_id: str
    member: int
    question: str
    opinion: str
    statement: str
    p_agree: float
    topic: str = ""

    def __post_init__(self) -> None:
        for name in ("question", "opinion", "statement"):
            check_text(name, getattr(self, name))
        if isinstance(self.p_agree, bool) or not isinstance(self.p_agree, int | float) or not 0 <= self.p_agree <= 1:
            raise InputError("p_agree", self.p_agree, "must be a probability, from 0 to 1")


@dataclass(frozen=True)
class Rank:
    """One statement's place in one member's ranking: 0 is the best, equal places are ties.

    Attributes: as of ``Rating``, with ``rank`` in place of ``agreement`` and ``quality``.

    Raises:
        InputError: on a rank that is not an integer from 0, or an empty text.
    """

    deliberation_id: str
    member: int
    question: str
    opinion: str
    statement: str
    rank: int
    topic: str = ""

    def __post_init__(self) -> None:
        for name in ("question", "opinion", "statement"):
            check_text(name, getattr(self, name))
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 0:
            raise InputError("rank", self.rank, "must be an integer from 0 (the best)")


@dataclass(frozen=True)
class Choice:
    """One member's choice between two statements: ``chosen`` over ``rejected``.

    Attributes: as of ``Rating``, with the two texts in place of ``statement`` and its ratings.

    Raises:
        InputError: on an empty text.
    """

    deliberation_id: str
    member: int
    question: str
    opinion: str
    chosen: str
    rejected: str
    topic: str = ""

    def __post_init__(self) -> None:
        for name in ("question", "opinion", "chosen", "rejected"):
            check_text(name, getattr(self, name))


Response = Rating | Vote | SoftVote | Rank | Choice
"""What one member says of one or two statements; a preference model is fitted to any mixture of them."""
