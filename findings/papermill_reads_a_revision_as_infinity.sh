#!/usr/bin/env bash
# papermill 2.7.0: -p gives a notebook infinity where a revision was meant, None where a name was
#
# Source: papermill's command line, "-p, --parameters: parameters to pass to the parameters cell".
# Expected: a value that is no plain number, True or False is text, as the shell passed it.
# Seen: whatever Python's int() or float() takes is a number, and "None" is None. The short Git revision 4e12345 becomes infinity,
#   7e10 the number 70000000000.0, the name nan a NaN, 1_000 the number 1000, 010 ten. The notebook runs with them; -r passes text.
# bklm: a study's settings have types, and a value of another one is refused before work starts (bklm/harness/config.py).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env" || { echo "cannot tell: no virtual environment can be made" && exit 2; }
"$folder/env/bin/pip" install --quiet papermill==2.7.0 ||
    { echo "cannot tell: the packages could not be installed" && exit 2; }
"$folder/env/bin/python" - <<'PY'
from papermill.cli import _resolve_type
from papermill.translators import PythonTranslator

given = ["4e12345", "7e10", "None", "nan", "1_000", "010", "yes", "4e1234f"]
found = {word: PythonTranslator.translate(_resolve_type(word)) for word in given}
for word, code in found.items():
    print(f"-p name {word} writes name = {code}")
assert found == {
    "4e12345": "float('inf')",
    "7e10": "70000000000.0",
    "None": "None",
    "nan": "float('nan')",
    "1_000": "1000",
    "010": "10",
    "yes": '"yes"',
    "4e1234f": '"4e1234f"',
}
print("As described above.")
PY
