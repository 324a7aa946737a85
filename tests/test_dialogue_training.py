"""Training on replies: their loss alone counts, weights of another vocabulary are refused, measures are what they say."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from bklm.data import load_corpus
from bklm.data.dialogue_tokens import DialogueVocabulary
from bklm.data.dialogue_windows import dialogue_rows
from bklm.data.grammar import grammar_corpus
from bklm.data.loaders import make_loader
from bklm.models import GPT, GPTConfig, NewLLM, NewLLMConfig, ResNetBK, ResNetBKConfig
from bklm.studies import DialogueConfig
from bklm.studies.dialogue.models import builders
from bklm.training.dialogues import (
    Reply,
    bits_per_byte,
    describe_replies,
    loss_by_context,
    recalled_facts,
    reply_tokens,
    write_replies,
)
from bklm.training.loop import train
from bklm.training.processes import make_accelerator
from bklm.training.schedules import TrainingSettings
from bklm.training.weights import OtherModelError, load_weights, save_weights

MODELS = {
    "NewLLM": lambda size: NewLLM(NewLLMConfig(size, 16, 16, 16, 1)),
    "ResNetBK": lambda size: ResNetBK(
        ResNetBKConfig(size, 16, 1, None, mixer="solve", num_experts=1, n_heads=2)
    ),
    "GPT": lambda size: GPT(GPTConfig(size, 16, 1, 2, 96)),
}


@pytest.fixture(scope="module")
def corpus():
    return grammar_corpus(sizes={"train": 40, "valid": 6, "test": 6})


@pytest.fixture(scope="module")
def vocabulary(corpus):
    return DialogueVocabulary.train(corpus.train, 300)


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_is_the_sum_over_reply_positions_and_no_other_target_has_a_gradient(name, corpus, vocabulary):
    encoded = vocabulary.encode_dialogues(corpus.dialogues("valid"))
    rows = dialogue_rows(encoded, 90, vocabulary.pad_id, vocabulary.user_id)
    x, y = rows.__getitems__([0, 3, 5])
    model = MODELS[name](len(vocabulary)).double().eval()
    is_reply = torch.zeros_like(x, dtype=torch.bool)
    for row, index in enumerate([0, 3, 5]):
        speaking = None
        for place, token in enumerate(rows.rows[index][0][:-1].tolist()):
            speaking = token if token in (vocabulary.user_id, vocabulary.system_id) else speaking
            speaking = None if token == vocabulary.end_id else speaking
            is_reply[row, place] = speaking == vocabulary.system_id
    following = torch.cat([x[:, 1:], y[:, -1:].clamp(min=0)], 1)
    following = torch.where(y >= 0, y, following)  # the last token of the longest row is no input
    by_hand = model.token_losses(x, following).nll[is_reply].sum()
    assert model.loss(x, y, reduction="sum").item() == pytest.approx(by_hand.item(), abs=1e-6)
    logits = model(x).detach().requires_grad_()
    F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum").backward()
    assert not logits.grad[~is_reply].any()
    assert logits.grad[is_reply].any(-1).all()


def test_weights_of_another_vocabulary_are_refused(tmp_path, corpus, vocabulary):
    model = MODELS["GPT"](len(vocabulary))
    save_weights(model, tmp_path / "w.safetensors", vocabulary.sha256)
    other = DialogueVocabulary.train(["zebra zigzag " * 200, *corpus.train], 300)
    assert len(other) == len(vocabulary)
    fresh = MODELS["GPT"](len(vocabulary))
    before = {k: v.clone() for k, v in fresh.state_dict().items()}
    with pytest.raises(
        OtherModelError, match=r"holds weights of another vocabulary \(.*\), whose ids mean other words; take"
    ):
        load_weights(fresh, tmp_path / "w.safetensors", other.sha256)
    assert all(torch.equal(v, before[k]) for k, v in fresh.state_dict().items())
    load_weights(fresh, tmp_path / "w.safetensors", vocabulary.sha256)
    save_weights(model, tmp_path / "unnamed.safetensors")
    with pytest.raises(OtherModelError, match="none that it names there"):
        load_weights(fresh, tmp_path / "unnamed.safetensors", vocabulary.sha256)


class Oracle(GPT):
    """Knows the grammar: of every fact the value."""

    def __init__(self, vocabulary, right):
        super().__init__(GPTConfig(len(vocabulary), 8, 1, 2, 200))
        self.right = right

    def token_losses(self, input_ids, targets):
        found = super().token_losses(input_ids, targets)
        return found._replace(correct=(targets >= 0) & self.right)


def test_facts_are_counted_by_their_distance(corpus, vocabulary):
    for right in (True, False):
        found = recalled_facts(Oracle(vocabulary, right), vocabulary, corpus.asked_at(4), 200)
        assert found == {str(k): [4 * right, 4] for k in range(1, 9)}


def test_the_loss_behind_a_context_is_that_of_each_reply_read_alone(corpus, vocabulary):
    dialogues = corpus.dialogues("valid")[:2]
    model = MODELS["ResNetBK"](len(vocabulary)).double()
    losses = loss_by_context(model, vocabulary.encode_dialogues(dialogues), 200, vocabulary.pad_id)
    sums, count = dict.fromkeys(losses, 0.0), 0
    for own, other in (dialogues, dialogues[::-1]):
        turns, theirs = vocabulary.encode_turns(own), vocabulary.encode_turns(other)
        for place in range(1, len(turns), 2):
            before = {"0": [], "1": turns[place - 1 : place], "3": turns[max(0, place - 3) : place], "all": turns[:place],
                      "other": theirs[:place], "1 after other": [*theirs[: place - 1], turns[place - 1]]}  # fmt: skip
            count += len(turns[place]) - 1
            for name, some in before.items():
                ids = torch.from_numpy(np.concatenate([*some, turns[place]]).astype(np.int64))[None]
                nll = model.eval().token_losses(ids[:, :-1], ids[:, 1:]).nll
                sums[name] += float(nll[0, 1 - len(turns[place]) :].sum())
    assert losses == pytest.approx({name: total / count for name, total in sums.items()})


def test_a_reply_is_written_token_by_token_to_its_end_and_never_beyond_the_models_positions(corpus, vocabulary):
    dialogues = corpus.dialogues("valid")
    model = MODELS["GPT"](len(vocabulary))
    before = np.concatenate(vocabulary.encode_turns(dialogues[0]))
    generator = torch.Generator().manual_seed(0)
    ids = list(reply_tokens(model, vocabulary, np.tile(before, 3), 40, 1.0, generator))
    assert 1 <= len(ids) <= 40
    # Whoever has no limit reads as much as who has, where that is asked for.
    other, long = MODELS["ResNetBK"](len(vocabulary)), np.tile(before, 3)
    some = [
        list(reply_tokens(other, vocabulary, context, 40, 0.0, generator, positions))
        for context, positions in ((long, 96), (long[-(96 - 40 - 1) :], None))
    ]
    assert some[0] == some[1]
    with torch.no_grad():
        # The end is what it always writes.
        model.embedding.weight.zero_()
        model.embedding.weight[vocabulary.end_id] = 1
        model.norm.bias.fill_(1)
    assert list(reply_tokens(model, vocabulary, before, 40, 0.0, generator)) == [vocabulary.end_id]
    replies = write_replies(model, vocabulary, dialogues[:2], 5, temperature=0.0)
    assert [(r.written, r.ended) for r in replies] == [("", True)] * 2
    assert replies[0].prompt == dialogues[0][-2][1]
    assert replies[0].target == dialogues[0][-1][1]


def test_measures_of_replies_are_those_of_a_small_example():
    replies = [Reply("my cat is red", "x", "my cat is blue", True), Reply("where is it", "x", "no idea", False)]
    assert describe_replies(replies) == {
        "distinct_1": 1.0, "distinct_2": 1.0, "repeats_prompt": 0.5, "ended": 0.5, "words": 3.0,
    }  # fmt: skip
    assert describe_replies([Reply("a", "x", "b b b b", True)])["distinct_2"] == pytest.approx(1 / 3)
    assert bits_per_byte(math.log(2) * 12, 4) == pytest.approx(3)


@pytest.mark.slow
def test_the_budget_of_profile_quick_is_enough_to_learn_to_look_facts_up():
    config = DialogueConfig(profile="quick").resolved()
    sizes = {"train": config.max_dialogues, "valid": 100, "test": 1}
    corpus = grammar_corpus(sizes=sizes)
    prose = load_corpus(config.pretraining).train[:20_000]
    vocabulary = DialogueVocabulary.train([*corpus.train[:4000], *prose], config.vocab_size)
    encoded = {split: vocabulary.encode_dialogues(corpus.dialogues(split)) for split in ("train", "valid")}
    rows = {
        split: dialogue_rows(found, config.seq_len, vocabulary.pad_id, vocabulary.user_id)
        for split, found in encoded.items()
    }
    torch.manual_seed(0)
    model = builders(config)["GPT"](len(vocabulary))
    settings = TrainingSettings(
        config.epochs, config.learning_rates[0], config.weight_decay, config.clip, config.schedule
    )
    batches = make_loader(rows["train"], config.batch_size, shuffle=True), make_loader(rows["valid"], 50)
    loss = train(model, *batches, settings, accelerator=make_accelerator("cpu", "fp32"))[-1].val_loss
    law = {n: corpus.reply_nats("valid", n).sum() / rows["valid"].num_targets for n in (0, 1, None)}
    # Nobody is better than the law by more than a sample's chance; who looks facts up is better than who reads the last turn.
    assert law[None] - 0.02 < loss < law[1]
    losses = loss_by_context(model, encoded["valid"], config.seq_len, vocabulary.pad_id)
    assert losses["all"] == pytest.approx(loss, abs=1e-3)
    assert losses["0"] > law[0] - 0.05
    assert losses["1 after other"] > losses["all"] + 0.1
    found = recalled_facts(model, vocabulary, corpus.asked_at(100), config.seq_len)
    chance = 1 / corpus.grammar.values
    # Four standard deviations above chance, at every distance.
    least = chance + 4 * math.sqrt(chance * (1 - chance) / 100)
    assert {k: right / asked for k, (right, asked) in found.items() if right / asked <= least} == {}
