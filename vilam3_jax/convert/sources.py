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

Shape = tuple[int, ...]
Index = tuple[slice, ...]


@dataclass(frozen=True)
class Layout:
    """How a foreign tensor holds an array of ours; reads in one direction, writes in the other.

    Foreign → ours: one of `parts` equal parts of the first axis, its axes reordered; or all of it, without a
    leading axis of 1.

    Attributes:
      axes: foreign axis of each of ours; None keeps their order.
      part: which part of the first axis is ours.
      parts: number of them.
      leading: the foreign tensor has one more axis in front, of size 1; not with the others.
    """

    axes: tuple[int, ...] | None = None
    part: int = 0
    parts: int = 1
    leading: bool = False

    def ours(self, shape: Shape) -> Shape | None:
        """Returns the shape of ours in a foreign tensor of `shape`; None if it cannot be there."""
        if self.leading:
            return shape[1:] if shape[:1] == (1,) else None
        if not shape or shape[0] % self.parts or (self.axes and len(self.axes) != len(shape)):
            return None
        shape = (shape[0] // self.parts, *shape[1:])
        return tuple(shape[axis] for axis in self.axes) if self.axes else shape

    def foreign(self, shape: Shape) -> Shape:
        """Returns the shape of the whole foreign tensor for ours of `shape`."""
        if self.leading:
            return (1, *shape)
        shape = self._reordered(shape)
        return (shape[0] * self.parts, *shape[1:])

    def read(self, rows: Callable[[int, int], np.ndarray], shape: Shape, where: Index) -> np.ndarray:
        """Reads a block of ours, and no more foreign rows than it needs.

        Args:
          rows: gives rows start to stop of the foreign tensor's first axis.
          shape: of ours.
          where: a slice with a start and a stop for each axis of ours.

        Returns:
          The block, usually a view that is not contiguous.
        """
        if self.leading:
            return rows(0, 1)[0][where]
        foreign = self._reordered(where)
        offset = self.part * self._reordered(shape)[0]
        block = rows(offset + foreign[0].start, offset + foreign[0].stop)[(slice(None), *foreign[1:])]
        return block.transpose(self.axes) if self.axes else block

    def write(self, array: np.ndarray) -> tuple[np.ndarray, int]:
        """Returns what the foreign tensor holds of `array`, ours and whole, and from which row on."""
        if self.leading:
            return array[None], 0
        if self.axes:
            array = array.transpose(np.argsort(self.axes))
        return array, self.part * array.shape[0]

    def _reordered(self, ours: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(ours[place] for place in np.argsort(self.axes)) if self.axes else ours


KEEP = Layout()
TRANSPOSE = Layout(axes=(1, 0))  # PyTorch's [out, in] → our [in, out]
LEADING = Layout(leading=True)
PATCHES = Layout(axes=(2, 3, 1, 0))  # PyTorch's [out, in, height, width] → [height, width, in, out]


@dataclass(frozen=True)
class Rule:
    """Where one parameter of ours comes from, and where it goes on export.

    Attributes:
      target: path of the parameter.
      sources: tensor names; one per layer where `stacked`, else exactly one.
      layout: how each of these tensors holds it.
      stacked: the parameter has a leading layer axis.
    """

    target: str
    sources: tuple[str, ...]
    layout: Layout
    stacked: bool = False


class Reader(Protocol):
    """Reads rows `start` to `stop` (of the first axis) of one tensor, in the source's layout, as floats."""

    def __call__(self, name: str, start: int, stop: int) -> np.ndarray: ...


@dataclass
class Source:
    """One opened checkpoint of one component.

    Attributes:
      component: 'llm', 'vision_tower' or 'projector', the key of its parameters in ours; or 'contrastive'
        for all of a two-tower model.
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
      kind: 'generative', 'contrastive', or the component's name.
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

    @property
    def tokenizer_folder(self) -> Path | None:
        """Where it is kept; the folder of the part's first file."""
        return next((part.files[0].parent for part in self.parts if part.tokenizer), None)


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


def llama_rules(config: Mapping[str, Any]) -> list[Rule]:
    """Rules for a Llama, Qwen2 or Qwen3 decoder under Hugging Face's names.

    Query and key columns are in the rotate-half layout, as Hugging Face stores them.

    Args:
      config: our `llm` section: its `num_layers`, `tie_embeddings` (there is no `lm_head`), `qkv_bias`,
        `o_bias` and `qk_norm`.
    """
    rules = [
        Rule("llm/embed/embedding", ("model.embed_tokens.weight",), KEEP),
        Rule("llm/final_norm/scale", ("model.norm.weight",), KEEP),
    ]
    if not config["tie_embeddings"]:
        rules.append(Rule("llm/lm_head/kernel", ("lm_head.weight",), TRANSPOSE))
    biased = "qkv" * config.get("qkv_bias", False) + "o" * config.get("o_bias", False)
    normed = "qk" * config.get("qk_norm", False)
    layers: list[tuple[str, str, Layout]] = [
        ("attn_norm/scale", "input_layernorm.weight", KEEP),
        ("mlp_norm/scale", "post_attention_layernorm.weight", KEEP),
        *((f"attn/{name}/kernel", f"self_attn.{name}_proj.weight", TRANSPOSE) for name in "qkvo"),
        *((f"attn/{name}/bias", f"self_attn.{name}_proj.bias", KEEP) for name in biased),
        *((f"attn/{name}_norm/scale", f"self_attn.{name}_norm.weight", KEEP) for name in normed),
        *((f"mlp/{name}/kernel", f"mlp.{name}_proj.weight", TRANSPOSE) for name in ("gate", "up", "down")),
    ]
    for target, source, layout in layers:
        names = tuple(f"model.layers.{layer}.{source}" for layer in range(config["num_layers"]))
        rules.append(Rule(f"llm/layers/{target}", names, layout, stacked=True))
    return rules


def siglip_rules(num_layers: int, prefix: str, with_head: bool) -> list[Rule]:
    """Rules for a SigLIP vision tower under Hugging Face's names.

    Args:
      num_layers: encoder layers.
      prefix: what stands before `embeddings.` in the source's names.
      with_head: the source has the attention-pooling head.
    """
    to = "vision_tower/"
    rules = [
        Rule(f"{to}patch_embed/kernel", (f"{prefix}embeddings.patch_embedding.weight",), PATCHES),
        Rule(f"{to}patch_embed/bias", (f"{prefix}embeddings.patch_embedding.bias",), KEEP),
        Rule(f"{to}pos_embed", (f"{prefix}embeddings.position_embedding.weight",), KEEP),
        *_norm(f"{to}post_norm", f"{prefix}post_layernorm"),
        *_encoder(f"{to}blocks", f"{prefix}encoder", num_layers),
    ]
    if with_head:
        rules += [
            Rule(f"{to}head/probe", (f"{prefix}head.probe",), KEEP),
            *_pooling_attention(f"{to}head/attn", f"{prefix}head.attention"),
            *_norm(f"{to}head/norm", f"{prefix}head.layernorm"),
            *_dense(f"{to}head/mlp/fc1", f"{prefix}head.mlp.fc1"),
            *_dense(f"{to}head/mlp/fc2", f"{prefix}head.mlp.fc2"),
        ]
    return rules


def siglip_text_rules(num_layers: int) -> list[Rule]:
    """Rules for what a two-tower SigLIP has beside its vision tower."""
    to, prefix = "text_tower/", "text_model."
    return [
        Rule(f"{to}embed/embedding", (f"{prefix}embeddings.token_embedding.weight",), KEEP),
        Rule(f"{to}pos_embed", (f"{prefix}embeddings.position_embedding.weight",), KEEP),
        *_encoder(f"{to}blocks", f"{prefix}encoder", num_layers),
        *_norm(f"{to}final_norm", f"{prefix}final_layer_norm"),
        *_dense(f"{to}head", f"{prefix}head"),
        Rule("logit_scale", ("logit_scale",), LEADING),
        Rule("logit_bias", ("logit_bias",), LEADING),
    ]


def _dense(target: str, source: str) -> list[Rule]:
    return [
        Rule(f"{target}/kernel", (f"{source}.weight",), TRANSPOSE),
        Rule(f"{target}/bias", (f"{source}.bias",), KEEP),
    ]


def _norm(target: str, source: str) -> list[Rule]:
    return [
        Rule(f"{target}/scale", (f"{source}.weight",), KEEP),
        Rule(f"{target}/bias", (f"{source}.bias",), KEEP),
    ]


def _encoder(target: str, source: str, num_layers: int) -> list[Rule]:
    """The blocks of either tower."""
    blocks = {
        "norm1": ("layer_norm1", "scale", KEEP),
        "norm2": ("layer_norm2", "scale", KEEP),
        **{f"attn/{name}": (f"self_attn.{name}_proj", "kernel", TRANSPOSE) for name in "qkv"},
        "attn/o": ("self_attn.out_proj", "kernel", TRANSPOSE),
        "mlp/fc1": ("mlp.fc1", "kernel", TRANSPOSE),
        "mlp/fc2": ("mlp.fc2", "kernel", TRANSPOSE),
    }
    rules = []
    for ours, (theirs, weight, layout) in blocks.items():
        stems = [f"{source}.layers.{layer}.{theirs}" for layer in range(num_layers)]
        path = f"{target}/{ours}"
        rules.append(Rule(f"{path}/{weight}", tuple(f"{s}.weight" for s in stems), layout, stacked=True))
        rules.append(Rule(f"{path}/bias", tuple(f"{s}.bias" for s in stems), KEEP, stacked=True))
    return rules


def _pooling_attention(target: str, source: str) -> list[Rule]:
    """PyTorch's MultiheadAttention keeps query, key and value in one tensor, in this order."""
    rules = _dense(f"{target}/o", f"{source}.out_proj")
    for part, name in enumerate("qkv"):
        kernel, bias = Layout(axes=(1, 0), part=part, parts=3), Layout(part=part, parts=3)
        rules.append(Rule(f"{target}/{name}/kernel", (f"{source}.in_proj_weight",), kernel))
        rules.append(Rule(f"{target}/{name}/bias", (f"{source}.in_proj_bias",), bias))
    return rules


def intern_vit_rules(num_layers: int) -> list[Rule]:
    """Rules for an InternViT under OpenGVLab's names; query, key and value are one matrix there."""
    rules = [
        Rule("vision_tower/class_embed", ("embeddings.class_embedding",), LEADING),
        Rule("vision_tower/pos_embed", ("embeddings.position_embedding",), LEADING),
        Rule(
            "vision_tower/patch_embed/kernel",
            ("embeddings.patch_embedding.weight",),
            PATCHES,
        ),
        Rule("vision_tower/patch_embed/bias", ("embeddings.patch_embedding.bias",), KEEP),
    ]
    blocks: list[tuple[str, str, Layout]] = [
        ("norm1/scale", "norm1.weight", KEEP),
        ("norm2/scale", "norm2.weight", KEEP),
        ("scale1", "ls1", KEEP),
        ("scale2", "ls2", KEEP),
        *(
            (f"attn/{name}/kernel", "attn.qkv.weight", Layout(axes=(1, 0), part=i, parts=3))
            for i, name in enumerate("qkv")
        ),
        ("attn/q_norm/scale", "attn.q_norm.weight", KEEP),
        ("attn/k_norm/scale", "attn.k_norm.weight", KEEP),
        ("attn/o/kernel", "attn.proj.weight", TRANSPOSE),
        ("attn/o/bias", "attn.proj.bias", KEEP),
        *((f"mlp/{name}/kernel", f"mlp.{name}.weight", TRANSPOSE) for name in ("fc1", "fc2")),
        *((f"mlp/{name}/bias", f"mlp.{name}.bias", KEEP) for name in ("fc1", "fc2")),
    ]
    for target, source, layout in blocks:
        names = tuple(f"encoder.layers.{layer}.{source}" for layer in range(num_layers))
        rules.append(Rule(f"vision_tower/blocks/{target}", names, layout, stacked=True))
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
            rules.append(Rule(f"projector/norm{layer}/scale", (f"layers.{place}.weight",), KEEP))
            rules.append(Rule(f"projector/norm{layer}/bias", (f"layers.{place}.bias",), KEEP))
            place += 1
        stem = "layers" if kind == "linear" else f"layers.{place}"
        rules.append(Rule(f"projector/fc{layer}/kernel", (f"{stem}.weight",), TRANSPOSE))
        rules.append(Rule(f"projector/fc{layer}/bias", (f"{stem}.bias",), KEEP))
        place += 2  # GELU
    return rules
