#!/usr/bin/env bash
# tokenizers 0.23.3: a BPE without an unknown token leaves out what it cannot write, and its perplexity is better for it
#
# Source: tokenizers.models.BPE, whose unk_token is optional, and Tokenizer.encode.
# Expected: a text with characters that training never saw is refused where there is no token for them, as WordLevel and Unigram
#   refuse it ("Missing [UNK] token", "unknown token but unk_id is missing").
# Seen: the characters vanish: "xyz" gives no token at all and "axb" the tokens of "ab", with nothing said. Byte-level pieces do the
#   same unless initial_alphabet is given, for only the bytes of the training text are in the vocabulary: Chinese text in a model
#   of English becomes the empty text, whose perplexity per character is 1.
# bklm: its BPE is trained with all 256 bytes, and its character vocabulary has an unknown token (bklm/data/bpe.py, units.py).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env" || { echo "cannot tell: no virtual environment can be made" && exit 2; }
"$folder/env/bin/pip" install --quiet tokenizers==0.23.3 ||
    { echo "cannot tell: the packages could not be installed" && exit 2; }
"$folder/env/bin/python" - <<'PY'
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEXT = ["abc abd abc aab"] * 5


def trained(model, trainer, pieces):
    made = Tokenizer(model)
    made.pre_tokenizer = pieces
    made.train_from_iterator(TEXT, trainer)
    return made


words = pre_tokenizers.WhitespaceSplit()
bpe = trained(models.BPE(), trainers.BpeTrainer(vocab_size=20, show_progress=False), words)
for text in ("abc xyz", "axb"):
    print(f"BPE: {text!r} gives {bpe.encode(text).tokens}")
assert bpe.encode("xyz").tokens == []
assert bpe.encode("axb").tokens == bpe.encode("ab").tokens
for model, trainer in (
    (models.WordLevel(), trainers.WordLevelTrainer(vocab_size=20, show_progress=False)),
    (models.Unigram(), trainers.UnigramTrainer(vocab_size=20, show_progress=False)),
):
    try:
        trained(model, trainer, words).encode("abc xyz")
        raise SystemExit(f"{model} no longer refuses what it cannot write")
    except Exception as error:
        print(f"{type(model).__name__}: refuses it ({error})")
by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
for alphabet, kept in (([], 0), (by_bytes.alphabet(), 6)):
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokens = trained(models.BPE(), trainer, by_bytes).encode("\u6f22\u5b57").tokens
    print(f"byte-level with an initial alphabet of {len(alphabet)}: two Chinese characters give {len(tokens)} tokens")
    assert len(tokens) == kept
print("As described above.")
PY
