"""Language models of one interface: logits, a loss that never holds them whole, generation, parameter counts."""

from bklm.models.base import LanguageModel
from bklm.models.conservative import Conservative, ConservativeConfig, ConservativeState
from bklm.models.context_token import ContextTokenConfig, ContextTokenLM, ContextTokenState
from bklm.models.gpt import GPT, GPTConfig, GPTState
from bklm.models.leak import future_leak
from bklm.models.linear_context import LinearContext, LinearContextConfig, LinearContextState
from bklm.models.loss import TokenLosses, linear_cross_entropy, linear_token_losses
from bklm.models.lstm import LSTM, LSTMConfig, LSTMState
from bklm.models.new_llm import NewLLM, NewLLMConfig, NewLLMState
from bklm.models.resnet_bk import ResNetBK, ResNetBKState
from bklm.models.resnet_bk_config import ResNetBKConfig, reading_settings
from bklm.models.sizing import (
    Sized,
    conservative_of_size,
    gpt_of_size,
    linear_context_of_size,
    lstm_of_size,
    resnet_bk_of_size,
)

__all__ = [
    "GPT",
    "LSTM",
    "Conservative",
    "ConservativeConfig",
    "ConservativeState",
    "ContextTokenConfig",
    "ContextTokenLM",
    "ContextTokenState",
    "GPTConfig",
    "GPTState",
    "LSTMConfig",
    "LSTMState",
    "LanguageModel",
    "LinearContext",
    "LinearContextConfig",
    "LinearContextState",
    "NewLLM",
    "NewLLMConfig",
    "NewLLMState",
    "ResNetBK",
    "ResNetBKConfig",
    "ResNetBKState",
    "Sized",
    "TokenLosses",
    "conservative_of_size",
    "future_leak",
    "gpt_of_size",
    "linear_context_of_size",
    "linear_cross_entropy",
    "linear_token_losses",
    "lstm_of_size",
    "reading_settings",
    "resnet_bk_of_size",
]
