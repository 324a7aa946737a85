"""Single files, and single tensors of a safetensors file, from a model's repository on the Hugging Face hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

GPT2 = "openai-community/gpt2"
BYTES_AT_ONCE = 1 << 25
LARGEST_HEADER = 1 << 27  # the safetensors library's own bound is of this order
SECONDS = 20.0  # without a byte before a request counts as failed
_WIDTH = {"F32": 4, "F16": 2, "BF16": 2}


def fetch_file(repository: str, name: str, way_on: str) -> Path:
    """The path of a file of ``repository`` in the hub's cache on this machine, downloaded where it is not there yet.

    Raises:
        ConnectionError: the hub cannot be reached; the sentence ends with ``way_on``, what to do without it.
    """
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(repository, name, etag_timeout=SECONDS))
    except _failures() as error:
        raise _unreachable(repository, name, error, way_on) from None


def fetch_tensor(repository: str, file: str, tensor: str, way_on: str) -> np.ndarray:
    """One tensor of a safetensors file, float32: from the hub's cache, else by ranged requests for it alone.

    Raises:
        ConnectionError: as for ``fetch_file``. ValueError: the file has no such tensor.
    """
    import huggingface_hub

    cached = huggingface_hub.try_to_load_from_cache(repository, file)
    if isinstance(cached, str):
        from safetensors import safe_open

        with safe_open(cached, framework="pt") as content:
            return content.get_tensor(tensor).float().numpy()
    url = huggingface_hub.hf_hub_url(repository, file)
    try:
        length = int.from_bytes(_range(url, 0, 8, retry=False), "little")
        if length > LARGEST_HEADER:
            raise OSError(f"its header claims {length} bytes; it is no safetensors file")
        header = json.loads(_range(url, 8, 8 + length))
    except _failures() as error:
        raise _unreachable(repository, file, error, way_on) from None
    entry = tensor_entry(header, tensor, f"{repository}/{file}")
    begin, end = (8 + length + offset for offset in entry["data_offsets"])
    content = bytearray()
    try:
        for at in range(begin, end, BYTES_AT_ONCE):
            content += _range(url, at, min(end, at + BYTES_AT_ONCE))
    except _failures() as error:
        raise _unreachable(repository, file, error, way_on) from None
    return _as_float32(content, entry["dtype"]).reshape(entry["shape"])


def tensor_entry(header: dict[str, Any], tensor: str, where: str) -> dict[str, Any]:
    """What a safetensors header says of ``tensor``: dtype, shape, data_offsets.

    Raises:
        ValueError: there is none of this name, or its numbers are not floating point.
    """
    entry = header.get(tensor)
    if entry is None or entry["dtype"] not in _WIDTH:
        held = ", ".join(
            f"{name} ({header[name]['dtype']})" for name in list(header)[:4] if name != "__metadata__"
        )
        raise ValueError(f"{where} holds no floating-point tensor {tensor!r}; it holds {held} ...")
    return entry


def _range(url: str, begin: int, end: int, retry: bool = True) -> bytes:
    """Bytes [begin, end) of ``url``; without ``retry`` a hub that does not answer is given up at once."""
    from huggingface_hub.utils import build_hf_headers, get_session, http_backoff

    headers = build_hf_headers() | {"Range": f"bytes={begin}-{end - 1}"}
    request = http_backoff if retry else get_session().request
    response = request("GET", url, headers=headers, timeout=SECONDS)
    response.raise_for_status()
    # A server that knows no ranges answers 200 with the whole file.
    content = response.content[begin:end] if response.status_code == 200 else response.content
    if len(content) != end - begin:
        raise OSError(f"{len(content)} bytes came instead of {end - begin}")
    return content


def _as_float32(content: bytearray, dtype: str) -> np.ndarray:
    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(content, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(content, {"F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float32)


def _failures() -> tuple[type[BaseException], ...]:
    """What a failed download raises; the HTTP library changes with the hub's version, its base class is among these."""
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, ValueError, *HfHubHTTPError.__bases__)


def _unreachable(repository: str, name: str, error: BaseException, way_on: str) -> ConnectionError:
    from huggingface_hub.constants import ENDPOINT

    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return ConnectionError(
        f"{name} of {repository} could not be fetched from {ENDPOINT} ({reason}); connect this machine to the network, "
        f"or {way_on}"
    )
