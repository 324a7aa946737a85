"""The integration study's text: epochs of as many batches as lie between two scores."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from bklm.data import Portions
from bklm.harness.text import StudyText
from bklm.harness.text import prepare_text as prepare_plain_text
from bklm.studies.integration.config import IntegrationConfig


@dataclass(frozen=True, eq=False)
class IntegrationText(StudyText):
    """A study's text in epochs of ``portion`` batches, wherever its passes end (0: whole passes), each scored on the first
    ``scored`` validation tokens."""

    # Many short trainings are scored often.
    scored_at_once: ClassVar[int] = 8
    portion: int = 0
    scored: int = 0

    def train_loader(self, seed: int) -> Any:
        loader = super().train_loader(seed)
        return Portions(loader, self.portion) if self.portion else loader

    def val_loader(self) -> Any:
        return self.search_val_loader(self.scored)

    def whole_val_loader(self) -> Any:
        """The whole split, for a model that is done."""
        return self.search_val_loader(0)


def prepare_text(config: IntegrationConfig) -> IntegrationText:
    """The text of a resolved config. Errors as ``bklm.harness.text.prepare_text``, and more scores than there are steps."""
    found = prepare_plain_text(config)
    own = {f.name: getattr(found, f.name) for f in dataclasses.fields(found)}
    text = IntegrationText(**own, scored=config.score_tokens)
    steps = len(text.train_loader(0)) * config.epochs
    if 0 < config.score_tokens <= config.seq_len:
        raise ValueError(
            f"score_tokens: got {config.score_tokens}, but a window has {config.seq_len} (seq_len); take more than that, or 0 "
            "for the whole validation split."
        )
    if config.scores > steps:
        raise ValueError(
            f"scores: got {config.scores}, but a training has {steps} steps; take that many or fewer."
        )
    return text
