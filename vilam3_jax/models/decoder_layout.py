"""The part of the Hugging Face layout that decoder families share: sizes, rotary settings, layer tensors."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vilam3_jax.errors import UserError
from vilam3_jax.models import hugging_face as hf
from vilam3_jax.models.hugging_face import KEEP, TRANSPOSE, Layout, TensorRule, number, size, subsection

ROPE_TYPES = ("linear", "llama3")
_ROPE_KEYS = (
    *("rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor"),
    "original_max_position_embeddings",
)
# Fields of `DecoderConfig` → keys of config.json.
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "mlp_dim": "intermediate_size",
}

logger = logging.getLogger(__name__)


def read_sizes(values: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """The fields of `DecoderConfig` that have the same keys in the config.json of all decoders."""
    heads, hidden = size(values, "num_attention_heads", where), size(values, "hidden_size", where)
    sizes = hf.read_sizes(values, where, _SIZES, {"num_kv_heads": heads, "head_dim": hidden // heads})
    return {**sizes, "norm_eps": number(values, "rms_norm_eps", where, 1e-6)}


def write_sizes(llm: Any, dtype: str) -> dict[str, Any]:
    """The inverse of `read_sizes`, with the keys that transformers 4 and 5 and VILA read."""
    return {
        **hf.write_sizes(llm, _SIZES),
        "rms_norm_eps": llm.norm_eps,
        "max_position_embeddings": llm.max_positions,
        "tie_word_embeddings": llm.tie_embeddings,
        "dtype": dtype,
        "torch_dtype": dtype,
        "use_cache": True,
        # VILA's own keys.
        "model_max_length": llm.max_positions,
        "tokenizer_model_max_length": llm.max_positions,
        "tokenizer_padding_side": "right",
    }


def read_rope(values: Mapping[str, Any], where: Path, default_theta: float) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of a decoder with one rotary table.

    transformers 5 writes `rope_parameters`, older versions `rope_theta` and `rope_scaling`. As in
    transformers, `rope_scaling` takes precedence over `rope_parameters`, and their theta over `rope_theta`.

    Raises:
      UserError: parameters by layer type, an unsupported type, or contradicting `rope_scaling` and
        `rope_parameters`.
    """

    def reading(key: str) -> dict[str, Any] | None:
        inner = {name: value for name, value in subsection(values, key, where).items() if value is not None}
        if any(isinstance(value, dict) for value in inner.values()):
            raise UserError(
                f"{where}: {key}={inner!r} depends on the layer type, which is not supported; choose "
                "another model"
            )
        max_positions = values.get("max_position_embeddings")
        return inner and {
            "rope_theta": number({**outer, **inner}, "rope_theta", where, default_theta),
            "rope_scaling": read_scaling(inner, f"{where}: {key}", max_positions),
        }

    outer = {"rope_theta": values.get("rope_theta")}
    scaling, parameters = reading("rope_scaling"), reading("rope_parameters")
    if scaling and parameters and scaling != parameters:
        raise UserError(
            f"{where}: rope_scaling and rope_parameters contradict each other ({scaling} and {parameters}); "
            "remove the wrong one"
        )
    found = scaling or parameters
    if not found:
        return {"rope_theta": number(outer, "rope_theta", where, default_theta), "rope_scaling": None}
    if outer["rope_theta"] not in (None, found["rope_theta"]):
        key = "rope_scaling" if scaling else "rope_parameters"
        notice = "%s: rope_theta=%s contradicts rope_theta=%s in %s; the latter is used, as in transformers"
        logger.warning(notice, where, outer["rope_theta"], found["rope_theta"], key)
    return found


def read_scaling(
    values: Mapping[str, Any], where: str, max_positions: int | None = None
) -> dict[str, Any] | None:
    """Translates `rope_scaling` or `rope_parameters`; None for no scaling.

    Args:
      values: the JSON object.
      where: its name in errors.
      max_positions: default of `original_max_position_embeddings`.

    Raises:
      UserError: an unsupported type or key.
    """
    kind = values.get("rope_type") or values.get("type") or "default"
    unknown = {
        key: value for key, value in values.items() if key not in _ROPE_KEYS and value not in (None, False)
    }
    if unknown.pop("partial_rotary_factor", 1.0) != 1.0 or unknown or kind not in ("default", *ROPE_TYPES):
        raise UserError(f"{where}={dict(values)!r} is not supported; choose another model")
    if kind == "default":
        return None
    scaling: dict[str, Any] = {"type": kind, "factor": number(values, "factor", where)}
    if kind == "llama3":
        scaling["low_freq_factor"] = number(values, "low_freq_factor", where)
        scaling["high_freq_factor"] = number(values, "high_freq_factor", where)
        key = "original_max_position_embeddings"
        scaling["original_max_positions"] = size(values, key, where, max_positions)
    return scaling


def write_scaling(scaling: Mapping[str, Any] | None) -> dict[str, Any]:
    """The inverse of `read_scaling`, with the key names of transformers 5."""
    if not scaling:
        return {"rope_type": "default"}
    theirs = {"rope_type": scaling["type"], **{k: v for k, v in scaling.items() if k != "type"}}
    if "original_max_positions" in theirs:
        theirs["original_max_position_embeddings"] = theirs.pop("original_max_positions")
    return theirs


def write_rope(llm: Any) -> dict[str, Any]:
    """The keys of `read_rope`, for readers of transformers 4 and of transformers 5."""
    scaling = write_scaling(llm.rope_scaling)
    found = {"rope_theta": llm.rope_theta, "rope_parameters": {"rope_theta": llm.rope_theta, **scaling}}
    if llm.rope_scaling:
        if scaling["rope_type"] == "linear":
            # transformers 4.37, which VILA-1.5 uses, supports only 'linear', under the older name.
            scaling = {"type": "linear", "factor": scaling["factor"]}
        found["rope_scaling"] = scaling
    return found


def decoder_tensors(llm: Any, layer: Iterable[tuple[str, str, Layout]]) -> list[TensorRule]:
    """Tensors of a decoder with rows `layer` for each layer, see `hugging_face.stacked`."""
    rules = [
        TensorRule("llm/embed/embedding", ("model.embed_tokens.weight",), KEEP),
        TensorRule("llm/final_norm/scale", ("model.norm.weight",), KEEP),
        *hf.stacked("llm/layers", "model.layers", llm.num_layers, layer),
    ]
    if not llm.tie_embeddings:
        rules.append(TensorRule("llm/lm_head/kernel", ("lm_head.weight",), TRANSPOSE))
    return rules


def projections(biased: str = "", normed: str = "") -> list[tuple[str, str, Layout]]:
    """Rows of attention and gated MLP; `biased` and `normed` list the projections with a bias or a norm."""
    return [
        *((f"attn/{name}/kernel", f"self_attn.{name}_proj.weight", TRANSPOSE) for name in "qkvo"),
        *((f"attn/{name}/bias", f"self_attn.{name}_proj.bias", KEEP) for name in biased),
        *((f"attn/{name}_norm/scale", f"self_attn.{name}_norm.weight", KEEP) for name in normed),
        *((f"mlp/{name}/kernel", f"mlp.{name}_proj.weight", TRANSPOSE) for name in ("gate", "up", "down")),
    ]
