#!/usr/bin/env bash
# lm_eval 0.4.13: word_perplexity of WikiText counts words that are not there, two for each document
#
# Source: the task "wikitext" of lm-evaluation-harness, whose word_perplexity is exp(-log-likelihood / words), "words" being what
#   white space separates in the original page.
# Expected: " = Title = \n", as every line of WikiText begins and ends, has 3 words, as str.split and wc -w count.
# Seen: 5. The page is cut with re.split, which returns an empty text before the first and after the last white space. For pages
#   of thousands of words that is nothing; with a line a document, as data sets of lines give them, a perplexity of 100 per word
#   over lines of 3 words reads 15.8, and of 20 words 65.8. Stripping the lines first changes the number and no prediction.
# bklm: its perplexities are per token, with the number of tokens beside them (docs/numbers.md compares).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env" || { echo "cannot tell: no virtual environment can be made" && exit 2; }
"$folder/env/bin/pip" install --quiet --no-deps lm_eval==0.4.13 ||
    { echo "cannot tell: the packages could not be installed" && exit 2; }
"$folder/env/bin/python" - <<'PY'
import importlib.util
import math
import sysconfig

path = sysconfig.get_path("purelib") + "/lm_eval/tasks/wikitext/preprocess_wikitext.py"
found = importlib.util.spec_from_file_location("preprocess_wikitext", path)
task = importlib.util.module_from_spec(found)
found.loader.exec_module(task)
for page, counted in ((" = Title = \n", 5), ("= Title =", 3), (" " + "word " * 20 + "\n", 22)):
    words = len(page.split())
    log_likelihood, divisor = task.process_results({"page": page}, (-words * math.log(100),))["word_perplexity"]
    reads = math.exp(-log_likelihood / divisor)
    print(f"{words} words with a perplexity of 100: counted as {divisor}, which reads {reads:.1f}")
    assert divisor == counted
    assert abs(reads - 100 ** (words / counted)) < 1e-6
print("As described above.")
PY
