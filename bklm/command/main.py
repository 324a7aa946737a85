"""``bklm`` on the command line, also ``python -m bklm``: which command, with which words. Help imports nothing heavy."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from bklm import __version__
from bklm.command.completion import SHELLS, completion
from bklm.studies import STUDIES

STOPPED = "Stopped. What was finished is kept; the same command goes on from there."
RUN_HELP = "a run's zip or folder, such as results/baseline.zip"
# Their words are read by parsers of their own, --help included.
PASSED_ON = ("run", "batch")


def parser() -> argparse.ArgumentParser:
    """The parser of everything but the words behind ``run`` and ``batch``."""
    main = argparse.ArgumentParser(
        prog="bklm",
        description="O(N) language models around the BK-core: run the studies, and use what they trained.",
        epilog="bklm COMMAND --help says more. First steps: bklm selftest; bklm run 1 --profile smoke --dataset embedded; "
        'bklm generate results/grad_blend.zip --prompt "The statement".',
    )
    main.add_argument("--version", action="version", version=f"bklm {__version__}")
    main.add_argument(
        "--print-completion", choices=SHELLS, metavar="|".join(SHELLS),
        help='completion for a shell: eval "$(bklm --print-completion bash)"',
    )  # fmt: skip
    commands = main.add_subparsers(dest="command", metavar="COMMAND")

    def add(name: str, words: str, *arguments: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=words, description=words, add_help=name not in PASSED_ON)
        for argument in arguments:
            made.add_argument(argument, help=RUN_HELP if argument == "run" else None)
        if "run" in arguments:
            made.add_argument("--model", help="one of the run's models; without it the best one")
        return made

    add("run", f"run a study, by name or number: {numbered()}")
    add("batch", "run many notebooks with many parameter sets, from a YAML file")
    made = add("generate", "let a trained model continue a text", "run")
    made.add_argument("--prompt", required=True, help="the beginning")
    made.add_argument("--tokens", type=int, default=50, help="how many tokens more (default 50)")
    made.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest each time (default 0.8)")
    made.add_argument("--seed", type=int, default=0, help="the same seed writes the same text (default 0)")
    made = add("score", "perplexity of a trained model on a text", "run")
    made.add_argument("file", help="a text file, or a text in quotes")
    made = add("features", "potential and resolvent of every word and layer, as a table and a figure", "run")
    made.add_argument("text", help="a sentence in quotes")
    made.add_argument("--figure", type=Path, default=Path("features.png"), help="where (default features.png)")
    made.add_argument("--csv", type=Path, help="write the table there instead of printing it")
    made = add("chat", "talk with a model of dialogues: its replies token by token, and what it saw", "run")
    made.add_argument("--tokens", type=int, default=60, help="most tokens of a reply (default 60)")
    made.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest each time (default 0.8)")
    made.add_argument(
        "--seed", type=int, default=0, help="the same seed and turns, the same replies (default 0)"
    )
    made = add("export", "write a trained model for another library", "run")
    made.add_argument("--format", choices=("transformers",), default="transformers")
    made.add_argument("--output", type=Path, required=True, help="a folder that is empty or new")
    made.add_argument("--push", metavar="USER/NAME", help="upload it to the Hugging Face hub (token: HF_TOKEN)")
    made = add("report", "say what a run found, and where its page is")
    made.add_argument("run", help=RUN_HELP)
    made.add_argument("--open", action="store_true", help="open the page in a browser")
    add("selftest", "is the operator right on this machine, and how long will the studies take")
    made = add(
        "lab", "open JupyterLab on the notebooks, with results/ in sight; installs it where it is missing"
    )
    made.add_argument("--no-browser", action="store_true", help="only say the address")
    return main


def numbered() -> str:
    """ "1 grad_blend, 2 precision, ...": as the notebooks are numbered."""
    return ", ".join(f"{number} {name}" for number, name in enumerate(STUDIES, 1))


def study_of(word: str) -> str:
    """The study of a name, or of the number of its notebook ("1", "01").

    Raises:
        ValueError: there is none.
    """
    names = list(STUDIES)
    if word in names:
        return word
    if word.isdecimal() and 1 <= int(word) <= len(names):
        return names[int(word) - 1]
    raise ValueError(f"run: got {word!r}; allowed is one of {numbered()}.")


def main(words: Sequence[str] | None = None) -> int:
    """One command; the exit code: 0, 2 for what a user can mend, 130 for Ctrl-C."""
    words = list(sys.argv[1:] if words is None else words)
    try:
        if words and words[0] in PASSED_ON:
            return _pass_on(words[0], words[1:])
        given = parser().parse_args(words)
        if given.print_completion:
            print(completion(given.print_completion, parser()))
        elif given.command is None:
            parser().print_help()
        else:
            if given.command == "selftest":
                print("Loading PyTorch and the package: some ten seconds ...", file=sys.stderr, flush=True)
            # torch comes with it.
            from bklm.command import actions

            getattr(actions, given.command)(given)
    except KeyboardInterrupt:
        print(STOPPED, file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever reads the output has seen enough: bklm features ... | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, RuntimeError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


def _pass_on(command: str, words: list[str]) -> int:
    if command == "batch":
        from bklm.batch.__main__ import main as batch

        return batch(words, prog="bklm batch")
    if not words or words[0] in ("-h", "--help"):
        print(
            f"usage: bklm run STUDY [settings]\n\nSTUDY: {numbered()}\n\nbklm run STUDY --help lists its settings."
        )
        return 0 if words else 2
    name = study_of(words[0])
    from bklm import studies
    from bklm.harness import cli

    cli.main(getattr(studies, f"{STUDIES[name]}Config"), words[1:], prog=f"bklm run {name}")
    return 0


def start() -> None:
    """The console script."""
    # A shell's background job starts with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
