"""A tokenizer without merges, whose ids can be written by hand, and a model config that fits."""

import pytest

from nextstep_jax.data import text_tokenizer
from nextstep_jax.models import config as model_configs


@pytest.fixture(scope="session")
def tokenizer():
    """Bytes only: the printable character c has id 10 + ord(c) - 33."""
    return text_tokenizer.train_bpe([], len(text_tokenizer.SPECIAL_TOKENS) + 256)


@pytest.fixture(scope="session")
def model_config(tokenizer):
    ids = {field: getattr(tokenizer, field) for field in text_tokenizer.CONFIG_FIELDS}
    return model_configs.NextStepConfig(
        decoder=model_configs.DECODERS["tiny"], bos_id=tokenizer.eos_id, **ids
    )
