"""A bklm model as transformers calls it: logits and loss, generation, pipelines. The model itself comes from ``bklm``."""

import torch
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from bklm.data import IGNORED
from bklm.models.by_name import built

from .configuration_bklm import BklmConfig


class BklmForCausalLM(PreTrainedModel, GenerationMixin):
    """Wraps a ``bklm.models.LanguageModel``. Every call runs over the whole text: there is no cache."""

    config_class = BklmConfig
    base_model_prefix = "model"
    _supports_cache_class = False
    _no_split_modules = []  # noqa: RUF012, as transformers declares it

    def __init__(self, config):
        super().__init__(config)
        self.model = built(config.bklm_class, config.bklm_settings)
        self.post_init()

    def _init_weights(self, module):
        """The model has drawn its weights itself."""

    def get_input_embeddings(self):
        return next(part for part in self.model.modules() if isinstance(part, torch.nn.Embedding))

    def get_output_embeddings(self):
        return None

    def forward(self, input_ids, attention_mask=None, labels=None, **ignored):
        """Logits (B, N, V); with ``labels`` (B, N, IGNORED where masked) the mean loss of each next token, too.

        Padding may stand at the end only: what stands before a text would be read as part of it.
        """
        if attention_mask is not None and bool((attention_mask[:, 1:] > attention_mask[:, :-1]).any()):
            raise ValueError(
                "attention_mask: this model reads from the left; pad at the right (padding_side='right')."
            )
        logits = self.model(input_ids)
        loss = None
        if labels is not None:
            flat = logits[:, :-1].flatten(0, 1).float()
            loss = torch.nn.functional.cross_entropy(flat, labels[:, 1:].flatten(), ignore_index=IGNORED)
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **ignored):
        """The last tokens that the model has positions for."""
        if attention_mask is not None and not bool(attention_mask.all()):
            raise ValueError(
                "attention_mask: a padded text cannot be continued; generate for texts of one length, or one at a time."
            )
        longest = self.model.n_seq or input_ids.shape[1]
        mask = None if attention_mask is None else attention_mask[:, -longest:]
        return {"input_ids": input_ids[:, -longest:], "attention_mask": mask}
