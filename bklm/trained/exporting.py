"""A trained model for another library: a folder that transformers loads, and its way to the Hugging Face hub."""

from __future__ import annotations

import importlib
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders

from bklm import __version__
from bklm.compression.activations import activations_of
from bklm.files.atomic import replacing, write_json, write_text
from bklm.harness.values import in_colab
from bklm.trained.card import model_card
from bklm.trained.model import Trained
from bklm.trained.run import make_own_folder

FORMATS = ("transformers",)
CODE = ("configuration_bklm.py", "modeling_bklm.py")
LONGEST = 1_000_000  # positions of a model that has any number of them


def export(trained: Trained, output: str | os.PathLike[str], format: str = "transformers") -> Path:
    """Write a model into a folder; transformers loads it with ``trust_remote_code=True`` where bklm is installed.

    The folder holds config.json, model.safetensors, the tokeniser, the code, and README.md, the model card.

    Raises:
        ValueError: an unknown format, a folder that holds other files, a model with int8 products.
    """
    if format not in FORMATS:
        raise ValueError(f"format: got {format!r}; allowed is one of {', '.join(map(repr, FORMATS))}.")
    if activations_of(trained.model) is not None:
        raise ValueError(
            f"export: {trained.name} multiplies in int8, which no other library knows of it; export the float model, or the "
            "one of quantise, whose products are float."
        )
    folder = Path(output).expanduser()
    is_ours = (folder / CODE[1]).exists()
    make_own_folder(folder, is_ours, "output")
    model = trained.model
    weights = {f"model.{name}": tensor.contiguous() for name, tensor in model.state_dict().items()}
    with replacing(folder / "model.safetensors") as temporary:
        save_file(weights, str(temporary), metadata={"format": "pt"})
    write_json(folder / "config.json", _config(trained))
    write_json(
        folder / "generation_config.json",
        {"do_sample": True, "temperature": 0.8, "top_k": 0, "use_cache": False},
    )
    _write_tokenizer(trained, folder)
    source = Path(__file__).with_name("transformers_files")
    for name in CODE:
        shutil.copyfile(source / name, folder / name)
    write_text(folder / "README.md", model_card(trained))
    return folder


def _config(trained: Trained) -> dict[str, Any]:
    model = trained.model
    settings = trained.record["model_config"]
    return {
        "model_type": "bklm",
        "architectures": ["BklmForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_bklm.BklmConfig",
            "AutoModelForCausalLM": "modeling_bklm.BklmForCausalLM",
        },
        "bklm_class": type(model).__name__,
        "bklm_settings": settings,
        "bklm_version": __version__,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.n_seq or LONGEST,
        "num_hidden_layers": settings.get("n_layers", 1),
        "hidden_size": model.head()[0].shape[1],
        "tie_word_embeddings": False,  # a tied model holds one matrix and reads it twice
        "use_cache": False,
        "dtype": str(model.head()[0].dtype).removeprefix("torch."),
    }


def _write_tokenizer(trained: Trained, folder: Path) -> None:
    with replacing(folder / "tokenizer.json") as temporary:
        _spaced(trained.tokenizer).save(str(temporary))
    known = [w for w in ("<unk>", "<UNK>", "<pad>", "<PAD>") if trained.tokenizer.token_to_id(w) is not None]
    named = {"unk_token" if w.lower() == "<unk>" else "pad_token": w for w in known}
    # A word such as "x<unk>y" is one word here, not three.
    special = {
        name: {"__type": "AddedToken", "content": word, "single_word": True, "lstrip": False, "rstrip": False,
               "normalized": False, "special": True}
        for name, word in named.items()
    }  # fmt: skip
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": trained.model.n_seq or LONGEST,
            "padding_side": "right",
            "clean_up_tokenization_spaces": False,
            **special,
        },
    )


def _spaced(tokenizer: Tokenizer) -> Tokenizer:
    """A copy that writes words with a space before each: transformers decodes what was written apart from what was there."""
    made = Tokenizer.from_str(tokenizer.to_str())
    if made.decoder is None:
        made.decoder = decoders.Sequence([decoders.Replace(Regex("^"), " "), decoders.Fuse()])
    return made


def push(folder: Path, name: str) -> str:
    """Upload an exported folder to the Hugging Face hub as ``name``, "user/model"; return its address.

    The token is Colab's secret HF_TOKEN, the environment variable of that name, or that of ``hf auth login``.

    Raises:
        ValueError: a name of another form. OSError: the hub refuses, or cannot be reached.
    """
    if name.count("/") != 1 or not all(name.split("/")):
        raise ValueError(f"push: got {name!r}; it must be user/name, as on the hub.")
    from huggingface_hub import HfApi

    api = HfApi(token=_token())
    try:
        api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=str(folder))
    except Exception as error:  # the hub's client raises many kinds
        reason = " ".join(str(error).split())[:200]
        raise OSError(
            f"push: {name} could not be uploaded ({reason}); set HF_TOKEN to a token that may write (in Colab as a secret) "
            f"and run this again. The folder is complete: {folder}."
        ) from error
    return f"https://huggingface.co/{name}"


def _token() -> str | None:
    if in_colab():
        try:
            return importlib.import_module("google.colab.userdata").get("HF_TOKEN")
        except Exception:  # no such secret, or no access to it: the variable may be there
            pass
    return os.environ.get("HF_TOKEN") or None
