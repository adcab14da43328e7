"""Fixtures of the inference tests."""

from tests.inference.tiny import (  # noqa: F401
    export,
    model_config,
    params,
    tokenizer,
    tokenizer_dir,
    towers_export,
    world,
)
