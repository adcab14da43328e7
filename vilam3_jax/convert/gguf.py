"""Opens GGUF files (llama.cpp's format) of Llama decoders, tokenizer included."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from vilam3_jax.convert.sources import Source, section_of
from vilam3_jax.data.tokenizer import Tokenizer, digit_byte_level
from vilam3_jax.errors import UserError
from vilam3_jax.models import families
from vilam3_jax.models.hugging_face import layer_count, whole

# GGUF's names → Hugging Face's.
_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_INNER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Llama 3's split, as published with its tokenizer.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Raised by the reader for a damaged header.
_DAMAGE = (ValueError, LookupError, TypeError, OverflowError, MemoryError, AttributeError, struct.error)
# Settings of `llama.*` that are read, or that change nothing.
_KEYS = re.compile(
    r"llama\.(tensor_data_layout|block_count|context_length|embedding_length|feed_forward_length|vocab_size"
    r"|attention\.(head_count|head_count_kv|key_length|layer_norm_rms_epsilon)"
    r"|rope\.(dimension_count|freq_base|scaling\.(type|original_context_length|finetuned)))"
)
_NEUTRAL = {"llama.attention.causal": True, "llama.rope.scaling.factor": 1, "llama.rope.scale_linear": 1}


class GgufFile:
    """An open GGUF file: metadata, and tensors under Hugging Face's names, dequantised when read.

    Attributes:
      path: the file.
      keys: keys of the metadata.
      shapes: tensor name → shape.
      dtypes: storage types of the tensors.
    """

    def __init__(self, path: Path) -> None:
        """Reads the metadata and maps the weights.

        Raises:
          UserError: not a GGUF file, truncated, damaged, one of several parts, or not a Llama.
        """
        self.path = path
        try:
            self._reader = gguf.GGUFReader(path)
        except _DAMAGE as error:
            raise UserError(f"{path}: not a whole GGUF file ({_line(error)}); download it again") from error
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
        self.keys = frozenset(self._reader.fields)
        architecture = self.get("general.architecture", "")
        if architecture != "llama":
            raise UserError(f"{path}: architecture {architecture!r} is not supported, only 'llama' is")
        if self.get("split.count", 0) not in (0, 1):
            raise UserError(f"{path}: one of several parts; merge them with `llama-gguf-split --merge` first")
        self._tensors = {_hugging_face_name(tensor.name): tensor for tensor in self._reader.tensors}
        # GGUF lists the fastest axis first, numpy last.
        self.shapes = {
            name: tuple(map(int, reversed(tensor.shape))) for name, tensor in self._tensors.items()
        }
        self.dtypes = tuple(sorted({tensor.tensor_type.name for tensor in self._reader.tensors}))

    def get(self, key: str, default: Any = None) -> Any:
        """Returns a metadata value.

        Raises:
          UserError: absent and without a default, or unreadable.
        """
        found = self._reader.fields.get(key)
        if found is None:
            if default is None:
                raise UserError(f"{self.path}: has no {key}; it is not a complete model, download it again")
            return default
        try:
            return found.contents()
        except _DAMAGE as error:
            raise UserError(f"{self.path}: {key} is damaged ({_line(error)}); download it again") from error

    def whole(self, key: str, default: int | None = None) -> int:
        """Returns a positive size; raises as `get`."""
        return whole(self.get(key, default), f"{self.path}: {key}")

    def strings(self, key: str) -> list[str]:
        """Returns a list of strings; raises as `get`."""
        value = self.get(key)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise UserError(f"{self.path}: {key} is not a list of strings; damaged, download it again")
        return value

    def __call__(self, name: str, start: int, stop: int) -> np.ndarray:
        """Returns rows `start` to `stop` of a tensor, dequantised to float32, heads in rotate-half layout.

        Raises:
          UserError: the gguf package cannot dequantise the tensor.
        """
        tensor = self._tensors[name]
        try:
            rows = self._rows(name)
            # Each row is quantised independently.
            data = tensor.data[start:stop] if rows is None else tensor.data[rows[start:stop]]
            return gguf.dequantize(data, tensor.tensor_type)
        except NotImplementedError as error:
            raise UserError(
                f"{self.path}: {tensor.name} is stored as {tensor.tensor_type.name}, which cannot be "
                "dequantised; use another quantisation (Q4_0 ... Q8_0, K-quants, F16, BF16)"
            ) from error

    def _rows(self, name: str) -> np.ndarray | None:
        """The file's row of each row of a query or key weight; None for other tensors."""
        if name.endswith("self_attn.q_proj.weight"):
            heads = self.whole("llama.attention.head_count")
        elif name.endswith("self_attn.k_proj.weight"):
            heads = _kv_heads(self)
        else:
            return None
        count = self.shapes[name][0]
        if count % (2 * heads):
            raise UserError(
                f"{self.path}: {name} has {count} rows for {heads} heads; damaged, download it again"
            )
        return unpermute(np.arange(count)[:, None], heads)[:, 0]


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's reordering of query and key rows.

    llama.cpp rotates neighbouring pairs (0,1), (2,3), ... of a head; Hugging Face and this package pair the
    two halves. Row 2i + h of a head in GGUF is row h * head_dim / 2 + i here.

    Args:
      weight: `[heads * head_dim, in]`.
      heads: number of heads in these rows.
    """
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def open_gguf(path: Path) -> Source:
    """Opens a GGUF file of a Llama decoder.

    Raises:
      UserError: see `GgufFile`; or a setting is not supported.
    """
    file = GgufFile(path)
    config = section_of("llm", _llm_config(file), path)
    licence = {
        key: str(file.get(f"general.{field}"))
        for key, field in (("name", "license"), ("text", "license.name"), ("link", "license.link"))
        if f"general.{field}" in file.keys
    }
    return Source(
        component="llm",
        config=config.to_dict(),
        tensors=file.shapes,
        rules=families.get("llm", "llama").hugging_face.tensors(config),
        reader=file,
        files=[path],
        licence=licence,
        dtypes=file.dtypes,
        tokenizer=lambda: gguf_tokenizer(file),
    )


def _llm_config(file: GgufFile) -> dict[str, Any]:
    if file.get("llama.rope.scaling.type", "none") != "none" or "rope_freqs.weight" in file.shapes:
        raise UserError(f"{file.path}: uses rope scaling (Llama 3.1 and later), which is not supported")
    heads = file.whole("llama.attention.head_count")
    hidden = file.whole("llama.embedding_length")
    head_dim = file.whole("llama.attention.key_length", hidden // heads)
    if file.whole("llama.rope.dimension_count", head_dim) != head_dim:
        raise UserError(f"{file.path}: rotates only a part of each head, which is not supported")
    neutral = {"llama.attention.value_length": head_dim, **_NEUTRAL}
    for key in sorted(file.keys):
        if key.startswith("llama.") and not _KEYS.fullmatch(key) and file.get(key) != neutral.get(key, 0):
            raise UserError(f"{file.path}: {key}={file.get(key)!r} is not supported; choose another model")
    # llama.vocab_size is often absent.
    embedding = file.shapes.get("model.embed_tokens.weight", (0,))
    try:
        theta = float(file.get("llama.rope.freq_base", 10_000.0))
        # The file holds float32; take the shortest decimal that rounds to it (1e-05).
        epsilon = float(str(np.float32(file.get("llama.attention.layer_norm_rms_epsilon"))))
    except (TypeError, ValueError) as error:
        raise UserError(f"{file.path}: a setting is damaged ({_line(error)}); download it again") from error
    return {
        "type": "llama",
        "vocab_size": whole(embedding[0], f"{file.path}: rows of token_embd.weight"),
        "hidden_size": hidden,
        "num_layers": layer_count(
            file.get("llama.block_count"), file.shapes, f"{file.path}: llama.block_count"
        ),
        "num_heads": heads,
        "num_kv_heads": _kv_heads(file),
        "head_dim": head_dim,
        "mlp_dim": file.whole("llama.feed_forward_length"),
        "rope_theta": theta,
        "norm_eps": epsilon,
        "max_positions": file.whole("llama.context_length", 2048),
        "tie_embeddings": "lm_head.weight" not in file.shapes,
    }


def _kv_heads(file: GgufFile) -> int:
    key = "llama.attention.head_count_kv"
    if isinstance(file.get(key, 0), list):
        raise UserError(
            f"{file.path}: another number of key-value heads in each layer, which is not supported"
        )
    return file.whole(key, file.whole("llama.attention.head_count"))


def gguf_tokenizer(file: GgufFile) -> Tokenizer:
    """Rebuilds the byte-level BPE tokenizer in a GGUF file.

    It uses the pre-tokenizer that the file names, so that ids are those of the original model. transformers
    5.23 uses GPT-2's for every file; SmolLM2's differs where white space precedes a number.

    Raises:
      UserError: SentencePiece, an unknown pre-tokenizer, or damaged lists.
    """
    hint = "give a Hugging Face tokenizer folder with --tokenizer"
    kind = file.get("tokenizer.ggml.model", "none")
    if kind != "gpt2":
        raise UserError(f"{file.path}: tokenizer of type {kind!r} is not supported; {hint}")
    pre = file.get("tokenizer.ggml.pre", "default")
    if pre not in _PRE_TOKENIZERS:
        raise UserError(f"{file.path}: pre-tokenizer {pre!r} is not supported; {hint}")
    tokens = file.strings("tokenizer.ggml.tokens")
    types = file.get("tokenizer.ggml.token_type")
    cut = (merge.partition(" ") for merge in file.strings("tokenizer.ggml.merges"))
    merges = [(left, right) for left, _, right in cut]
    vocab = {token: index for index, token in enumerate(tokens)}
    if not isinstance(types, list) or len(types) != len(tokens) or len(vocab) != len(tokens):
        raise UserError(f"{file.path}: token lists contradict each other; damaged, download it again")
    try:
        built = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=pre == "llama-bpe"))
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{file.path}: merges are damaged ({_line(error)}); download it again") from error
    built.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    built.decoder = decoders.ByteLevel()
    control = {gguf.TokenType.CONTROL, gguf.TokenType.UNKNOWN}
    built.add_tokens(
        [
            AddedToken(token, special=kind in control, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in control or kind == gguf.TokenType.USER_DEFINED
        ]
    )
    ids = {
        role: _token_id(file, f"tokenizer.ggml.{name}_token_id", len(tokens))
        for role, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("turn", "eot"))
    }
    if ids["eos"] is None:
        raise UserError(f"{file.path}: has no tokenizer.ggml.eos_token_id; {hint}")
    return Tokenizer(
        built.to_str(),
        eos_id=ids["eos"],
        bos_id=ids["bos"],
        pad_id=ids["pad"],
        stop_ids=[] if ids["turn"] is None else [ids["turn"]],
        chat_template=file.get("tokenizer.chat_template", "") or None,
        settings={"add_bos_token": bool(file.get("tokenizer.ggml.add_bos_token", False))},
    )


_PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "smollm": digit_byte_level,
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    "llama-bpe": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}


def _token_id(file: GgufFile, key: str, size: int) -> int | None:
    if key not in file.keys:
        return None
    index = file.get(key)
    if not isinstance(index, int) or not 0 <= index < size:
        raise UserError(
            f"{file.path}: {key}={index!r} is outside the vocabulary of {size}; download it again"
        )
    return index


def _hugging_face_name(name: str) -> str:
    if name in _OUTER:
        return _OUTER[name]
    parts: Sequence[str] = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _INNER:
        return f"model.layers.{parts[1]}.{_INNER[parts[2]]}.{parts[3]}"
    return name


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
