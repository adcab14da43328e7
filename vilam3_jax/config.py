"""Run configurations: load, override, check, snapshot.

A recipe is a Python file with `get_config(arg)` that starts from `base_config()` and says only what differs.
`load` accepts what the command line accepts: `configs/stage3_instruct.py:tiny`.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.resources
import json
import re
import runpy
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from vilam3_jax.errors import UserError

if TYPE_CHECKING:

    class ConfigDict:
        """ml_collections declares every value as a union of all types, which no use of a value fits."""

        def __init__(self, initial: Any = None) -> None: ...
        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...
        def __getitem__(self, key: str) -> Any: ...
        def __setitem__(self, key: str, value: Any) -> None: ...
        def get(self, key: str, default: Any = None) -> Any: ...
        def __contains__(self, key: str) -> bool: ...
        def __iter__(self) -> Iterator[str]: ...

else:
    ConfigDict = ml_collections.ConfigDict

MESH_AXES = ("data", "fsdp", "context", "tensor")
ATTENTIONS = ("auto", "xla", "splash", "cudnn", "ring")
QUANTIZED_MATMULS = ("int8", "fp8")
QUANTIZED_KERNELS = ("int8", "nf4")
IMAGE_MODES = ("resize", "pad", "dynamic", "dynamic_s2")
WRITERS = ("tensorboard", "wandb", "mlflow")
MAX_SCALE = 8  # times the tower's size
MAX_TILES = MAX_SCALE**2
# Name → settings for the moments that it keeps.
OPTIMIZERS = {
    "adamw": ("mu_dtype", "nu_dtype"),
    "adafactor": (),
    "lion": ("mu_dtype",),
    "muon": ("mu_dtype", "nu_dtype"),
}
COMPONENTS = ("vision_tower", "text_tower", "projector", "llm", "everything")

# Weights are split over `fsdp` on one dimension and over `tensor` on the other; small vectors are replicated.
# The stacked layer axis leads and is never split. A row may go on with placements for parameters whose
# dimensions do not divide by the one before: VILA's vocabularies are odd (128,257).
PARAMETER_RULES = (
    (r"llm/embed/embedding", ("tensor", "fsdp"), (None, ("fsdp", "tensor"))),
    (r"llm/lm_head/kernel", ("fsdp", "tensor"), (("fsdp", "tensor"), None)),
    (r"llm/layers/attn/[qkv]/kernel", (None, "fsdp", "tensor")),
    (r"llm/layers/attn/o/kernel", (None, "tensor", "fsdp")),
    (r"llm/layers/mlp/(gate|up)/kernel", (None, "fsdp", "tensor")),
    (r"llm/layers/mlp/down/kernel", (None, "tensor", "fsdp")),
    (r"llm/layers/.*/lora_a", (None, "fsdp", None)),
    (r"llm/layers/.*/lora_b", (None, None, "fsdp")),
    (r"(vision|text)_tower/blocks/attn/[qkv]/kernel", (None, "fsdp", "tensor")),
    (r"(vision|text)_tower/blocks/attn/o/kernel", (None, "tensor", "fsdp")),
    (r"(vision|text)_tower/blocks/mlp/fc1/kernel", (None, "fsdp", "tensor")),
    (r"(vision|text)_tower/blocks/mlp/fc2/kernel", (None, "tensor", "fsdp")),
    (r"vision_tower/patch_embed/kernel", (None, None, None, "fsdp")),
    (r"text_tower/(embed/embedding|head/kernel)", (None, "fsdp")),
    (r"vision_tower/head/(attn/[qkv]|mlp/fc1)/kernel", ("fsdp", "tensor")),
    (r"vision_tower/head/(attn/o|mlp/fc2)/kernel", ("tensor", "fsdp")),
    (r"projector/(fc\d*|linear)/kernel", ("fsdp", "tensor")),
    (r".*(scale[12]?|bias|pos_embed|class_embed|probe|logit_\w+)", ()),
)

ACTIVATION_RULES = {
    "batch": ("data", "fsdp"),
    "length": "context",
    "embed": None,
    "heads": "tensor",
    "kv_heads": "tensor",
    # Where heads do not divide by `tensor`, set both to "" and this to "tensor": each device then attends
    # for a part of the queries instead of all.
    "queries": "",
    "mlp": "tensor",
    "vocab": "tensor",
    # Vision and text towers have rules of their own where these name mesh axes ("" for none).
    "tower_heads": "heads",
    "tower_queries": "queries",
    "tower_mlp": "mlp",
}


def base_config() -> ConfigDict:
    """What every run shares. A recipe overrides; a key that is not here (or in the model) is refused."""
    return ConfigDict(
        dict(
            name="",
            kind="generative",
            seed=0,
            model=ConfigDict(),
            init={component: "" for component in COMPONENTS},
            data=dict(
                path="",
                annotations="",
                mixture=(),
                experts="off",
                expert_share=0.75,
                missing_annotation="skip",
                volume_slices=4,
                slice_choice="even",
                dialogue_parity=False,
                dialogue_min_lesion_ml=0.1,
                augment=False,
                seq_len=512,
                rows_per_group=1,
                images_per_group=4,
                global_rows=8,
                loader_shards=8,
                text_len=32,
                global_pairs=64,
                workers=0,
            ),
            mesh=dict(data=1, fsdp=-1, context=1, tensor=1, cpu_devices=0),
            parameter_rules=PARAMETER_RULES,
            activation_rules=dict(ACTIVATION_RULES),
            attention="auto",
            trainable=((r".*", 1.0),),
            optimizer=dict(
                name="adamw",
                b1=0.9,
                b2=0.98,
                eps=1e-8,
                weight_decay=0.0,
                clip_norm=1.0,
                muon_momentum=0.95,
                mu_dtype="",
                nu_dtype="",
            ),
            # A step whose gradient is not finite, or (spike > 0) longer than `spike` times the median of the
            # last `window` ones, changes nothing; `limit` of them in a row end the run.
            skip=dict(spike=0.0, window=64, limit=20),
            ema_decay=0.0,
            schedule=dict(name="cosine", peak=1e-4, warmup_fraction=0.03, end_fraction=0.1),
            # Products of these modules: '', 'int8' or 'fp8'; `gradients`: those of the backward pass, too.
            # `frozen`: how their kernels are stored, which may not learn: '', 'int8' or 'nf4'.
            quantization=dict(matmul="", gradients=False, frozen="", modules=r"llm/layers/.*"),
            num_steps=100,
            grad_accum=1,
            loss_chunk=1024,
            # Rows of (name, value), over those of `program.compiler_options`.
            compiler_options=(),
            eval_every=0,
            eval_batches=4,
            eval_generate=0,
            checkpoint_every=0,
            checkpoints_kept=2,
            checkpoints_kept_every=0,
            log_every=1,
            telemetry=dict(
                writers=(), project="vilam3_jax", wandb_offline=False, stall_seconds=1800.0, profile_steps=()
            ),
        )
    )


def configs_root() -> Path:
    """Folder with the shipped recipes, in the source tree or in the installed package."""
    return Path(str(importlib.resources.files("vilam3_jax.configs")))


def recipe_path(spec: str) -> str:
    """Resolves `configs/stage3_instruct.py:arg` to a file that exists, in the working folder or as shipped.

    Raises:
      UserError: there is no such recipe.
    """
    path, separator, argument = spec.partition(":")
    candidates = [Path(path)]
    parts = Path(path).parts
    if parts and parts[0] == "configs":
        candidates.append(configs_root().joinpath(*parts[1:]))
    for candidate in candidates:
        if candidate.is_file():
            return f"{candidate}{separator}{argument}"
    known = sorted(str(p.relative_to(configs_root())) for p in configs_root().glob("**/stage*.py"))
    raise UserError(f"{path}: no such config; shipped ones are configs/ + {', '.join(known)}")


def usage(command: str, needs: str, purpose: str, values: flags.FlagValues, names: Sequence[str]) -> str:
    """The help of a command that takes a recipe: its form, its purpose, and the named flags of `values`."""
    lines = [
        f"usage: vilam3 {command} --config=FILE[:ARG] {needs} [--config.KEY=VALUE ...]",
        "",
        purpose,
        "",
        "  --config=FILE[:ARG]  recipe and its argument, such as configs/stage3_instruct.py:tiny",
        "  --config.KEY=VALUE   change one key, such as --config.num_steps=10 or --config.mesh.fsdp=4",
    ]
    return "\n".join(lines + [f"  --{name:<18} {values[name].help}" for name in names])


def parse(argv: Sequence[str], flag_values: flags.FlagValues) -> ConfigDict:
    """Parses `--config=FILE:ARG --config.key=value` and the flags already defined on `flag_values`.

    Raises:
      UserError: an unknown flag or config key (with the nearest known name), or a value of the wrong type.
    """
    argv = _with_recipes(argv)
    config_flags.DEFINE_config_file("config", lock_config=True, flag_values=flag_values, sys_argv=["", *argv])
    try:
        left = flag_values(["vilam3", *argv])[1:]
    except (flags.UnrecognizedFlagError, AttributeError, KeyError) as error:
        raise UserError(_unknown_key(argv, error)) from error
    except flags.Error as error:
        raise UserError(" ".join(str(error).split())) from error
    except (TypeError, ValueError) as error:
        raise UserError(f"config: {' '.join(str(error).split())}") from error
    if left:
        raise UserError(
            f"{' '.join(left)}: not understood; options begin with --, such as --config.num_steps=7"
        )
    config = flag_values["config"].value
    if config is None:
        raise UserError(
            "--config=FILE[:ARG] is missing, for example --config=configs/stage3_instruct.py:tiny"
        )
    _name_rows(config)
    check(config)
    return config


def _with_recipes(argv: Sequence[str]) -> list[str]:
    """The arguments with `--config=FILE[:ARG]` for a file that exists and makes a config."""
    found, rest = [], iter(argv)
    for item in rest:
        name, separator, spec = item.partition("=")
        if name not in ("--config", "-config"):
            found.append(item)
            continue
        spec = recipe_path(spec if separator else next(rest, ""))
        _check_recipe(*spec.split(":", 1))
        found.append(f"--config={spec}")
    return found


def _check_recipe(path: str, *argument: str) -> None:
    """Runs a recipe by itself, so that its errors are told from those of overrides."""
    made = None
    try:
        recipe = runpy.run_path(path)
        if "get_config" not in recipe:
            raise UserError(f"{path}: is no recipe, as it has no get_config(arg)")
        made = recipe["get_config"](*argument)
    except UserError:
        raise
    except Exception as error:  # a recipe is a program, which fails as programs do
        lines = [
            frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path
        ]
        place = f"{path}:{lines[-1]}" if lines else path
        raise UserError(f"{place}: the recipe fails, {type(error).__name__}: {error}") from error
    if not isinstance(made, ml_collections.ConfigDict):
        raise UserError(f"{path}: get_config must return a ConfigDict; start from config.base_config()")


def load(spec: str, overrides: Mapping[str, Any] | None = None) -> ConfigDict:
    """Loads a recipe in Python, as `parse` does for the command line.

    Args:
      spec: `FILE[:ARG]`.
      overrides: dotted key → value.
    """
    config = parse([f"--config={spec}"], flags.FlagValues())
    if overrides:
        for key in overrides:
            if key not in flatten(config) and not _is_section(config, key):
                raise UserError(f"config key {key}: unknown{_suggest(key, flatten(config))}")
        values = dict(overrides)
        if isinstance(values.get("data.mixture"), str):
            values["data.mixture"] = (values["data.mixture"],)
        config.update_from_flattened_dict(values)
        _name_rows(config)
        check(config)
    return config


_STAGE_OF_PAIRS = "stage1_vision"


def _name_rows(config: ConfigDict) -> None:
    """Puts the rows of a mixture in the place of its name, so that a run's config says what it sees."""
    from vilam3_jax.configs import mixtures  # recipes import this module

    for row in config.data.mixture:
        stage = mixtures.get(row).stage if isinstance(row, str) else ""
        if stage and (stage == _STAGE_OF_PAIRS) != (config.kind == "contrastive"):
            raise UserError(
                f"config data.mixture: {row!r} is for {stage}, but this run has kind={config.kind!r}"
            )
    config.data.mixture = mixtures.rows_of(tuple(config.data.mixture))


# Key → the least and the most that it may be; None: no bound.
_BOUNDS: dict[str, tuple[float, float | None]] = {
    "grad_accum": (1, None),
    "loss_chunk": (1, None),
    "eval_every": (0, None),
    "eval_batches": (1, None),
    "checkpoint_every": (0, None),
    "data.seq_len": (1, None),
    "data.text_len": (1, None),
    "data.rows_per_group": (1, None),
    "data.images_per_group": (0, None),
    "data.global_rows": (1, None),
    "data.global_pairs": (1, None),
    "data.loader_shards": (1, None),
    "data.workers": (0, None),
    "data.volume_slices": (1, None),
    "mesh.cpu_devices": (0, None),
    "seed": (0, 2**32 - 1),
    "schedule.peak": (0, None),
    "schedule.warmup_fraction": (0, 1),
    "schedule.end_fraction": (0, 1),
    "optimizer.clip_norm": (0, None),
    "optimizer.weight_decay": (0, None),
    "optimizer.eps": (0, None),
    "optimizer.b1": (0, 0.9999999),
    "optimizer.b2": (0, 0.9999999),
}


# Sizes in any part of `model`.
_SIZES = ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "vocab_size")
_SIZES += ("image_size", "patch_size", "max_length", "max_positions")
_DTYPES = ("float32", "bfloat16")


def _check_bounds(config: ConfigDict) -> None:
    values = flatten(config)
    for key, value in flatten(config.model, "model.").items():
        if key.rpartition(".")[2] in _SIZES and not value >= 1:
            raise UserError(f"config {key}={value}: must be at least 1")
    for key in ("dtype", "param_dtype"):
        if config.model.get(key, "float32") not in _DTYPES:
            raise UserError(f"config model.{key}={config.model[key]!r}: must be {' or '.join(_DTYPES)}")
    for key, (least, most) in _BOUNDS.items():
        if not values[key] >= least or (most is not None and not values[key] <= most):
            bound = f"at least {least:g}" if most is None else f"from {least:g} to {most:g}"
            raise UserError(f"config {key}={values[key]}: must be {bound}")


def _check_activation_rules(rules: Mapping[str, Any]) -> None:
    """Batches lie over `data` and `fsdp`, rows over `context`; the rest of an array may lie over `tensor`."""

    def mesh_axes(name: str) -> tuple[str, ...]:
        axes, shared = rules[name], name.removeprefix("tower_")
        if shared != name and axes == shared:
            return mesh_axes(shared)
        return (axes,) if isinstance(axes, str) and axes else tuple(axes or ())

    own = {"batch": [ACTIVATION_RULES["batch"]], "length": [(), ("context",)]}
    for name, axes in rules.items():
        allowed = own.get(name, [(), ("tensor",)])
        if mesh_axes(name) not in allowed:
            choices = [" and ".join(choice) or "'' for none" for choice in reversed(allowed)]
            as_shared = f", or {name.removeprefix('tower_')!r}" if name.startswith("tower_") else ""
            raise UserError(
                f"config activation_rules.{name}={axes!r}: must be {' or '.join(choices)}{as_shared}"
            )
    for tower in ("", "tower_"):
        if mesh_axes(f"{tower}heads") and mesh_axes(f"{tower}queries"):
            raise UserError(
                f"config activation_rules: {tower}heads and {tower}queries cannot both lie over tensor; set "
                "one to ''"
            )


def check(config: ConfigDict) -> None:
    """Refuses a config that cannot run, with the key and the fix."""
    if "llm" not in config.model:
        raise UserError("config model: names no model; set it in the recipe, to one of configs/models")
    _check_bounds(config)
    _check_activation_rules(config.activation_rules.to_dict())
    if config.kind not in ("generative", "contrastive"):
        raise UserError(f"config kind={config.kind!r}: must be 'generative' or 'contrastive'")
    if config.data.experts not in ("on", "off", "mixed", "falsified"):
        raise UserError(f"config data.experts={config.data.experts!r}: on, off, mixed or falsified")
    if config.num_steps < 1:
        raise UserError(f"config num_steps={config.num_steps}: must be at least 1")
    if config.checkpoints_kept < 1 or config.checkpoints_kept_every < 0:
        raise UserError(
            f"config checkpoints_kept={config.checkpoints_kept}, "
            f"checkpoints_kept_every={config.checkpoints_kept_every}: keep at least the newest one; 0 for "
            "checkpoints_kept_every keeps no others"
        )
    if config.schedule.name not in ("cosine", "constant"):
        raise UserError(f"config schedule.name={config.schedule.name!r}: cosine or constant")
    if config.attention not in ATTENTIONS:
        raise UserError(f"config attention={config.attention!r}: must be one of {', '.join(ATTENTIONS)}")
    for row in config.compiler_options:
        pair = isinstance(row, tuple | list) and len(row) == 2 and isinstance(row[0], str)
        if not pair or not isinstance(row[1], str | bool | int | float):
            raise UserError(
                f"config compiler_options: {row!r} is no row (name, value); write (('xla_option', True),)"
            )
    _check_telemetry(config)
    _check_optimizer(config)
    _check_quantization(config)
    image_layout(config.model)
    if config.kind == "contrastive" and config.grad_accum != 1:
        raise UserError(
            f"config grad_accum={config.grad_accum}: a contrastive run compares all pairs of a batch, "
            "so it must be 1"
        )
    rows, group = config.data.global_rows, config.data.rows_per_group
    if config.kind == "generative" and rows % (group * config.grad_accum):
        raise UserError(
            f"config data.global_rows={rows} does not divide into groups of data.rows_per_group={group} "
            f"times grad_accum={config.grad_accum}"
        )


def _check_telemetry(config: ConfigDict) -> None:
    unknown = sorted({str(name) for name in config.telemetry.writers} - set(WRITERS))
    if unknown:
        raise UserError(
            f"config telemetry.writers names {', '.join(unknown)}; known are {', '.join(WRITERS)}"
        )
    if config.log_every < 1:
        raise UserError(f"config log_every={config.log_every}: must be at least 1")
    if config.telemetry.stall_seconds < 0:
        raise UserError(f"config telemetry.stall_seconds={config.telemetry.stall_seconds}: 0 (off) or more")
    steps = tuple(config.telemetry.profile_steps)
    whole = all(isinstance(step, int) for step in steps)
    if steps and not (len(steps) == 2 and whole and 1 <= steps[0] <= steps[1]):
        raise UserError(
            f"config telemetry.profile_steps={steps}: must be the first and the last step to trace, such as "
            "(10, 12)"
        )
    possible = config.kind == "generative" and config.eval_every
    if config.eval_generate < 0 or (config.eval_generate and not possible):
        raise UserError(
            f"config eval_generate={config.eval_generate}: must be 0, or for a generative run with "
            "eval_every the number of held-out examples to answer"
        )


def _check_optimizer(config: ConfigDict) -> None:
    settings, skip = config.optimizer, config.skip
    if settings.name not in OPTIMIZERS:
        raise UserError(f"config optimizer.name={settings.name!r}: {', '.join(OPTIMIZERS)}")
    kept = OPTIMIZERS[settings.name]
    for key in ("mu_dtype", "nu_dtype"):
        if settings[key] not in ("", "float32", "bfloat16"):
            raise UserError(f"config optimizer.{key}={settings[key]!r}: 'float32', 'bfloat16' or ''")
        if settings[key] and key not in kept:
            raise UserError(f"config optimizer.{key}: {settings.name} keeps no such moment; leave it empty")
    if settings.nu_dtype == "bfloat16" and settings.b2 > 0.99:
        raise UserError(
            f"config optimizer.nu_dtype='bfloat16' with b2={settings.b2}: a step's change is less than "
            "bfloat16 can hold, the second moment would never move; set b2 to 0.99 or less, or nu_dtype to ''"
        )
    if not 0 <= config.ema_decay < 1:
        raise UserError(f"config ema_decay={config.ema_decay}: must be 0 (off) or more, and less than 1")
    if skip.spike and skip.spike <= 1:
        raise UserError(f"config skip.spike={skip.spike}: must be 0 (off) or more than 1")
    if skip.window < 1 or skip.limit < 1:
        raise UserError(f"config skip.window={skip.window}, skip.limit={skip.limit}: must be at least 1")


def _check_quantization(config: ConfigDict) -> None:
    settings = config.quantization
    for key, known in (("matmul", QUANTIZED_MATMULS), ("frozen", QUANTIZED_KERNELS)):
        if settings[key] not in ("", *known):
            names = " or ".join(map(repr, known))
            raise UserError(f"config quantization.{key}={settings[key]!r}: '', {names}")
    if settings.gradients and not settings.matmul:
        raise UserError("config quantization.gradients=True needs quantization.matmul")
    if settings.matmul and settings.frozen:
        raise UserError(
            f"config quantization.matmul={settings.matmul!r} and frozen={settings.frozen!r}: a kernel "
            "that is stored quantised is multiplied dequantised; leave one of them empty"
        )
    try:
        re.compile(settings.modules)
    except re.error as error:
        raise UserError(
            f"config quantization.modules={settings.modules!r} is no regular expression: {error}"
        ) from error


@dataclasses.dataclass(frozen=True)
class ImageLayout:
    """How a model takes pictures; made by `image_layout`.

    Attributes:
      mode: one of `IMAGE_MODES`.
      tile_size: S, side in pixels of what the vision tower sees.
      scales: sides at which a picture is encoded (S2); empty for once, at S.
      max_tiles: most tiles of a picture ('dynamic', 'dynamic_s2'), its thumbnail or lower scales not counted.
    """

    mode: str
    tile_size: int
    scales: tuple[int, ...] = ()
    max_tiles: int = 1

    @property
    def input_size(self) -> int:
        """Side in pixels of the model's inputs."""
        whole = self.scales and self.mode != "dynamic_s2"
        return self.scales[-1] if whole else self.tile_size

    @property
    def feature_maps(self) -> int:
        """How many of the tower's maps stand side by side before the projector."""
        return max(len(self.scales), 1)


def image_layout(model: ConfigDict) -> ImageLayout:
    """Reads `image_aspect_ratio`, `s2_scales` and `max_tiles` of a `config.model`, which older exports lack.

    Raises:
      UserError: an unknown mode, an absurd number of tiles, or scales that do not fit the tower or the mode.
    """
    mode = model.get("image_aspect_ratio", "resize")
    size = int(model.image_size if "image_size" in model else model.vision_tower.image_size)
    scales = tuple(model.get("s2_scales", ()))
    if mode not in IMAGE_MODES:
        raise UserError(f"config model.image_aspect_ratio={mode!r}: use one of {', '.join(IMAGE_MODES)}")
    if scales:
        _check_scales(scales, size)
    if mode not in ("dynamic", "dynamic_s2"):
        return ImageLayout(mode, size, scales)
    if mode == "dynamic_s2" and not scales:
        raise UserError(
            "config model.s2_scales is empty, but image_aspect_ratio='dynamic_s2' needs scales, such as "
            f"({size}, {2 * size}, {3 * size})"
        )
    if mode == "dynamic" and scales:
        raise UserError(
            f"config model.s2_scales={scales}: image_aspect_ratio='dynamic' has no scales; leave them empty"
        )
    tiles = model.get("max_tiles", 12)
    if not isinstance(tiles, int) or not 1 <= tiles <= MAX_TILES:
        raise UserError(f"config model.max_tiles={tiles!r}: must be 1 to {MAX_TILES}")
    least = (scales[-1] // size) ** 2 if scales else 1
    if 1 < tiles < least:
        raise UserError(
            f"config model.max_tiles={tiles}: the last of s2_scales={scales} alone has {least} tiles; set it "
            f"to {least} or more, or to 1 for no tiles"
        )
    return ImageLayout(mode, size, scales, tiles)


def _check_scales(scales: tuple[int, ...], size: int) -> None:
    whole = all(isinstance(scale, int) and not scale % size for scale in scales)
    rising = sorted(set(scales)) == list(scales)
    if len(scales) < 2 or not whole or not rising or scales[0] != size:
        raise UserError(
            f"config model.s2_scales={scales}: must be two or more rising multiples of the tower's {size} "
            f"pixels, the first of them {size}, such as ({size}, {2 * size})"
        )
    if scales[-1] > MAX_SCALE * size:
        raise UserError(
            f"config model.s2_scales={scales}: the last is {scales[-1] // size} times the tower's {size} "
            f"pixels, {(scales[-1] // size) ** 2} tiles an image; at most {MAX_SCALE} times is supported"
        )


def flatten(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Dotted key → leaf value."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def snapshot(config: ConfigDict) -> str:
    """The fully resolved config as sorted `key: value` lines; stored with runs and diffed in tests."""
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in sorted(flatten(config).items()))


def to_json(config: ConfigDict) -> str:
    """The config as JSON (tuples become lists)."""
    return json.dumps(config.to_dict(), indent=1, sort_keys=True)


def _is_section(config: ConfigDict, key: str) -> bool:
    return any(known.startswith(key + ".") for known in flatten(config))


def _suggest(key: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def _unknown_key(argv: Sequence[str], error: Exception) -> str:
    """Names the overridden key that the recipe lacks."""
    spec = next((a.split("=", 1)[1] for a in argv if a.startswith("--config=")), "")
    try:
        known = flatten(load(spec)) if spec else {}
    except (UserError, AttributeError, KeyError):
        known = {}
    for item in argv:
        if item.startswith("--config."):
            key = item[len("--config.") :].split("=", 1)[0]
            if known and key not in known:
                return f"config key {key}: unknown{_suggest(key, known)}"
    return f"config {spec}: {' '.join(str(error).split())}"
