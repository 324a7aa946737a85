"""The models of the compression study: three kinds, smaller ones from scratch, retrained ones and students."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bklm.compression import CannotServeError, Distilled, PrunedModel, RoundedModel, baked, narrower, quantise
from bklm.compression.gating import GatedBlocks
from bklm.compression.saving import save_compressed, sizes_of
from bklm.compression.sized import MOST_ZEROS, sparsity_of_size
from bklm.files.atomic import read_result
from bklm.harness.arms import WEIGHTS, Arm
from bklm.harness.session import place_of as place_of_trial
from bklm.models import LanguageModel, NewLLM, NewLLMConfig, ResNetBK, ResNetBKConfig
from bklm.studies.compression.config import CompressionConfig
from bklm.training.context_gain import measure_context_gain
from bklm.training.evaluation import evaluate, without_padding
from bklm.training.non_finite import NonFiniteError
from bklm.training.weights import load_weights

EXPERTS = "ResNetBK with experts"
BY_NAME = {"resnet_bk": ("ResNetBK",), "newllm": ("NewLLM",), "all": ("ResNetBK", "NewLLM", EXPERTS)}
GROUP = 32  # inputs that share a scale, in training
MORE, GRADUAL, RANDOM = "more steps", "zeros, gradual", "zeros at random, retrained"
AS_SMALL = "zeros in all, gradual, as small as"
GATED, CHANCE = "positions kept by a gate", "positions kept by chance"
SCRATCH = "from scratch"
ROUNDED = f"bits in training, groups of {GROUP}"
GAIN_TOKENS = 8192
FILES = "files"  # folder of compressed models of one seed
INT8 = "int8"


def percent(share: float) -> str:
    """ "75%", and "75.4%" where it is that: two shares that a study tells apart have two names."""
    return f"{100 * share:g}%"


def families(config: CompressionConfig) -> tuple[str, ...]:
    """The models that are compressed."""
    return BY_NAME[config.models]


def family_of(arm: str) -> str:
    """The model that an arm comes from: "NewLLM" of "NewLLM, width 0.5: int8"."""
    return arm.partition(":")[0].partition(",")[0]


def smaller(config: CompressionConfig, family: str) -> dict[str, dict[str, Any]]:
    """What is changed in a model's configuration for smaller ones from scratch, by what follows the family's name in theirs.

    Those without a narrower width are as a model is after parts of it were removed.
    """
    half = config.n_layers // 2
    if family == EXPERTS:
        return {f"{half_of_experts(config)} experts {SCRATCH}": {"experts": half_of_experts(config)}}
    found: dict[str, dict[str, Any]] = {f"width {width:g}": {"width": width} for width in config.widths}
    if half and family != "NewLLM":
        width = config.widths[0]
        found[f"width {width:g}, {half} of {config.n_layers} layers"] = {"width": width, "layers": half}
        found[f"{half} of {config.n_layers} layers {SCRATCH}"] = {"layers": half}
    return found


def half_of_experts(config: CompressionConfig) -> int:
    """With one expert a block is of another kind."""
    return max(2, config.num_experts // 2)


def build(
    config: CompressionConfig, family: str, vocabulary: int, width: float = 1.0, layers: int | None = None,
    experts: int | None = None,
) -> LanguageModel:  # fmt: skip
    """An untrained model, or a smaller one of its kind."""
    d, p = config.d_model, config.dropout
    if family == "NewLLM":
        made: Any = NewLLMConfig(vocabulary, d, 2 * d, d, layers or config.n_layers, p)
    else:
        made = ResNetBKConfig(
            vocabulary, d, layers or config.n_layers, mixer="solve", n_heads=math.gcd(config.n_heads, d), dropout_p=p,
            num_experts=(experts or config.num_experts) if family == EXPERTS else 1,
        )  # fmt: skip
    made = made if width == 1.0 else narrower(made, width)
    return NewLLM(made) if family == "NewLLM" else ResNetBK(made)


def first_arms(config: CompressionConfig) -> dict[str, Arm]:
    """What is trained first: the models, and smaller ones from scratch."""
    arms = {}
    for family in families(config):
        sizes = {family: {}} | {f"{family}, {name}": size for name, size in smaller(config, family).items()}
        for name, size in sizes.items():
            arms[name] = Arm(
                lambda vocabulary, family=family, size=size: build(config, family, vocabulary, **size)
            )
    return arms


def _trained(folder: Path, arm: str, seed: int) -> tuple[Path, dict[str, Any]]:
    """Folder and record of a finished first training; without a perplexity where it diverged."""
    place = Path(folder) / "trials" / place_of_trial({"arm": arm, "seed": seed})
    record = read_result(place / "result.json", {"val_ppl": float | None})
    if record is None or (record["val_ppl"] is not None and not (place / WEIGHTS).exists()):
        raise FileNotFoundError(f"{place} holds no finished model; run the study (again) to its end first.")
    return place, record


def load_model(folder: Path, config: CompressionConfig, arm: str, seed: int) -> LanguageModel:
    """A model of ``first_arms``, trained; on the CPU, in evaluation mode.

    Raises:
        FileNotFoundError: it was not trained yet. NonFiniteError: it diverged, and what goes on from it is lost with it.
    """
    place, record = _trained(folder, arm, seed)
    if record["val_ppl"] is None:
        raise NonFiniteError(f"{arm}, seed {seed}: its first training diverged")
    model = first_arms(config)[arm].build(record["vocabulary"])
    load_weights(model, place / WEIGHTS)
    return model.eval()


def kept_seed(folder: Path, config: CompressionConfig, arm: str) -> int | None:
    """The seed whose files of an arm are kept: the first one whose model did not diverge; None where all did."""
    return next((s for s in config.seeds if _trained(folder, arm, s)[1]["val_ppl"] is not None), None)


def retrained_arms(config: CompressionConfig, folder: Path, steps: int) -> dict[str, Arm]:
    """Arms that go on from a trained model of their seed for as many steps each, one of them uncompressed.

    A head tied in training is none of them: it begins at a loss that so few steps do not repair.
    """
    arms = {}
    bits, sparsity = min(config.bits), config.trained_sparsity
    narrow = f"width {config.widths[0]:g}"
    # The last quarter of the steps is for what is left to settle.
    pruning = max(1, steps * 3 // 4)
    for family in families(config):
        if family == EXPERTS:
            continue

        def start(change: Callable[[LanguageModel], LanguageModel], source: str = family) -> Callable:
            # An arm's seed is what torch's generator was seeded with before it is built.
            return lambda vocabulary: change(load_model(folder, config, source, torch.initial_seed()))

        def named(arm: str, made: Callable) -> Callable:
            return lambda vocabulary: _named(made(vocabulary), arm)

        def as_small(model: LanguageModel, family: str = family) -> LanguageModel:
            dense = load_model(folder, config, f"{family}, {narrow}", torch.initial_seed())
            try:
                wanted = sparsity_of_size(model, sizes(quantise(dense))["file_bytes"])
            except CannotServeError:
                # Of a tiny file most is no weight: then as many zeros as leave something, and no verdict at equal bytes.
                wanted = MOST_ZEROS
            return PrunedModel(model, wanted, pruning, scope="all")

        changes = {
            MORE: lambda model: model,
            f"{bits} {ROUNDED}": lambda model: RoundedModel(model, bits, GROUP),
            f"{percent(sparsity)} {GRADUAL}": lambda model: PrunedModel(model, sparsity, pruning),
            f"{percent(sparsity)} {RANDOM}": lambda model: PrunedModel(
                model, sparsity, pruning, seed=torch.initial_seed()
            ),
            f"{AS_SMALL} {narrow}": as_small,
        }
        against = {f"{percent(sparsity)} {GRADUAL}": f"{percent(sparsity)} {RANDOM}"}
        if family != "NewLLM":
            # Half of a block's positions: of NewLLM each layer needs the one before.
            changes[GATED] = GatedBlocks
            changes[CHANCE] = lambda model: GatedBlocks(model, seed=torch.initial_seed())
            against[GATED] = CHANCE
        for name, change in changes.items():
            rivals = (against[name], MORE) if name in against else (MORE,) if name != MORE else ()
            controls = tuple(f"{family}, {rival}" for rival in rivals)
            arm = f"{family}, {name}"
            arms[arm] = Arm(named(arm, start(change)), controls, kept=False)
        # A dense model of as many bytes as those zeros leave, after as many steps.
        arm = f"{family}, {narrow}, {MORE}"
        arms[arm] = Arm(named(arm, start(lambda model: model, f"{family}, {narrow}")), kept=False)
    return arms


def _named(model: LanguageModel, arm: str) -> LanguageModel:
    """The model, knowing its arm and the seed that torch's generator was seeded with: what is kept of it goes by these."""
    model.__dict__["arm"] = (arm, torch.initial_seed())
    return model


def student_arms(config: CompressionConfig, folder: Path) -> dict[str, Arm]:
    """Students with the first of the smaller widths, of a ResNetBK with half the layers, too; the control is the model of that
    size from the text alone."""
    arms = {}
    control = f"width {config.widths[0]:g}"
    # Half the layers at one temperature, the one in the middle.
    middle = config.temperatures[len(config.temperatures) // 2]
    for family in (f for f in families(config) if f != EXPERTS):
        sizes = {name: size for name, size in smaller(config, family).items() if name.startswith(control)}
        wanted = {f"student at T {t:g}": (t, control) for t in config.temperatures}
        for deeper in (name for name in sizes if name != control):
            wanted[f"student at T {middle:g}{deeper.removeprefix(control)}"] = (middle, deeper)
        for name, (temperature, like) in wanted.items():
            arm, size = f"{family}, {name}", sizes[like]

            def made(
                vocabulary: int, family: str = family, arm: str = arm, temperature: float = temperature, size: Any = size
            ) -> LanguageModel:  # fmt: skip
                seed = torch.initial_seed()
                # Drawn first, so that it begins with the weights of its control.
                student = build(config, family, vocabulary, **size)
                teacher = load_model(folder, config, family, seed)
                return _named(Distilled(student, teacher, temperature, config.teacher_weight), arm)

            arms[arm] = Arm(made, (f"{family}, {like}",), kept=False)
    return arms


def score(model: LanguageModel, text: Any, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Perplexity on the whole validation split, without <unk>, accuracy; the gain from context on GAIN_TOKENS of it."""
    found = evaluate(model.to(device), text.val_loader(), text.unk_id)
    return found.record() | gain_of(model, text)


def gain_of(model: LanguageModel, text: Any) -> dict[str, float | None]:
    some = text.search_val_loader(GAIN_TOKENS)
    gained = measure_context_gain(
        model, some, text.unk_id, windows_of=lambda n: None, window=text.seq_len, lengths=()
    )
    return {"context_gain": gained.gain}


def sizes(model: LanguageModel, save: Callable[..., Any] = save_compressed) -> dict[str, int]:
    """Bytes of a model's file, and of that file packed by zlib."""
    whole, packed = sizes_of(lambda place: save(model, place))
    return {"file_bytes": whole, "packed_file_bytes": packed}


def measured(study: Any) -> Callable[[LanguageModel], dict[str, Any]]:
    """What is recorded of a trained model: its file, and its file and perplexity in int8.

    The files of retrained models and students are kept of their model's ``kept_seed``: no other weights of theirs are.
    """
    text = study.text

    def found(model: LanguageModel) -> dict[str, Any]:
        device = next(model.parameters()).device
        plain = baked(model.model if isinstance(model, Distilled) else model)
        if isinstance(model, GatedBlocks):
            # No file holds its gates: what they skip is time, and the bytes of the blocks are those of a model without.
            whole = (
                rows for batch in text.search_val_loader(GAIN_TOKENS) for rows, _ in without_padding(*batch)
            )
            batches = [x.to(device) for x in whole]
            kept = sum(model.kept_share(x) * x.numel() for x in batches) / sum(x.numel() for x in batches)
            weighed = {"file_bytes": None, "packed_file_bytes": None, "int8": {}, "kept_share": kept}
            return {"vocabulary": text.vocab_size, **weighed, **gain_of(model, text)}
        arm, seed = model.__dict__.get("arm", (None, None))
        own = {"vocabulary": text.vocab_size, **sizes(plain), **gain_of(plain.to(device), text), "int8": {}}
        if not isinstance(model, RoundedModel):
            small = quantise(plain, 8)
            own["int8"] = {**sizes(small), **score(small, text, device)}
            arm, plain = arm and f"{arm}: {INT8}", small
        if study.is_main and arm and seed == kept_seed(study.folder, study.config, family_of(arm)):
            keep(study.folder, arm, plain.cpu())
        return own

    return found


NEEDED = {
    "vocabulary": int, "file_bytes": int | None, "packed_file_bytes": int | None, "context_gain": float | None,
    "int8": dict,
}  # fmt: skip


def place_of(folder: Path, arm: str) -> Path:
    """Where the file of an arm is kept."""
    return Path(folder) / FILES / f"{in_name(arm)}.safetensors"


def in_name(arm: str) -> str:
    """An arm as part of a file's name."""
    return re.sub("[^A-Za-z0-9.]+", "-", arm)


def keep(folder: Path, arm: str, model: LanguageModel) -> None:
    """Write the file of an arm into the study's folder."""
    place = place_of(folder, arm)
    place.parent.mkdir(exist_ok=True)
    save_compressed(model, place)
