"""What a foreign checkpoint offers, whatever its file format, and how a parameter of ours is made from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vilam3_jax.data.tokenizer import Tokenizer
from vilam3_jax.errors import UserError
from vilam3_jax.models.projector import Plan

_LARGEST_SIZE = 1 << 24

Transform = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Rule:
    """How one parameter of ours is made.

    Attributes:
      target: path of the parameter.
      sources: tensor names; one per layer where `stacked`, else exactly one.
      transform: foreign layout → ours, for one tensor.
      stacked: the parameter has a leading layer axis.
    """

    target: str
    sources: tuple[str, ...]
    transform: Transform
    stacked: bool = False


class Reader(Protocol):
    """Reads one tensor by name, in the source's layout and a floating dtype."""

    def __call__(self, name: str) -> np.ndarray: ...


@dataclass
class Source:
    """One opened checkpoint of one component.

    Attributes:
      component: 'llm', 'vision_tower' or 'projector', the key of its parameters in ours.
      config: the section of that name in our model config.
      tensors: name → shape, as the rules see them. Reading happens tensor by tensor through `reader`.
      rules: how our parameters are made.
      unused: name → why a tensor is rightly left out.
      files: every file read for the weights; their hashes go into the provenance.
      licence: what the source says of its licence (`name`, `text`).
      dtypes: storage types found, for the table.
      tokenizer: makes the tokenizer that came along; None where there is none.
    """

    component: str
    config: dict[str, Any]
    tensors: Mapping[str, tuple[int, ...]]
    rules: list[Rule]
    reader: Reader
    files: list[Path]
    unused: dict[str, str] = field(default_factory=dict)
    licence: dict[str, str] = field(default_factory=dict)
    dtypes: tuple[str, ...] = ()
    tokenizer: Callable[[], Tokenizer] | None = None


@dataclass
class Checkpoint:
    """What one import makes an export of: a component, or a whole model in parts.

    Attributes:
      kind: 'generative', or the component's name.
      config: our model config, without `kind`, `name` and `param_dtype`.
      parts: the components.
    """

    kind: str
    config: dict[str, Any]
    parts: list[Source]

    @classmethod
    def of(cls, source: Source) -> Checkpoint:
        """One component alone."""
        return cls(source.component, {source.component: source.config}, [source])

    @property
    def tokenizer(self) -> Callable[[], Tokenizer] | None:
        """Makes the tokenizer that came along with a part; None where there is none."""
        return next((part.tokenizer for part in self.parts if part.tokenizer), None)


def whole(value: Any, what: str) -> int:
    """Checks a size that a file states.

    Raises:
      UserError: not a positive number, or absurdly large; names `what`.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 0 < value <= _LARGEST_SIZE:
        raise UserError(
            f"{what} is {value!r}, a positive size was expected; the file is damaged, download it again"
        )
    return int(value)


def layer_count(value: Any, tensors: Mapping[str, Any], what: str) -> int:
    """`whole` for a number of layers, each of which has at least one tensor."""
    count = whole(value, what)
    if count > len(tensors):
        raise UserError(f"{what} is {count}, but there are only {len(tensors)} tensors; download it again")
    return count


def keep(tensor: np.ndarray) -> np.ndarray:
    """The layouts agree."""
    return tensor


def transpose(tensor: np.ndarray) -> np.ndarray:
    """PyTorch's `[out, in]` → our `[in, out]`."""
    return tensor.T


def llama_rules(config: Mapping[str, Any]) -> list[Rule]:
    """Rules for a Llama, Qwen2 or Qwen3 decoder under Hugging Face's names.

    Query and key columns are in the rotate-half layout, as Hugging Face stores them.

    Args:
      config: our `llm` section: its `num_layers`, `tie_embeddings` (there is no `lm_head`), `qkv_bias`,
        `o_bias` and `qk_norm`.
    """
    rules = [
        Rule("llm/embed/embedding", ("model.embed_tokens.weight",), keep),
        Rule("llm/final_norm/scale", ("model.norm.weight",), keep),
    ]
    if not config["tie_embeddings"]:
        rules.append(Rule("llm/lm_head/kernel", ("lm_head.weight",), transpose))
    biased = "qkv" * config.get("qkv_bias", False) + "o" * config.get("o_bias", False)
    normed = "qk" * config.get("qk_norm", False)
    layers: list[tuple[str, str, Transform]] = [
        ("attn_norm/scale", "input_layernorm.weight", keep),
        ("mlp_norm/scale", "post_attention_layernorm.weight", keep),
        *((f"attn/{name}/kernel", f"self_attn.{name}_proj.weight", transpose) for name in "qkvo"),
        *((f"attn/{name}/bias", f"self_attn.{name}_proj.bias", keep) for name in biased),
        *((f"attn/{name}_norm/scale", f"self_attn.{name}_norm.weight", keep) for name in normed),
        *((f"mlp/{name}/kernel", f"mlp.{name}_proj.weight", transpose) for name in ("gate", "up", "down")),
    ]
    for target, source, transform in layers:
        names = tuple(f"model.layers.{layer}.{source}" for layer in range(config["num_layers"]))
        rules.append(Rule(f"llm/layers/{target}", names, transform, stacked=True))
    return rules


def siglip_rules(num_layers: int, prefix: str, with_head: bool) -> list[Rule]:
    """Rules for a SigLIP vision tower under Hugging Face's names.

    Args:
      num_layers: encoder layers.
      prefix: what stands before `embeddings.` in the source's names.
      with_head: the source has the attention-pooling head.
    """

    def one(target: str, source: str, transform: Transform) -> Rule:
        return Rule(f"vision_tower/{target}", (prefix + source,), transform)

    def dense(target: str, source: str) -> list[Rule]:
        return [
            one(f"{target}/kernel", f"{source}.weight", transpose),
            one(f"{target}/bias", f"{source}.bias", keep),
        ]

    def norm(target: str, source: str) -> list[Rule]:
        return [
            one(f"{target}/scale", f"{source}.weight", keep),
            one(f"{target}/bias", f"{source}.bias", keep),
        ]

    rules = [
        # PyTorch's [out, in, height, width] → [height, width, in, out].
        one("patch_embed/kernel", "embeddings.patch_embedding.weight", lambda t: t.transpose(2, 3, 1, 0)),
        one("patch_embed/bias", "embeddings.patch_embedding.bias", keep),
        one("pos_embed", "embeddings.position_embedding.weight", keep),
        *norm("post_norm", "post_layernorm"),
    ]
    if with_head:
        rules.append(one("head/probe", "head.probe", keep))
        rules += _pooling_attention(one)
        rules += [*dense("head/attn/o", "head.attention.out_proj"), *norm("head/norm", "head.layernorm")]
        rules += [*dense("head/mlp/fc1", "head.mlp.fc1"), *dense("head/mlp/fc2", "head.mlp.fc2")]
    blocks = {
        "norm1": ("layer_norm1", "scale", keep),
        "norm2": ("layer_norm2", "scale", keep),
        **{f"attn/{name}": (f"self_attn.{name}_proj", "kernel", transpose) for name in "qkv"},
        "attn/o": ("self_attn.out_proj", "kernel", transpose),
        "mlp/fc1": ("mlp.fc1", "kernel", transpose),
        "mlp/fc2": ("mlp.fc2", "kernel", transpose),
    }
    for target, (source, weight, transform) in blocks.items():
        stem = [f"{prefix}encoder.layers.{layer}.{source}" for layer in range(num_layers)]
        path = f"vision_tower/blocks/{target}"
        rules.append(Rule(f"{path}/{weight}", tuple(f"{s}.weight" for s in stem), transform, stacked=True))
        rules.append(Rule(f"{path}/bias", tuple(f"{s}.bias" for s in stem), keep, stacked=True))
    return rules


def intern_vit_rules(num_layers: int) -> list[Rule]:
    """Rules for an InternViT under OpenGVLab's names; query, key and value are one matrix there."""

    def third(index: int) -> Transform:
        return lambda tensor: np.split(tensor, 3)[index].T

    rules = [
        Rule("vision_tower/class_embed", ("embeddings.class_embedding",), lambda t: t[0]),
        Rule("vision_tower/pos_embed", ("embeddings.position_embedding",), lambda t: t[0]),
        Rule(
            "vision_tower/patch_embed/kernel",
            ("embeddings.patch_embedding.weight",),
            lambda t: t.transpose(2, 3, 1, 0),
        ),
        Rule("vision_tower/patch_embed/bias", ("embeddings.patch_embedding.bias",), keep),
    ]
    blocks: list[tuple[str, str, Transform]] = [
        ("norm1/scale", "norm1.weight", keep),
        ("norm2/scale", "norm2.weight", keep),
        ("scale1", "ls1", keep),
        ("scale2", "ls2", keep),
        *((f"attn/{name}/kernel", "attn.qkv.weight", third(i)) for i, name in enumerate("qkv")),
        ("attn/q_norm/scale", "attn.q_norm.weight", keep),
        ("attn/k_norm/scale", "attn.k_norm.weight", keep),
        ("attn/o/kernel", "attn.proj.weight", transpose),
        ("attn/o/bias", "attn.proj.bias", keep),
        *((f"mlp/{name}/kernel", f"mlp.{name}.weight", transpose) for name in ("fc1", "fc2")),
        *((f"mlp/{name}/bias", f"mlp.{name}.bias", keep) for name in ("fc1", "fc2")),
    ]
    for target, source, transform in blocks:
        names = tuple(f"encoder.layers.{layer}.{source}" for layer in range(num_layers))
        rules.append(Rule(f"vision_tower/blocks/{target}", names, transform, stacked=True))
    return rules


def projector_rules(kind: str, plan: Plan) -> list[Rule]:
    """Rules for VILA's `mm_projector`, a torch.nn.Sequential: members without weights count, too.

    Args:
      kind: `mm_projector_type`.
      plan: what that means.
    """
    rules = []
    place = 1 if plan.block > 1 else 0  # the joining of patches comes first
    for layer in range(1, plan.depth + 1):
        if layer <= plan.norms:
            rules.append(Rule(f"projector/norm{layer}/scale", (f"layers.{place}.weight",), keep))
            rules.append(Rule(f"projector/norm{layer}/bias", (f"layers.{place}.bias",), keep))
            place += 1
        stem = "layers" if kind == "linear" else f"layers.{place}"
        rules.append(Rule(f"projector/fc{layer}/kernel", (f"{stem}.weight",), transpose))
        rules.append(Rule(f"projector/fc{layer}/bias", (f"{stem}.bias",), keep))
        place += 2  # GELU
    return rules


def _pooling_attention(one: Callable[[str, str, Transform], Rule]) -> list[Rule]:
    """PyTorch's MultiheadAttention keeps query, key and value in one tensor, in this order."""
    rules = []
    for index, name in enumerate("qkv"):

        def third(tensor: np.ndarray, index: int = index) -> np.ndarray:
            return np.split(tensor, 3)[index].T

        rules.append(one(f"head/attn/{name}/kernel", "head.attention.in_proj_weight", third))
        rules.append(one(f"head/attn/{name}/bias", "head.attention.in_proj_bias", third))
    return rules
