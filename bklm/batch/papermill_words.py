"""Check the words of ``colab_setup.sh run`` before papermill starts, and print the folder that the results go to.

python -m bklm.batch.papermill_words NOTEBOOK [papermill's words ...]

Papermill itself only warns of a parameter that the notebook does not have, and runs with the default. Exit code 2 and one
sentence when a word is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import papermill.cli

from bklm.batch.plan import check_parameters
from bklm.harness.config import StudyConfig
from bklm.notebook.form import form_of

OWN = "colab_setup.sh run"
ALLOWED = "allowed are -p NAME VALUE and the other options of python -m papermill --help"


def output_folder(notebook: Path, words: Sequence[str]) -> str:
    """Check papermill's ``words`` for ``notebook``; return the folder that the notebook will take for output_dir.

    Raises:
        ValueError: one sentence.
    """
    values = _parameters(notebook, words)
    given = {"output_dir": values.pop("output_dir", None)}
    check_parameters(notebook, values, OWN)
    try:
        # The notebook's own config reads the value the same way.
        return (form_of(notebook) or StudyConfig)(**given).output_dir
    except ValueError as error:
        raise ValueError(f"{OWN}: {error}") from None


def _parameters(notebook: Path, words: Sequence[str]) -> dict[str, Any]:
    """Papermill's words as its own parser reads them."""
    command = papermill.cli.papermill
    try:
        context = command.make_context("papermill", [str(notebook), "executed.ipynb", *words])
    except click.ClickException as error:
        said = " ".join(error.format_message().split()).rstrip(".")
        raise ValueError(f"{OWN}: {said}; {ALLOWED}.") from None
    except click.exceptions.Exit:
        raise ValueError(f"{OWN}: got --help or --version, which run nothing; {ALLOWED}.") from None
    given = context.params
    if given["prepare_only"]:
        raise ValueError(
            f"{OWN}: got --prepare-only, which runs nothing and leaves no results to zip; {ALLOWED}."
        )
    for source in ("parameters_file", "parameters_yaml", "parameters_base64"):
        if given[source]:
            raise ValueError(f"{OWN}: got --{source}; give parameters one by one: -p NAME VALUE.")
    resolved = {name: papermill.cli._resolve_type(value) for name, value in given["parameters"]}
    return resolved | dict(given["parameters_raw"])


def main(words: Sequence[str]) -> int:
    try:
        print(output_folder(Path(words[0]), words[1:]))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
