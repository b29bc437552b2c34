"""What the embedded models read: nothing held out, labels that fit, packing that changes no score."""

from __future__ import annotations

from random import Random

import pytest
import torch
from transformers import AutoTokenizer

from deliberation.citizens import draw_group, rate_text
from deliberation.lexicon import HELD_OUT_EVERY, load_lexicon
from deliberation.questions import load_questions
from deliberation.recogniser import read
from deliberation.writer import balanced, write_statement
from embedded import resolve
from embedded.corpus import training_group, writer_document
from embedded.disguise import Disguise, draw_disguise, rephrased, shown_opinions
from embedded.leads import own_leads
from embedded.ratings import AUX, KINDS, MEMBERS, STATEMENTS, WORDING, Labeller, _shown, make_row, rows, say_again
from embedded.train_judge import Judge, collate, losses
from embedded.train_writer import loss_of, optimisers, schedule, targets
from embedded.words import foreign_words, rename


def test_training_documents_hold_no_held_out_topic_or_word():
    rng = Random(0)
    text = " ".join("".join(writer_document(rng)) for _ in range(400))
    lexicon = load_lexicon()
    held_out = {w for part in (lexicon.modifiers, lexicon.heads) for w in part[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]}
    topics = {q.text for split in ("validation", "test") for q in load_questions(split)}
    # words that our training questions use by themselves are no news to the model
    known = {w.strip(".?").lower() for q in load_questions("train") for w in f"{q.text} {q.affirming}".split()}
    fixed = {
        w for table in (lexicon.concerns, lexicon.measures) for ps in table.values() for p in ps for w in p.split()
    }
    fixed |= {w for p in (*lexicon.predicates, *lexicon.acts, *lexicon.tails) for w in p.split()}
    words = {w.strip(".,?").lower() for w in text.split()}
    assert not (words & held_out) - known - fixed
    assert not any(topic in text for topic in topics)


def test_foreign_words_replace_whole_words_in_all_texts_alike():
    texts = ["Should nurses wait?", "Nurses wait.", "Some nurses and others."]
    found = [foreign_words(texts, Random(seed)) for seed in range(20)]
    assert {word for words in found for word in words} == {"nurses", "wait", "others"}  # frames and function words stay
    renamed = rename("Nurses wait. The nurses, nurseries.", {"nurses": "blorks"})
    assert renamed == "Blorks wait. The blorks, nurseries."


def test_opinions_are_said_in_other_words_alike_in_all_texts_and_statements_are_not():
    texts = [
        "I am against this. My main worry is noise.",
        "My main worry is noise.",
        "We want noise to be kept in mind.",
    ]
    changed = [own_leads(texts, Random(seed)) for seed in range(40)]
    assert {found[0] for found in changed} - {texts[0]} and len({found[1] for found in changed}) > 10
    for opinion, parrot, statement in changed:
        assert statement == texts[2] and opinion.endswith(f" {parrot}") and "noise" in parrot.lower()
    assert any(parrot.startswith("Noise ") for _, parrot, _ in changed)  # some leads stand behind
    assert {opinion.split(". ")[0] for opinion, _, _ in changed} > {"I am against this", "I disagree"}


def test_some_reasons_are_just_said():
    texts = ["I know that nurses wait too long. I want more nurses.", "We recognise that nurses wait too long."]
    found = {own_leads(texts, Random(seed))[0].split(". ")[0] for seed in range(40)}
    assert "Nurses wait too long" in found
    assert all(own_leads(texts, Random(seed))[1] == texts[1] for seed in range(40))


def test_a_disguise_is_read_back_as_it_was():
    rng, shown_otherwise = Random(0), 0
    for _ in range(150):
        group = training_group(rng)
        disguise = draw_disguise(group, rng)
        for kind in ("balanced", "one_sided", "parrot", "careless"):
            text = write_statement(group, rng, kind)
            shown = disguise.show(text)
            shown_otherwise += shown != text
            before, after = (read(t, group.question) for t in (text, disguise.read_back(shown)))
            assert [(i.kind, i.words, i.value) for i in before.items] == [
                (i.kind, i.words, i.value) for i in after.items
            ]
    assert shown_otherwise > 300


def test_a_rephrased_deliberation_keeps_its_members_and_shows_no_known_opinion():
    group = draw_group(load_questions("train")[0], Random(0))
    said = group.deliberation("d")
    found = [rephrased(said, group, Random(seed)) for seed in range(10)]
    assert all(d.id == "d" and len(d.opinions) == len(said.opinions) for d in found)
    assert sum(set(d.opinions).isdisjoint(said.opinions) for d in found) >= 8
    assert rephrased(said, group, Random(3)) == found[3]


def test_what_an_open_statement_takes_up_stands_in_the_prompt():
    rng, seen = Random(1), 0
    for _ in range(100):
        group = training_group(rng)
        disguise = draw_disguise(group, rng)
        if not disguise.phrases:
            continue
        prompt = " ".join(shown_opinions(group, disguise)).lower()
        statement = disguise.show(balanced(group, rng)).lower()
        taken_up = [rename(p, disguise.words) for p in disguise.wordings if rename(p, disguise.words) in statement]
        assert taken_up and all(phrase in prompt for phrase in taken_up)
        seen += 1
    assert seen > 30


def test_paraphrases_are_made_up_only_where_they_are_open():
    texts = ["Should nurses wait?", "My main worry is the bills that farmers have to pay."]
    found = [set().union(*(foreign_words(texts, Random(s), paraphrases=p) for s in range(30))) for p in (False, True)]
    assert "bills" not in found[0] and {"bills", "pay"} <= found[1] and "worry" not in found[1]


def test_an_opinion_in_other_words_is_shown_and_its_phrases_are_not_labelled():
    group = draw_group(load_questions("train")[0], Random(0))
    labeller = Labeller(AutoTokenizer.from_pretrained(resolve("embedded/judge")))
    row = make_row(labeller, group.question, group.citizens[0], [], Disguise(), "Other words.")
    assert "Other words." in labeller.tokenizer.decode(row.prefix) and not any(row.kinds + row.uses)
    assert any(make_row(labeller, group.question, group.citizens[0], [], Disguise()).kinds)


@pytest.fixture(scope="module")
def packed():
    labeller = Labeller(AutoTokenizer.from_pretrained(resolve("embedded/judge")))
    drawn = (rows(labeller, Random(seed), []) for seed in range(100))
    return next(found for found in drawn if all(any(row.kinds) for row in found))  # a group without a disguise


def test_rows_hold_labels_for_every_token(packed):
    assert len(packed) == MEMBERS
    for row in packed:
        tokens = len(row.prefix) + sum(map(len, row.suffixes))
        assert len(row.suffixes) == len(row.agreement) == STATEMENTS
        assert len(row.kinds) == len(row.uses) == len(row.wording) == len(row.gains) == tokens
        assert all(0 < a < 1 for a in row.agreement) and all(len(a) == len(AUX) for a in row.aux)
        assert any(row.kinds) and max(row.kinds) < len(KINDS) and max(row.wording) < len(WORDING)


def tiny_classifier():
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    return LlamaForSequenceClassification._from_config(
        LlamaConfig(vocab_size=4096, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2,
                    num_labels=1, pad_token_id=0), attn_implementation="eager").eval()  # fmt: skip


def test_packing_changes_no_score(packed):
    model, batch = tiny_classifier(), collate(packed, 0)
    with torch.no_grad():
        states = model.model(input_ids=batch.ids, position_ids=batch.positions, attention_mask=batch.mask,
                             use_cache=False).last_hidden_state  # fmt: skip
        scores = model.score(states[batch.last[:, 0], batch.last[:, 1]])[:, 0]
        alone = [model(input_ids=torch.tensor([r.prefix + s])).logits[0, 0] for r in packed for s in r.suffixes]
    assert torch.allclose(scores, torch.stack(alone), atol=1e-5)


def test_a_few_judge_steps_lower_the_loss(packed):
    judge, batch = Judge(tiny_classifier()), collate(packed, 0)
    steps = []
    opts = optimisers(judge, 0.01)
    for _ in range(12):
        loss, _ = losses(judge, batch)
        loss.backward()
        for opt in opts:
            opt.step()
            opt.zero_grad()
        steps.append(float(loss.detach()))
    assert steps[-1] < 0.8 * steps[0]


def test_a_point_said_again_stands_in_another_frame_and_costs_agreement():
    rng, lower = Random(0), 0
    for _ in range(40):
        group = training_group(rng)
        text = balanced(group, rng)
        again = say_again(text, rng)
        assert len(again.split(". ")) == len(text.split(". ")) + 1
        assert all(sentence in again for sentence in text.rstrip(".").split(". "))
        means = [sum(rate_text(c, group.question, t).agreement for c in group.citizens) for t in (text, again)]
        lower += means[1] < means[0]
    assert lower > 30
    assert say_again("More should be done.", rng) == "More should be done."


def test_a_batch_without_labels_at_its_words_has_a_finite_loss(packed):
    batch = collate(packed, 0)
    for labels in (batch.kinds, batch.uses, batch.wording):
        labels.zero_()
    batch.gains.fill_(float("nan"))
    loss, parts = losses(Judge(tiny_classifier()), batch)
    assert torch.isfinite(loss) and parts["kinds"] == parts["wording"] == parts["gains"] == 0 < parts["rating"]


def test_writer_targets_are_every_completion_token_each_predicted_from_its_own_past():
    prompt, first, second = list(range(10, 22)), [30, 31, 1], [40, 41, 42, 1]
    torch.manual_seed(0)
    row, source, token = targets([[prompt, first, second]], opening=4)
    found = [(int(s), int(t)) for s, t in zip(source, token, strict=True)]
    # both statements start from the prompt's last token (11), the second not from the first's end
    statements = [(11, 30), (12, 31), (13, 1), (11, 40), (15, 41), (16, 42), (17, 1)]
    assert found[-7:] == statements and not row.any()
    assert all(s >= 3 and prompt[s + 1] == t for s, t in found[:-7])  # a share of the prompt behind the opening
    assert len(found) < 7 + len(prompt) - 4


def test_packed_statements_read_as_if_each_stood_alone_behind_the_prompt():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(
        LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                    tie_word_embeddings=True), attn_implementation="eager").eval()  # fmt: skip
    rows_ = [[[5, 6, 7, 8], [9, 10, 1], [11, 12, 13, 1]], [[14, 15, 16], [17, 1], [18, 19, 1]]]
    alone = [[[prompt, s]] for prompt, *statements in rows_ for s in statements]
    with torch.no_grad():
        together = loss_of(model, rows_, 0, opening=10)
        losses_ = [loss_of(model, row, 0, opening=10) * len(row[0][1]) for row in alone]
    assert float(together) == pytest.approx(float(sum(losses_)) / 12, rel=0.01)  # bfloat16 autocast


def test_only_words_that_a_member_was_shown_are_made_up():
    group = draw_group(load_questions("train")[0], Random(0))
    question = group.question.text.lower().strip("?").split()
    words = dict.fromkeys([*question, "zebra"], "blork")
    assert set(_shown(words, group, group.citizens[0].opinion)) == set(question)


def test_schedule_warms_up_and_decays():
    assert schedule(0.0) == 0 and schedule(0.02) == 1 and schedule(1.0) == pytest.approx(0.02)
    assert schedule(1.0, end=1.0) == 1 and schedule(0.3) > schedule(0.6)


def test_the_shipped_models_are_small_safetensors_that_transformers_loads():
    from pathlib import Path

    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    writer = AutoModelForCausalLM.from_pretrained(resolve("embedded/writer"), use_safetensors=True)
    judge = AutoModelForSequenceClassification.from_pretrained(resolve("embedded/judge"), use_safetensors=True)
    assert judge.config.num_labels == 1 and writer.config.model_type == judge.config.model_type == "llama"
    folders = [Path(resolve(f"embedded/{name}")) for name in ("writer", "judge")]
    sizes = [p.stat().st_size for folder in folders for p in folder.iterdir()]
    assert sum(sizes) <= 25e6 and not [p for f in folders for p in f.iterdir() if p.suffix in (".bin", ".pt", ".pkl")]


def test_other_names_are_not_touched():
    assert resolve("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B" and resolve("runs/x") == "runs/x"
