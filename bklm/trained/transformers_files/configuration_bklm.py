"""The configuration of an exported bklm model, as transformers reads it from config.json."""

from transformers import PretrainedConfig


class BklmConfig(PretrainedConfig):
    """``bklm_class`` names a model of ``bklm.models``, ``bklm_settings`` the fields of its own config class."""

    model_type = "bklm"

    def __init__(self, bklm_class="ResNetBK", bklm_settings=None, **others):
        self.bklm_class = bklm_class
        self.bklm_settings = dict(bklm_settings or {})
        # No cache of keys and values: nothing here has any.
        others.setdefault("use_cache", False)
        super().__init__(**others)
        # Of the model itself, not of what a caller says.
        self.vocab_size = self.bklm_settings.get("vocab_size", 0)
