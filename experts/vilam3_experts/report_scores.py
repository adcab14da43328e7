"""BERTScore with a local encoder, a back end of `vilam3_jax.evals.reports.backends`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from vilam3_jax.errors import UserError
from vilam3_jax.evals.reports.backends import greedy_match


class BertScore:
    """F1 of the token embeddings of one layer of a Hugging Face encoder, special tokens left out."""

    def __init__(self, weights: Path, layer: int = -1):
        """Loads the encoder in `weights` without network and without code of the folder.

        Args:
          weights: folder with config.json, a tokenizer, and *.safetensors.
          layer: hidden state to use; -1 is the last.

        Raises:
          UserError: transformers is not installed, or the folder cannot be read.
        """
        try:
            from transformers import AutoModel, AutoTokenizer
        except ImportError as error:
            raise UserError("bertscore needs transformers: pip install transformers") from error
        options = {"local_files_only": True, "trust_remote_code": False}
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(weights, **options)
            self._model = AutoModel.from_pretrained(weights, use_safetensors=True, **options).eval()
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{weights}: cannot be read as an encoder ({reason})") from error
        self._layer = layer

    def score(self, references: Sequence[str], hypotheses: Sequence[str]) -> np.ndarray:
        """Float64 [n], F1 of each pair. Texts beyond the encoder's length are cut."""
        pairs = zip(references, hypotheses, strict=True)
        return np.asarray([greedy_match(*map(self.embed, pair))[2] for pair in pairs], np.float64)

    def embed(self, text: str) -> np.ndarray:
        """Float32 [tokens, width]."""
        limit = min(self._model.config.max_position_embeddings, self._tokenizer.model_max_length)
        encoded = self._tokenizer(
            text, return_tensors="pt", truncation=True, max_length=limit, return_special_tokens_mask=True
        )
        ordinary = encoded.pop("special_tokens_mask")[0] == 0
        with torch.no_grad():
            hidden = self._model(**encoded, output_hidden_states=True).hidden_states[self._layer][0]
        return hidden[ordinary].float().numpy()
