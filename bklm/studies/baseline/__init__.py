"""The baseline study: NewLLM as published, beside a GPT, an LSTM, LinearContext and two ResNetBK of one size."""

from bklm.files.lazy import lazy

__getattr__, __all__ = lazy(
    __name__,
    {
        "config": ("BaselineConfig",), "run": ("BaselineResult", "run_baseline"),
        "samples": ("checkpoints_table", "write_sample"), "text": ("describe_text",),
    },
)  # fmt: skip
