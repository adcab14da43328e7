"""What decoder families share of the Hugging Face layout: sizes, rotary settings, tensors of a layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vilam3_jax.errors import UserError
from vilam3_jax.models.hugging_face import (
    KEEP,
    TRANSPOSE,
    Layout,
    TensorRule,
    number,
    size,
    stacked,
    subsection,
)

ROPE_TYPES = ("linear", "llama3")


def read_sizes(values: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """The fields of `DecoderConfig` that all decoders state alike in config.json."""
    heads, hidden = size(values, "num_attention_heads", where), size(values, "hidden_size", where)
    return {
        "vocab_size": size(values, "vocab_size", where),
        "hidden_size": hidden,
        "num_layers": size(values, "num_hidden_layers", where),
        "num_heads": heads,
        "num_kv_heads": size(values, "num_key_value_heads", where, heads),
        "head_dim": size(values, "head_dim", where, hidden // heads),
        "mlp_dim": size(values, "intermediate_size", where),
        "norm_eps": number(values, "rms_norm_eps", where, 1e-6),
    }


def write_sizes(llm: Any, dtype: str) -> dict[str, Any]:
    """The inverse of `read_sizes`, with the keys that transformers 4 and 5 and VILA read."""
    return {
        "vocab_size": llm.vocab_size,
        "hidden_size": llm.hidden_size,
        "num_hidden_layers": llm.num_layers,
        "num_attention_heads": llm.num_heads,
        "num_key_value_heads": llm.num_kv_heads,
        "head_dim": llm.head_dim,
        "intermediate_size": llm.mlp_dim,
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
    transformers, a theta inside the parameters wins over one beside them.

    Raises:
      UserError: parameters by layer type, contradicting parameters, or a type that is not supported.
    """
    inner = {}
    for key in ("rope_parameters", "rope_scaling"):
        found = {name: value for name, value in subsection(values, key, where).items() if value is not None}
        if any(isinstance(value, dict) for value in found.values()):
            raise UserError(
                f"{where}: {key}={found!r} depends on the layer type, which is not supported; choose "
                "another model"
            )
        for name, value in found.items():
            if inner.setdefault(name, value) != value:
                raise UserError(
                    f"{where}: rope_parameters and rope_scaling contradict each other in {name}; remove the "
                    "wrong one"
                )
    theta = number({**values, **inner}, "rope_theta", where, default_theta)
    return {"rope_theta": theta, "rope_scaling": read_scaling(inner, f"{where}: rope_scaling")}


def read_scaling(values: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """Rotary scaling of config.json in our fields; None for none.

    Raises:
      UserError: a type that is not supported.
    """
    kind = values.get("rope_type") or values.get("type") or "default"
    if kind == "default":
        return None
    if kind not in ROPE_TYPES:
        raise UserError(f"{where}={dict(values)!r} is not supported; choose another model")
    scaling: dict[str, Any] = {"type": kind, "factor": number(values, "factor", where)}
    if kind == "llama3":
        scaling["low_freq_factor"] = number(values, "low_freq_factor", where)
        scaling["high_freq_factor"] = number(values, "high_freq_factor", where)
        scaling["original_max_positions"] = size(values, "original_max_position_embeddings", where)
    return scaling


def write_scaling(scaling: Mapping[str, Any] | None) -> dict[str, Any]:
    """The inverse of `read_scaling`, under the name of transformers 5."""
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
            # transformers 4.37, which VILA-1.5 uses, knows 'linear' only, under the older name.
            scaling = {"type": "linear", "factor": scaling["factor"]}
        found["rope_scaling"] = scaling
    return found


def decoder_tensors(llm: Any, layer: Iterable[tuple[str, str, Layout]]) -> list[TensorRule]:
    """Tensors of a decoder: its layer's, embedding, final norm and, unless tied, head.

    Args:
      llm: section of the model.
      layer: rows of (our name in the layer, theirs, layout).
    """
    rules = [
        TensorRule("llm/embed/embedding", ("model.embed_tokens.weight",), KEEP),
        TensorRule("llm/final_norm/scale", ("model.norm.weight",), KEEP),
        *stacked("llm/layers", "model.layers", llm.num_layers, layer),
    ]
    if not llm.tie_embeddings:
        rules.append(TensorRule("llm/lm_head/kernel", ("lm_head.weight",), TRANSPOSE))
    return rules


def projections(biased: str = "", normed: str = "") -> list[tuple[str, str, Layout]]:
    """Rows of a layer's attention and gated MLP.

    Args:
      biased: which of q, k, v and o have a bias.
      normed: which of q and k have a norm.
    """
    return [
        *((f"attn/{name}/kernel", f"self_attn.{name}_proj.weight", TRANSPOSE) for name in "qkvo"),
        *((f"attn/{name}/bias", f"self_attn.{name}_proj.bias", KEEP) for name in biased),
        *((f"attn/{name}_norm/scale", f"self_attn.{name}_norm.weight", KEEP) for name in normed),
        *((f"mlp/{name}/kernel", f"mlp.{name}_proj.weight", TRANSPOSE) for name in ("gate", "up", "down")),
    ]
