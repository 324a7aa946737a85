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
cat >"$folder/notebook.ipynb" <<'NOTEBOOK'
{"cells": [{"cell_type": "code", "execution_count": null, "id": "a", "metadata": {"tags": ["parameters"]}, "outputs": [],
  "source": "revision = ''"}],
 "metadata": {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}, "nbformat": 4, "nbformat_minor": 5}
NOTEBOOK
give() { # the line that papermill writes into the notebook for a value
    "$folder/env/bin/papermill" --log-level ERROR --prepare-only "$@" "$folder/notebook.ipynb" "$folder/written.ipynb" 2>/dev/null
    "$folder/env/bin/python" -c 'import json, sys
cells = json.load(open(sys.argv[1]))["cells"]
print(next("".join(c["source"]) for c in cells if "injected-parameters" in c["metadata"].get("tags", [])).splitlines()[-1])
' "$folder/written.ipynb"
}
failed=0
check() { # flag, value, what is written for it
    seen=$(give "$1" revision "$2")
    echo "$1 revision $2 writes $seen"
    [ "$seen" = "revision = $3" ] || failed=1
}
check -p 4e12345 "float('inf')"
check -p 7e10 "70000000000.0"
check -p None "None"
check -p nan "float('nan')"
check -p 1_000 "1000"
check -p 010 "10"
check -p yes '"yes"'
check -p 4e1234f '"4e1234f"'
check -r 4e12345 '"4e12345"'
[ "$failed" = 0 ] || { echo "another behaviour than described above" && exit 1; }
echo "As described above."
