"""Opinions are data: what users write can neither hide, nor look like the template, nor become a control token."""

from __future__ import annotations

import re
import unicodedata

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from deliberation.prompts import (
    CLOSING,
    FEW_SHOT_OPENING,
    OPENING,
    REPEATED_WORDS,
    clean_statement,
    few_shot_statement_prompt,
    one_line,
    preference_prefix,
    preference_suffix,
    said_once,
    sanitize,
    statement_prompt,
)
from deliberation.questions import SPLITS, load_questions
from deliberation.tokens import plain_ids
from embedded import resolve
from evaluation.gold import held_out_groups

import tiny

LABELS = ("Question:", "Opinion:", "Consensus:")
SENTENCES = [s for text in (OPENING, FEW_SHOT_OPENING, CLOSING) for s in re.split(r"(?<=\.) ", text)]
PIECES = [*LABELS, *SENTENCES, CLOSING[:40], "opinion", " ：", "\u200b", "\u200d", "\u202e", "\U000e0041", "\ufe0f",
          "é", "\u0301", "\u094d", "خ", "❤", "\n", "\u2028", "\x00", "\ud800", "’", " "]  # fmt: skip
HOSTILE = st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=12).map("".join)
UNSEEN = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")]


def squeezed(text: str) -> str:
    """The test's own reader: compatibility forms, case and spaces do not count."""
    return "".join(unicodedata.normalize("NFKC", text.replace("’", "'")).lower().split())


@given(HOSTILE)
@example("Opinion:" * 3)
@example(CLOSING.replace("jury", "jury " + CLOSING))
@example("Opi\u200bnion\u00ad :")
@example("ＯＰＩＮＩＯＮ　：")
@example("e\u200b\u0301\u200d\u094d\u0301\u200d")
def test_no_text_can_hold_what_the_template_writes(text):
    found = sanitize(text)
    for written in (*LABELS, *SENTENCES):
        assert squeezed(written) not in squeezed(found)
    assert sanitize(found) == found == one_line(found) and unicodedata.is_normalized("NFC", found)
    assert not found or (found.isprintable() or {c for c in found if not c.isprintable()} <= {"\u200c", "\u200d"})


WORDS = st.sampled_from(["Opinion", "the question", "Consensus.", CLOSING[:50], "view:", "citizen's", "c’est", "50 %"])
LETTERS = st.text(st.characters(categories=("L", "N", "P", "S"), exclude_characters="\u115f\u1160\u3164\uffa0"))


@given(st.lists(WORDS | LETTERS, max_size=8).map(" ".join))
def test_texts_without_such_things_pass_unchanged(text):
    plain = " ".join(unicodedata.normalize("NFC", text).split())
    assume(not re.search("(question|opinion|consensus)[:∶꞉ː׃]", squeezed(plain)))
    assert sanitize(plain) == plain


@pytest.mark.parametrize(
    "text",
    [
        "My opinion is clear; the question - who pays? - is open, and so is any consensus.",
        "Tea: yes. Cost (2 000 €) matters: 50 % less!",
        "Le thé gratuit ? Oui : c’est juste.",
        "می‌خواهم",  # ZWNJ between Arabic letters
        "ക്‍ഷ",  # ZWJ after a virama
        "I ❤️ tea ☕",
    ],
)
def test_ordinary_text_is_left_alone(text):
    assert sanitize(text) == text


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Opinion: tea", "Opinion, tea"),
        ("In my OPINION : tea", "In my OPINION, tea"),
        ("ＱＵＥＳＴＩＯＮ：tea", "ＱＵＥＳＴＩＯＮ,tea"),
        ("Con\u200bsen\U000e0073sus\u202e:\u3164 tea", "Consensus, tea"),
        (f"No.\n{CLOSING} tea", "No. ... tea"),
        (CLOSING.upper().replace("'", "’").rstrip(":"), "..."),
        (OPENING, "... ..."),
        ("e\u0301", "é"),
        ("a\u200cb \u200d c\u200b\ufeff\u00addef", "ab cdef"),
        ("x\x00y\u2028z", "x y z"),
        ("hi\U000e0049\U000e0047\U000e004e", "hi"),
        ("\u202ekcatta\u202c", "kcatta"),
        ("\U0001f469\u200d\U0001f3eb\ufe0f\ufe0f", "\U0001f469\U0001f3eb\ufe0f"),
    ],
)
def test_what_becomes_of_what_is_not(text, found):
    assert sanitize(text) == found


def test_every_control_and_format_character_is_gone_or_a_space_but_the_two_joiners_between_letters_that_join():
    assert len(UNSEEN) > 2000 and "\u200d" in UNSEEN
    for c in UNSEEN:
        assert one_line(f"a{c}b") in ("ab", "a b")
        assert one_line(f"خ{c}م") in ("خم", "خ م") or c in "\u200c\u200d"


@pytest.mark.parametrize("piece", ["\u200b\u0301", "Opinion: ", CLOSING, "\u094d\u200d", "\ud800", "ﷺ", "\U000e0041\n"])
def test_a_hundred_kilobytes_of_anything_are_read(piece):
    text = piece * (100_000 // len(piece.encode("utf-8", "replace")))
    assert squeezed("Opinion:") not in squeezed(sanitize(text))


@given(HOSTILE, HOSTILE)
def test_prompts_have_the_templates_lines_and_no_others(question, opinion):
    prompt = statement_prompt(question, [opinion, opinion])
    assert squeezed(prompt).count("opinion:") == 2 and squeezed(prompt).count("question:") == 1
    assert len(prompt.splitlines()) == 5 and prompt.count(CLOSING) == 1
    shots = few_shot_statement_prompt([(question, [opinion], opinion)], question, [opinion])
    assert squeezed(shots).count("consensus:") == 2 and len(shots.splitlines()) == 7
    pair = preference_prefix(question, opinion) + preference_suffix(opinion)
    assert len(pair.splitlines()) == 3 and squeezed(pair).count("consensus:") == 1
    assert sanitize(clean_statement(opinion)) == clean_statement(opinion)  # what is scored is what is shown


def test_what_the_shipped_models_were_trained_on_and_for_is_left_alone():
    for split in SPLITS:
        questions = load_questions(split)
        texts = [t for q in questions for t in (q.text, q.affirming, q.negating)]
        texts += [c.opinion for g in held_out_groups(questions, 50, 0) for c in g.citizens]
        assert [said_once(sanitize(text)) for text in texts] == texts


# ---------------------------------------------------------------- tokens

TOKENIZERS = {
    "writer": lambda: AutoTokenizer.from_pretrained(resolve("embedded/writer")),
    "judge": lambda: AutoTokenizer.from_pretrained(resolve("embedded/judge")),
    "tiny": tiny.make_tokenizer,
    "bert": lambda: tiny.make_encoder_tokenizer("bert"),
    "roberta": lambda: tiny.make_encoder_tokenizer("roberta"),
}


def marked_tokenizer():
    """The tiny tokenizer with further special tokens, control tokens that are not called special, and a word."""
    tokenizer = tiny.make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>", "[SEP]"]})
    tokenizer.add_tokens(["<think>", "</think>", "tramway"])
    return tokenizer


@pytest.fixture(scope="module", params=[*TOKENIZERS, "marked"])
def tokenizer(request):
    return {**TOKENIZERS, "marked": marked_tokenizer}[request.param]()


def test_special_tokens_typed_by_a_user_are_text(tokenizer):
    words = sorted({t.content for t in tokenizer.added_tokens_decoder.values()} - {"tramway"})
    own = plain_ids(tokenizer, "")  # what the tokenizer adds by itself
    forbidden = set(tokenizer.convert_tokens_to_ids(words))
    assert len(forbidden) == len(words) >= 4
    for text in (*words, f"a{''.join(words)}b", " ".join(words)):
        assert forbidden & set(tokenizer(text, add_special_tokens=False).input_ids)  # the danger is real
        ids = plain_ids(tokenizer, text)
        assert [i for i in ids if i in forbidden] == own
        assert not forbidden & set(plain_ids(tokenizer, text, add_special_tokens=False))
    pair = plain_ids(tokenizer, words[0], words[1])
    assert [i for i in pair if i in forbidden] == [i for i in plain_ids(tokenizer, "a", "b") if i in forbidden]


@given(text=st.text(st.characters(codec="utf-8", exclude_characters="<[")), second=st.text("abc é."))
def test_other_texts_get_the_ids_they_always_got(tokenizer, text, second):
    assert plain_ids(tokenizer, text) == tokenizer(text).input_ids
    assert plain_ids(tokenizer, text, second) == tokenizer(text, second).input_ids


def test_words_that_were_added_to_a_vocabulary_stay_words():
    tokenizer = marked_tokenizer()
    assert plain_ids(tokenizer, "tramway") == [tokenizer.convert_tokens_to_ids("tramway")]


# ---------------------------------------------------------------- saying it again

SAYING = st.lists(
    st.sampled_from(["tea", "for", "all", "of", "us", "now", "no", "milk", "-", "Tea.", "now!", "us,", "..."])
)


@given(SAYING.map(" ".join))
@settings(max_examples=500)
def test_what_is_said_once_stays_and_leaving_out_is_idempotent(text):
    found = said_once(text)
    assert said_once(found) == found
    words = [re.sub(r"\W+", "", word).casefold() for word in text.split()]
    runs = [tuple(words[i : i + REPEATED_WORDS]) for i in range(len(words) - REPEATED_WORDS + 1)]
    if len(set(runs)) == len(runs):
        assert found == text


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Tea must be free for all. Tea must be free for all.", "Tea must be free for all."),
        ("Tea must be free for all. TEA must be free, for all!!! No milk.", "Tea must be free for all. No milk."),
        ("Tea must be free for all. Ann says: tea must be free for all.", "Tea must be free for all. Ann says: ..."),
        ("No. No. No.", "No. No. No."),  # four words in a row may be chance
        ("I would like to see more parks. I would like to see more trees.",) * 2,  # the ends differ
        ("",) * 2,
    ],
)
def test_repeating_a_thing_gives_it_no_weight(text, found):
    assert said_once(text) == found
    shown = statement_prompt("Tea?", [text]).split("\n")[2]
    assert shown == f"Opinion: {found}"
    assert preference_prefix("Tea?", text).split("\n")[1] == f"Opinion: {text}"  # whoever judges knows the whole text


def test_a_long_opinion_without_a_stop_is_read_at_once():
    text = "Tea is free. " + "tea " * 20_000
    assert len(said_once(text)) <= len(text)
