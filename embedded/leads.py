"""Opinions said otherwise: sentences that the citizens' grammar does not know, around the same content."""

from __future__ import annotations

import re
from random import Random

from deliberation.grammar import (
    OPINION_CONCERN,
    OPINION_MEASURE,
    OPINION_REASON,
    OPINION_SHORT,
    OPINION_STANCE,
    Frame,
)
from embedded.words import Pieces, made_up_word

LEADS = {
    "concern": """I worry about {}|I care about {}|I am worried about {}|I think of {}|Think of {}|Think about {}|
        Do not forget {}|Nobody talks about {}|It is all about {}|We must not ignore {}|We need to protect {}|
        My concern is {}|I am afraid of {}|The real issue is {}|Most of all I care about {}|I keep thinking of {}|
        There is also {}|I am scared of {}|My main concern is {}|{} worries me|{} matters a lot|{} must come first|
        {} is a problem|{} would be the worst part|For me {} is what counts|My only fear is {}|The problem is {}""",
    "measure": """We need {}|We should have {}|Give us {}|I propose {}|Why not try {}|I hope for {}|The answer is {}|
        It would help to have {}|I would be happy with {}|Let us have {}|I would support {}|There must be {}|
        I ask for {}|{} would help|{} is what we need|{} would be better|How about {}|I would rather have {}|
        I would love {}|Please give us {}|We could start with {}""",
    "reason": """The fact is that {}|After all {}|I have seen that {}|Remember that {}|The trouble is that {}|
        Everyone knows that {}|I hear that {}|Besides, {}|I worry that {}|My point is that {}|Right now {}|
        I find that {}""",
    "condition": """I could live with it if there were {}|I could accept it if we had {}|It would be fine with {}|
        I would agree if we got {}|Fine by me if there were {}|I would say yes to it with {}|I might agree given {}|
        {} would change my mind|With {} I could agree|I would accept it if we had {}|Only with {}""",
    "concern -1": """I do not care about {}|{} does not matter|{} is no reason|Forget about {}|
        I am not worried about {}|We hear too much about {}|{} should not decide this""",
    "red_line": """I would never agree to {}|{} is unacceptable|I do not want {}|Anything but {}|I am against {}|
        Not with {}""",
    "stance 2": "I strongly agree that {}|I am certain that {}|Definitely, {}|I am sure that {}|Yes, {}",
    "stance 1": """I agree that {}|I believe {}|I think {}|Yes, {}|To my mind {}|I feel that {}|My view is that {}|
        I say {}""",
    "stance 0": """I do not know whether {}|I wonder whether {}|It is hard to say whether {}|
        I am in two minds whether {}""",
    "short 2": "Absolutely yes|Definitely|I strongly support this|A clear yes from me|This is a great idea",
    "short 1": "Yes|I support this|I agree|Good idea|I like the idea|I am for it|Yes please|This makes sense to me",
    "short 0": "I am not sure|I do not know|Hard to say|I am in two minds|Maybe|It depends",
    "short -1": """No|I do not want this|I disagree|I do not like this|I am not in favour|Bad idea|I would say no|
        Please no""",
    "short -2": "Absolutely not|No way|I strongly oppose this|Never|This would be terrible|I am totally opposed",
}
"""Ways to say a sentence of an opinion that the citizens' grammar does not know: people who type have their own."""


def own_leads(texts: list[str], rng: Random, pieces: Pieces | None = None) -> list[str]:
    """``texts`` with most frames of opinion sentences put in other words, alike in all texts."""
    for frame in OPINION_STANCE + OPINION_SHORT + OPINION_CONCERN + OPINION_MEASURE + OPINION_REASON:
        if not frame.pre or frame.post or rng.random() < 0.3:
            continue
        texts = _said_otherwise(texts, frame, rng, pieces)
    return texts


def _said_otherwise(texts: list[str], frame: Frame, rng: Random, pieces: Pieces | None) -> list[str]:
    """``texts`` with the sentences of one frame in other words."""
    known = " ".join(frame.pre)
    known = re.escape(f"{known[0].upper()}{known[1:]}".replace(" i ", " I "))
    lead = rng.choice([" ".join(text.split()) for text in LEADS[_lead_kind(frame)].split("|")])
    if frame.slot == "none":
        return [re.sub(rf"\b{known}\.", f"{lead}.", text) for text in texts]
    if frame.slot == "reason" and rng.random() < 0.7:  # most people just say it: "Parents cannot get to work."
        lead = "{}"
    elif frame.slot != "claim" and frame.value == 1 and rng.random() < 0.3:
        lead = " ".join(made_up_word(rng, pieces) for _ in range(rng.randint(1, 4))).capitalize() + " {}"

    def sentence(found: re.Match[str]) -> str:
        said = lead.format(found.group(1))
        return f"{said[0].upper()}{said[1:]}."

    return [re.sub(rf"\b{known} ([^.]*)\.", sentence, text) for text in texts]


def _lead_kind(frame: Frame) -> str:
    """The key of ``LEADS`` for an opinion's frame."""
    if frame.slot in ("claim", "none"):
        return f"{'stance' if frame.slot == 'claim' else 'short'} {int(frame.value or 0)}"
    if frame.use in ("condition", "red_line"):
        return frame.use
    return frame.slot if frame.value == 1 else f"{frame.slot} -1"
