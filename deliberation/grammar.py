"""Sentence frames of opinions (one person's voice) and statements (a group's voice), with one slot each.

Slots: ``{claim}`` the question's affirming or negating clause, ``{items}`` a list of concerns or measures,
``{reason}`` a clause, none for fixed sentences. The writer fills them, the recogniser reads them back.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Frame:
    """One sentence shape, lower case, without full stop.

    Attributes:
        pre, post: the fixed words before and after the slot (``post`` may be empty).
        slot: ``claim``, ``concern``, ``measure``, ``reason`` or ``none``.
        value: for ``claim``: how strongly the sentence takes the claim's side (2, 1 or 0); for items and reasons:
            1 taken up, -1 set aside; for ``none``: the stance on the question, or None for a vague filler.
        personal: whether it is one person's voice.
        weight: for opinions: how much the member cares (1 main, 0.6 also).
        use: ``state`` (plain), ``red_line``, ``condition``.
    """

    pre: tuple[str, ...]
    post: tuple[str, ...]
    slot: str
    value: float | None
    personal: bool = False
    weight: float = 1.0
    use: str = "state"

    def fill(self, content: str = "") -> str:
        """The sentence with its slot filled, capitalised, with a full stop."""
        words = " ".join(part for part in (" ".join(self.pre), content, " ".join(self.post)) if part)
        words = f"{words[0].upper()}{words[1:]}".replace(" i ", " I ")
        return f"{words}."


def _frames(slot: str, value: float | None, texts: str, **more) -> list[Frame]:
    frames = []
    for text in texts.strip().split("\n"):
        pre, _, post = text.strip().partition("{}")
        frames.append(Frame(tuple(pre.split()), tuple(post.split()), slot, value, **more))
    return frames


CONNECTORS = (("however",), ("at", "the", "same", "time"), ("also",), ("in", "addition"), ("still",))
"""May open any sentence after the first, followed by a comma."""

STATEMENT_STANCE = (
    _frames(
        "claim",
        2,
        """we strongly believe that {}
        it is clear to all of us that {}
        there is no doubt that {}""",
    )
    + _frames(
        "claim",
        1,
        """on balance {}
        we think that {}
        most of us feel that {}
        after weighing both sides we conclude that {}
        with some care {}
        {}""",
    )
    + _frames(
        "claim",
        0,
        """we are divided on whether {}
        there is no shared view yet on whether {}
        more work is needed before it is settled whether {}""",
    )
)
STATEMENT_CONCERN = _frames(
    "concern",
    1,
    """we should take {} seriously
        {} should be looked after
        we want {} to be kept in mind
        care must be taken over {}
        any plan has to deal with {}
        attention must be paid to {}""",
) + _frames(
    "concern",
    -1,
    """{} should not decide the matter
        we would set {} aside
        less weight should go to {}""",
)
STATEMENT_MEASURE = _frames(
    "measure",
    1,
    """we propose {}
        there should be {}
        we would like to see {}
        one way forward is {}""",
) + _frames(
    "measure",
    -1,
    """we rule out {}
        we do not propose {}
        we advise against {}""",
)
STATEMENT_REASON = _frames(
    "reason",
    1,
    """we recognise that {}
        it matters that {}
        we take account of the fact that {}
        many of us point out that {}""",
) + _frames(
    "reason",
    -1,
    """we doubt that {}
        it is not enough that {}""",
)
STATEMENT_VAGUE = _frames(
    "none",
    None,
    """there are many views on this question
        people should talk more about it
        it is a difficult issue with good points on both sides
        more should be done
        everyone has a right to an opinion
        time will tell
        something has to change
        this is an important matter""",
)

OPINION_STANCE = (
    _frames(
        "claim",
        2,
        """i strongly believe that {}
        i am completely sure that {}
        there is no question in my mind that {}
        yes i am convinced that {}""",
        personal=True,
    )
    + _frames(
        "claim",
        1,
        """i think that {}
        i tend to agree that {}
        in my view {}
        overall i feel that {}
        i would say that {}
        {}""",
        personal=True,
    )
    + _frames(
        "claim",
        0,
        """i am not sure whether {}
        i can see both sides of whether {}
        i am torn on whether {}""",
        personal=True,
    )
)
OPINION_SHORT = (
    _frames("none", 2, "i am fully in favour of this\ni support this without hesitation", personal=True)
    + _frames("none", 1, "i am in favour of this\ni would go along with this\ni mostly agree with this", personal=True)
    + _frames("none", 0, "i cannot decide on this one\ni am undecided here", personal=True)
    + _frames("none", -1, "i am against this\ni would rather not have this\ni mostly disagree with this", personal=True)
    + _frames("none", -2, "i am totally against this\ni oppose this with all my strength", personal=True)
)
OPINION_CONCERN = (
    _frames(
        "concern",
        1,
        """what matters most to me is {}
        my main worry is {}
        i care a lot about {}
        for me it comes down to {}""",
        personal=True,
    )
    + _frames(
        "concern",
        1,
        "i also think about {}\nplease do not forget {}\ni have some concern for {}",
        personal=True,
        weight=0.6,
    )
    + _frames(
        "concern",
        -1,
        """i do not want {} to decide this
        i am tired of hearing about {}
        i care little about {}""",
        personal=True,
    )
)
OPINION_MEASURE = (
    _frames("measure", 1, "i would like to see {}\ni want {}\ni would welcome {}", personal=True)
    + _frames(
        "measure",
        -1,
        """i would never accept {}
        {} is out of the question for me
        i could not live with {}""",
        personal=True,
        use="red_line",
    )
    + _frames(
        "measure",
        1,
        """i could change my mind if there were {}
        i would accept the other side if we had {}""",
        personal=True,
        use="condition",
    )
)
OPINION_REASON = _frames(
    "reason",
    1,
    """in my experience {}
        it seems to me that {}
        i know that {}
        people forget that {}
        {}""",
    personal=True,
)

STATEMENT_FRAMES = STATEMENT_STANCE + STATEMENT_CONCERN + STATEMENT_MEASURE + STATEMENT_REASON + STATEMENT_VAGUE
OPINION_FRAMES = OPINION_STANCE + OPINION_SHORT + OPINION_CONCERN + OPINION_MEASURE + OPINION_REASON
