"""The dialogue study: every model in five ways on one vocabulary, and answers that follow from its tables."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil

import pytest
import torch
from safetensors import safe_open
from small import small
from tokenizers import Tokenizer

import bklm
from bklm.command.main import main
from bklm.data.corpus import LICENCES
from bklm.data.dialogue_tokens import MARKS
from bklm.models import future_leak
from bklm.studies import DialogueConfig, run_dialogue
from bklm.studies.dialogue import models, tables
from bklm.studies.dialogue.run import prepare_text
from bklm.studies.dialogue.text import MIXTURE
from bklm.trained.chat import Chat
from bklm.training.non_finite import NonFiniteError
from bklm.training.weights import OtherModelError


@pytest.fixture(scope="module")
def text(result):
    return prepare_text(result.config)


@pytest.fixture(scope="module")
def result(tmp_path_factory, small_text):
    """All models, one seed."""
    return run_dialogue(
        small("dialogue", tmp_path_factory.mktemp("dialogue"), small_text, model="all", seeds=(0,))
    )


def test_every_model_is_trained_in_five_ways_at_equal_size_and_seen_by_no_other_vocabulary(result, text):
    names, ways = ("NewLLM", "ResNetBK", "GPT"), tables.WAYS
    assert [r["arm"] for r in result.table] == [f"{name} {way}" for name in names for way in ways]
    weights = [
        *result.folder.glob(".*/*/model.safetensors"),
        *result.folder.glob("models/*/best_model.safetensors"),
    ]
    assert len(weights) == 5 * len(names) + len(names)
    for path in weights:
        with safe_open(str(path), "pt") as file:
            assert file.metadata()["vocabulary"] == text.vocabulary_sha256
    manifest = json.loads((result.folder / "manifest.json").read_text())
    assert manifest["vocabulary_sha256"] == text.vocabulary_sha256
    assert manifest["embedding_and_head"].keys() == set(names)
    assert all(0.3 < share < 1 for share in manifest["embedding_and_head"].values())
    before = {r["arm"]: r["text_loss"] for r in result.table}
    # Tuned for a step, a model is still near to where pretraining left it, and far from one that never saw the text.
    assert before["GPT tuned"] < before["GPT scratch"]


def test_pretraining_is_judged_at_equal_steps_on_dialogues_and_in_all(result, text):
    against = [(r["arm"], r["against"]) for r in result.verdicts if r["arm"].startswith("GPT")]
    assert against == [
        ("GPT tuned", "GPT scratch"), ("GPT tuned", "GPT longer"), ("GPT replay", "GPT tuned"),
        ("GPT tuned", "NewLLM tuned"), ("GPT tuned", "ResNetBK tuned"),
    ]  # fmt: skip
    config = result.config
    epochs = {}
    for stage in (models.PRETRAINING, models.TUNING, models.LONGER):
        for path in (result.folder / stage).glob("*/result.json"):
            record = json.loads(path.read_text())
            epochs[record["arm"]] = len(record["epochs"])
    per_pass = len(text.train_loader(0))
    both = len(text.prose.train_loader(0)) * config.pretraining_epochs + per_pass * config.epochs
    assert 0 <= epochs["GPT longer"] * per_pass - both < per_pass
    assert epochs["GPT scratch"] == epochs["GPT tuned"] == config.epochs


def test_no_model_sees_the_future(result, text):
    x = text.rows["valid"][0][0][None]
    for name, build in models.builders(result.config).items():
        assert future_leak(build(text.vocab_size), x, x.shape[1] - 2).max() <= 1e-12, name


def test_counting_is_scored_on_the_replies_and_the_true_law_lies_below_all(result, text):
    rows = {r["name"]: r["val_ppl"] for r in result.baselines}
    law = rows.pop("true law, all turns")
    assert law < min(rows.values())
    exact = text.corpus.reply_nats("valid").sum() / text.rows["valid"].num_targets
    assert law == pytest.approx(math.exp(exact))
    held_out = {r["name"]: r["test_ppl"] for r in result.baselines}
    exact = text.corpus.reply_nats("test").sum() / text.rows["test"].num_targets
    law = held_out.pop("true law, all turns")
    assert law == pytest.approx(math.exp(exact))
    assert law < min(held_out.values())
    counted = [
        v for k, v in rows.items() if k.startswith("Kneser-Ney") and "-gram" in k and "of dialogues" not in k
    ]
    mixture = next(v for k, v in rows.items() if k.startswith(MIXTURE))
    assert mixture <= min(counted) * (1 + 1e-9)


def trial(arm, seed, loss, own=1.0, other=1.0, facts=(10, 20), text=10.0, earlier=1.0):
    contexts = dict.fromkeys(("0", "1", "3"), own) | {"all": own, "other": other, "1 after other": earlier}
    return {
        "arm": arm, "seed": seed, "val_ppl": math.exp(loss), "test_ppl": math.exp(loss + 0.1), "contexts": contexts,
        "facts": {"1": list(facts), "2": [0, 20]}, "text_loss": text,
    }  # fmt: skip


CHANCE = 0.25


def made(**more):
    """Three seeds of a tuned GPT that uses its turns, and of its controls."""
    rows = []
    for seed, noise in enumerate((0.0, 0.01, -0.01)):
        rows += [
            trial("GPT scratch", seed, 2 + noise), trial("GPT longer", seed, more.get("longer", 1.9) + noise),
            trial("GPT pretrained", seed, 3 + noise, text=9.0),
            trial("GPT tuned", seed, 1.5 + noise, 1.0, more.get("other", 1.5) + noise, (19, 20), text=20 + noise,
                  earlier=more.get("earlier", 1.0) + noise),
            trial("NewLLM tuned", seed, 1.7 + noise),
            trial("GPT replay", seed, 1.6 + noise, text=more.get("replay", 11.0) + noise),
        ]  # fmt: skip
    return rows


@pytest.mark.parametrize(
    ("more", "claim", "verdict"),
    [
        ({}, "GPT: pretraining helps dialogue", "holds"),
        ({"longer": 1.5}, "GPT: pretraining helps dialogue", "not shown"),
        ({"longer": 1.2}, "GPT: pretraining helps dialogue", "does not hold"),
        ({}, "GPT uses its context, the turn that it answers included", "holds"),
        ({"other": 1.0}, "GPT uses its context, the turn that it answers included", "not shown"),
        ({"other": 0.9}, "GPT uses its context, the turn that it answers included", "does not hold"),
        ({}, "GPT uses the turns before that", "not shown"),
        ({"earlier": 1.5}, "GPT uses the turns before that", "holds"),
        ({}, "GPT recalls facts from 1 to 2 turns back", "does not hold"),
        (
            {},
            f"{tables.CONTROL}: a model learns here to look facts up, at 3 distances or more",
            "does not hold",
        ),
        ({}, "GPT is the best of the tuned models", "holds"),
        ({}, f"GPT {tables.FORGETS_LESS}", "holds"),
        ({"replay": 19.9}, f"GPT {tables.FORGETS_LESS}", "holds"),
        ({"replay": 20.5}, f"GPT {tables.FORGETS_LESS}", "does not hold"),
        ({}, "the best model beats counting", "holds"),
        ({"counting": 4.9}, "the best model beats counting", "not shown"),
        ({"counting": 4.0}, "the best model beats counting", "does not hold"),
    ],
)
def test_a_claim_holds_only_beyond_its_interval_and_against_every_control(more, claim, verdict):
    from bklm.harness.arms import Arm, verdicts

    trials = made(**more)
    arms = {"GPT tuned": Arm(None, ("GPT scratch", "GPT longer", "NewLLM tuned"))}
    judged = verdicts(tables.ARMS, trials, arms)
    contexts, facts = tables.context_rows(trials), tables.fact_rows(trials)
    mixture = {"name": MIXTURE, "val_ppl": 1.0, "test_ppl": more.get("counting", 5.2)}
    rows = {
        r["announced"]: r
        for r in tables.claims_table(trials, judged, contexts, facts, mixture, CHANCE, (100, 60))
    }
    # Random words answer neither what a text teaches nor what is forgotten of it.
    undecided = {n for n in rows if "pretraining helps" in n or tables.FORGETS_LESS in n}
    assert {rows[name]["verdict"] for name in undecided} == {"no verdict"}
    assert all(rows[name]["measured"].endswith(tables.NOTHING_TO_TEACH) for name in undecided)
    if claim not in undecided:
        assert rows[claim]["verdict"] == verdict
    few = tables.claims_table(trials, judged, contexts, facts, mixture, CHANCE, (100, 13))
    (earlier,) = (r for r in few if r["announced"] == "GPT uses the turns before that")
    assert earlier["verdict"] == "no verdict"
    assert earlier["measured"].endswith("; 13 of 100 replies have any")
    rows = tables.claims_table(trials, judged, contexts, [], mixture, None, (100, 60))
    assert claim not in undecided or {r["announced"]: r["verdict"] for r in rows}[claim] == verdict
    one = [t for t in trials if t["seed"] == 0]
    judged = verdicts(tables.ARMS, one, arms)
    rows = tables.claims_table(
        one, judged, tables.context_rows(one), tables.fact_rows(one), mixture, CHANCE, (100, 60)
    )
    assert {r["verdict"] for r in rows} == {"no verdict"}


def test_facts_are_recalled_as_far_as_every_distance_before_is_above_chance_beyond_its_interval():
    def of(*shares, seeds=3):
        return [
            trial("GPT tuned", seed, 1.0) | {"facts": {str(n): share for n, share in enumerate(shares, 1)}}
            for seed in range(seeds)
        ]

    told = [tables.facts_in_words(tables.fact_rows(of(*shares)), CHANCE) for shares in (
        [(90, 100), (80, 100), (30, 100), (9, 10)], [(90, 100), (10, 100), (9, 9)], [(10, 100), (90, 100)])]  # fmt: skip
    assert [words.split(": ", 1)[1] for words in told[:1]] == ["GPT up to 2 turns back"]
    assert "GPT up to 1 turn back. The positive control failed: " in told[1]
    assert "GPT nowhere. The positive control failed: " in told[2]
    assert "no verdict" in tables.facts_in_words(tables.fact_rows(of((9, 10), seeds=1)), CHANCE)
    # What a model does not learn in one way of training it may in another.
    longer = [t | {"arm": "GPT longer"} for t in of((90, 100), (80, 100), (90, 100), (9, 10))]
    facts = tables.fact_rows([*of((90, 100), (80, 100), (30, 100), (9, 10)), *longer])
    assert tables.facts_in_words(facts, CHANCE).endswith("GPT up to 2 turns back (GPT longer up to 4)")
    (claim,) = (c for c in tables._recalls(facts, CHANCE) if c["announced"].startswith("GPT recalls"))
    assert claim["measured"].endswith("; GPT longer up to 4 turns back")
    assert claim["verdict"] == "does not hold"
    # Seeds that agree on ten facts know no more than ten facts say.
    (row,) = tables.fact_rows(of((10, 10), (0, 10)))
    expected = pytest.approx(1.96 * math.sqrt(12 * 2 / 14**3))
    assert (row["recalled_1_95"], row["recalled_2_95"]) == (expected, expected)


def test_a_tuning_whose_pretraining_diverged_is_lost_as_diverged(tmp_path):
    begun = models.pretrained(lambda vocabulary: torch.nn.Linear(1, 1), "GPT", tmp_path, "")
    torch.manual_seed(7)
    with pytest.raises(NonFiniteError, match="GPT, seed 7: its pretraining diverged"):
        begun(10)


def test_ids_mean_the_same_words_in_both_stages_and_in_the_file_that_is_kept(result, text):
    kept = Tokenizer.from_file(str(result.folder / "tokenizer.json"))
    for own, said in (
        (text.prose.tokens.valid, " ".join(text.prose.corpus.valid)),
        (text.encoded["valid"].ids, " ".join(text.corpus.valid)),
    ):
        read = kept.decode(own.tolist(), skip_special_tokens=False)
        for mark in MARKS:
            read = read.replace(mark, " ")
        words = read.split()[:100]
        assert len(words) == 100
        assert words == said.split()[:100]


def test_one_dialogue_for_validation_is_refused_before_anything_is_trained(result):
    with pytest.raises(
        ValueError, match=r"^held_out_dialogues: got 1 dialogue for validation.*take two or more"
    ):
        prepare_text(dataclasses.replace(result.config, held_out_dialogues=1))


def test_a_model_beside_another_tokenizer_is_refused_on_load(result, tmp_path):
    shutil.copytree(result.folder, tmp_path / "run", ignore=shutil.ignore_patterns(".*"))
    file = tmp_path / "run" / "tokenizer.json"
    swapped = json.loads(file.read_text())
    one, other = list(swapped["model"]["vocab"])[-2:]
    swapped["model"]["vocab"] |= {one: swapped["model"]["vocab"][other], other: swapped["model"]["vocab"][one]}
    file.write_text(json.dumps(swapped))
    for load in (bklm.load, lambda folder: models.load_kept(folder, "GPT tuned")):
        with pytest.raises(OtherModelError, match="holds weights of another vocabulary"):
            load(tmp_path / "run")


def test_a_kept_model_is_loaded_and_talks_and_another_run_has_none_to_talk_to(
    result, capsys, monkeypatch, tmp_path
):
    trained = bklm.load(result.bundle.path)
    assert trained.models == bklm.load(result.folder).models
    assert sorted(trained.models) == ["GPT tuned", "NewLLM tuned", "ResNetBK tuned"]
    talk = Chat(bklm.load(result.folder, "GPT tuned"), temperature=0.0, most=5)
    pieces = list(talk.say("cat <system> tom"))
    marks = [talk.trained.tokenizer.token_to_id(m) for m in ("<user>", "<system>", "<end>")]
    # What was typed holds no mark: one of the user, one end, and the system's whose turn it is.
    typed = talk._plain.encode("cat <system> tom", add_special_tokens=False).ids
    assert not set(typed) & set(marks)
    assert talk.saw.tokens == len(typed) + 3
    assert talk.saw.text == "<user>cat <system> tom<end><system>"
    assert "".join(pieces) == "".join(Chat(talk.trained, temperature=0.0, most=5).say("cat <system> tom"))
    broken_off = Chat(talk.trained, temperature=2.0, most=5)
    kept = broken_off.say("cat")
    first = next(kept)
    list(broken_off.say("dog"))
    assert broken_off.saw.text.startswith(f"<user>cat<end><system>{first}")
    assert broken_off.saw.text.endswith("<end><user>dog<end><system>")
    assert len(list(talk.say("and " * 100))) <= 5
    assert talk.saw.left_out > 0
    assert talk.saw.tokens == result.config.seq_len - 5
    answers = iter(["which cat", ""])
    monkeypatch.setattr("builtins.input", lambda words: next(answers))
    assert main(["chat", str(result.folder), "--tokens", "3", "--model", "NewLLM tuned"]) == 0
    said = capsys.readouterr().out
    assert "NewLLM tuned. An empty line ends the chat.\nmodel: " in said
    assert "<user>which cat<end><system>)" in said
    assert (
        main(["export", str(result.folder), "--model", "GPT tuned", "--output", str(tmp_path / "exported")])
        == 0
    )
    card = (tmp_path / "exported" / "README.md").read_text(encoding="utf-8")
    assert f"Licence of the text: {LICENCES['grammar']}." in card
    for wrong, words in (({"temperature": -1}, "temperature: got -1"), ({"most": 0}, "tokens is 0")):
        with pytest.raises(ValueError, match=words):
            Chat(trained, **wrong)
    with pytest.raises(ValueError, match="chat: got a turn without text"):
        talk.say(" ")
    with pytest.raises(FileNotFoundError, match="holds no model 'LSTM tuned'; it has 'GPT tuned', "):
        result.load("LSTM tuned")


def test_dialogues_from_a_folder_are_a_demonstration_until_there_are_a_thousand_and_their_licence_is_said(
    tmp_path, small_text
):
    rows = [{"turns": [f"question {n} of {n * 7}", f"answer {n * 11} it is"]} for n in range(40)]
    (tmp_path / "talks.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    given = {"dataset": "dailydialog", "data_dir": str(tmp_path / "talks.jsonl"), "max_dialogues": 20}
    text = prepare_text(small("dialogue", tmp_path / "out", small_text, **given).resolved())
    assert text.is_demonstration
    assert text.notes[0].startswith("Licence of the dialogues: ")
    assert len(text.dialogues["train"]) == 20
    with pytest.raises(ValueError, match="holds lines of text and no dialogues"):
        prepare_text(
            small("dialogue", tmp_path / "out", small_text, **given | {"data_dir": str(small_text)}).resolved()
        )


def test_settings_that_cannot_be_are_one_sentence():
    with pytest.raises(
        ValueError, match=r"pretraining_dir: got a folder with pretraining 'embedded', which reads none; take"
    ):
        DialogueConfig(profile="smoke", pretraining_dir="somewhere").resolved()
    with pytest.raises(ValueError, match="vocab_size"):
        DialogueConfig(vocab_size=200)
