"""The command line of every study, generated from its config: ``python -m bklm.studies.grad_blend --profile smoke``."""

from __future__ import annotations

import dataclasses
import importlib
import os
import signal
import sys
import typing
from types import ModuleType
from typing import Annotated

import tyro

from bklm.harness.config import StudyConfig
from bklm.harness.fields import FieldSpec
from bklm.harness.values import as_typed, is_empty


def parse(
    config_class: type[StudyConfig], words: list[str] | None = None, prog: str | None = None
) -> StudyConfig:
    """The config that the command line's words describe; exits with one sentence for a bad value."""
    hints = typing.get_type_hints(config_class)
    flags = dataclasses.make_dataclass(
        config_class.__name__,
        [
            (
                spec.name,
                Annotated[
                    hints[spec.name],
                    tyro.conf.arg(help=_help(spec), help_behavior_hint=_default(config_class, spec)),
                ],
                dataclasses.field(default=spec.default),
            )
            for spec in config_class.specs()
        ],
    )
    given = tyro.cli(
        # --lowercase False, as the other fields, and as manifests record it.
        tyro.conf.FlagConversionOff[flags],
        args=words,
        prog=prog or f"python -m {config_class.package()}",
        description=config_class.__doc__,
        use_underscores=True,
    )
    return config_class(**{name: getattr(given, name) for name in config_class.names()})


def _help(spec: FieldSpec) -> str:
    bounded = (spec.low, spec.high, spec.above) != (None, None, None)
    return f"{spec.help} ({spec.allowed()})" if bounded else spec.help


def _default(config_class: type[StudyConfig], spec: FieldSpec) -> str:
    """What a setting is where nothing is given: one value, or each profile's or protocol's."""
    if not is_empty(spec.default):
        return f"(default: {as_typed(spec.default)})"
    for values in (config_class.protocols, config_class.profiles):
        if given := {name: as_typed(v[spec.name]) for name, v in values.items() if spec.name in v}:
            # A list is typed with blanks.
            words = (f"{name} {value.replace(', ', ' ') or 'none'}" for name, value in given.items())
            return f"(default: {', '.join(words)})"
    return "(default: none)"


def _duration(config: StudyConfig, study: ModuleType) -> str:
    """How long a resolved config takes here, in one sentence."""
    # Not imported where no study runs: torch comes with them.
    from bklm.harness.estimate import duration_in_words
    from bklm.harness.launch import spoils_a_launch

    if spoils_a_launch(config):
        # An estimate takes steps on the device, and CUDA that is in use here does not survive the fork.
        return f"How long {config.processes} processes on GPUs take is not estimated; the same command with 1 tells for one."
    return f"Takes {duration_in_words(study.estimated_minutes(config))} on this machine, less what is done already."


def main(config_class: type[StudyConfig], words: list[str] | None = None, prog: str | None = None) -> None:
    """Parse, run, show. What a user can mend ends in one sentence and exit code 2; the traceback is in run.log.

    The module ``run`` beside the config's own holds ``run_STUDY``; it, and torch with it, is imported when the words are
    known to be right.
    """
    # A notebook's kernel and a shell's background job start their children with SIGINT ignored; Stop needs it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        config = parse(config_class, words, prog).resolved()
        study = importlib.import_module(f"{config_class.package()}.run")
        if config.profile != "smoke" and os.environ.get("RANK", "0") == "0":
            print(_duration(config, study), file=sys.stderr, flush=True)
        # The processes of a launch that are not the main one have no result.
        if (result := getattr(study, f"run_{config.study}")(config)) is not None:
            result.show()
    except KeyboardInterrupt:
        sys.exit("Stopped. What was finished is kept; the same command goes on from there.")
    except (ValueError, OSError, RuntimeError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
