"""Completion of the command line for a shell, written from the parser and from the studies' settings."""

from __future__ import annotations

import argparse

from bklm.studies import STUDIES, configs

SHELLS = ("bash", "zsh")


def completion(shell: str, parser: argparse.ArgumentParser) -> str:
    """A script for ``eval``: commands, studies, settings and their choices; anything else is completed as a path."""
    (commands,) = (a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    cases = {name: _flags(command) for name, command in commands.items()}
    lines = [
        'bklm_complete() {',
        '    local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" words=""',
        '    case "${COMP_WORDS[1]} ${COMP_WORDS[2]} $before" in',
    ]  # fmt: skip
    number = 0
    for number, config in enumerate(configs(), 1):
        for spec in config.specs():
            if spec.choices:
                known = f'"run "@({config.study}|{number}|0{number})" --{spec.name}"'
                lines.append(f'        {known}) words="{" ".join(spec.choices)}" ;;')
    for number, config in enumerate(configs(), 1):
        flags = " ".join(f"--{name}" for name in config.names())
        lines.append(f'        "run "@({config.study}|{number}|0{number})" "*) words="{flags}" ;;')
    lines += [
        f'        "run "*) words="{" ".join(STUDIES)}" ;;',
        *(f'        "{name} "*) words="{flags}" ;;' for name, flags in cases.items() if name != "run"),
        f'        *) words="{" ".join(commands)} {_flags(parser)}" ;;',
        "    esac",
        '    COMPREPLY=($(compgen -W "$words" -- "$word"))',
        "}",
        "complete -o default -F bklm_complete bklm",
    ]
    before = (
        ["shopt -s extglob"]
        if shell == "bash"
        else ["setopt kshglob", "autoload -U +X bashcompinit && bashcompinit"]
    )
    return "\n".join([*before, *lines])


def _flags(parser: argparse.ArgumentParser) -> str:
    return " ".join(option for action in parser._actions for option in action.option_strings)
