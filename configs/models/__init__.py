"""Model sizes as data: one module each, with `get_model()`; parts to swap are in `parts`."""

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict
from vilam3_jax.configs.models.parts import llms, towers

from vilam3_jax.checkpoints import exports
from vilam3_jax.data.preprocessing import Preprocessing, preset_windows
from vilam3_jax.data.text_rules import TextRules
from vilam3_jax.errors import UserError
from vilam3_jax.models.model_config import ModelConfig
from vilam3_jax.runtime import paths


def get(spec: str) -> ConfigDict:
    """Returns the `model` section of a size, with parts swapped if asked for.

    Args:
      spec: `NAME`, or `NAME,tower=TOWER,llm=LLM,projector=TYPE,template=TEMPLATE,text=RULES,windows=PRESET`
        with any of the six; towers and LLMs are those of `parts.towers` and `parts.llms`, RULES is clean,
        as_trained or one rule (`spaces=as_trained`), see `vilam3_jax.data.text_rules`, PRESET is one of
        `vilam3_jax.data.intensity.CT_WINDOWS`. LLM may also be the folder of an imported LLM, see
        `imported_llm`: it brings its shapes and its tokenizer. LoRA settings of the size are kept.

    Raises:
      UserError: an unknown name; lists those there are. Or a folder without an LLM.
    """
    name, *swaps = spec.split(",")
    model = _module(name).get_model()
    model.text = ConfigDict(dataclasses.asdict(TextRules()))
    model.preprocessing = ConfigDict(dataclasses.asdict(Preprocessing()))
    for swap in swaps:
        _swap(model, swap)
    return model


def imported_llm(spec: str) -> str:
    """Folder of the imported LLM in `spec` (`NAME,llm=FOLDER`); '' if it names no LLM or one of `parts.llms`.

    `config.load` and `config.parse` start such a run from its weights.
    """
    parts = [swap.partition("=") for swap in spec.split(",")[1:]]
    folders = [name for part, _, name in parts if part == "llm" and name not in llms.LLMS]
    return folders[-1] if folders else ""


def needs_slice(spec: str) -> bool:
    """Whether a size states that it trains on a slice of accelerators (`NEEDS_SLICE` in its module)."""
    return getattr(_module(spec.split(",")[0]), "NEEDS_SLICE", False)


def adapters_only(model: ConfigDict) -> tuple[tuple[str, float], ...]:
    """Rows of `trainable` by which an LLM with LoRA learns its adapters alone; none for an LLM without."""
    return ((r"llm/.*lora_[ab]", 1.0), (r"llm/.*", 0.0)) if model.llm.lora_rank else ()


def _module(name: str) -> ModuleType:
    known = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg)
    if name not in known:
        raise UserError(f"model {name!r}: unknown; known sizes are {', '.join(known)}")
    return importlib.import_module(f"{__name__}.{name}")


def assemble(name: str, tower: ConfigDict, llm: ConfigDict, *, template: str, **changes: Any) -> ConfigDict:
    """A `model` section: VILA-1.5's layout in bfloat16 with full rematerialization, unless changed.

    Args:
      name: of the size.
      tower: from `parts.towers`.
      llm: from `parts.llms`.
      template: that the LLM was tuned with.
      **changes: other fields of `ModelConfig`.
    """
    values = ModelConfig(name=name, image_size=tower.image_size, template=template).to_dict()
    del values["card_list"]  # only in exports
    parts = dict(
        dtype="bfloat16",
        remat="full",
        vision_tower=tower,
        text_tower=towers.text_tower_of(tower),
        projector=dict(type="mlp_downsample", token_order="column"),
        llm=llm,
    )
    return ConfigDict({**values, **parts, **changes})


def _swap(model: ConfigDict, swap: str) -> None:
    part, _, name = swap.partition("=")
    if part == "llm":
        _swap_llm(model, name)
    elif part == "tower":
        model.vision_tower = _part(towers.TOWERS, "tower", name)
        model.text_tower = towers.text_tower_of(model.vision_tower, **towers.TEXT_CHANGES.get(name, {}))
        model.image_size = model.vision_tower.image_size
    elif part == "projector":
        model.projector.type = name
    elif part == "template":
        model.template = name
    elif part == "text":
        model.text = ConfigDict(dataclasses.asdict(TextRules().changed(name)))
    elif part == "windows":
        model.preprocessing.ct_windows = preset_windows(name)
    else:
        raise UserError(f"model part {swap!r}: use tower=, llm=, projector=, template=, text= or windows=")


def _swap_llm(model: ConfigDict, name: str) -> None:
    lora = {key: value for key, value in model.llm.items() if key.startswith("lora_")}
    if name in llms.LLMS:
        model.llm = llms.LLMS[name]()
    else:
        stored = _stored_llm(name)
        model.llm = ConfigDict(stored.to_dict())
        tokenizer = paths.as_path(name) / "tokenizer"
        model.tokenizer = str(tokenizer) if tokenizer.exists() else ""
        if stored.get("lora_rank"):
            return  # its adapters are loaded, too
    model.llm.update({key: value for key, value in lora.items() if key in model.llm})


def _stored_llm(folder: str) -> Any:
    """The section `llm` of an export."""
    if not folder or not paths.exists(folder):
        known = ", ".join(sorted(llms.LLMS))
        raise UserError(f"llm {folder!r}: unknown; known are {known}, or the folder of an imported LLM")
    if not paths.exists(paths.as_path(folder) / "model.json"):
        raise UserError(
            f"llm {folder!r}: is not an import; make one with `vilam3 convert import --source {folder} "
            "--out DIR`, and give llm=DIR"
        )
    found = exports.load_model_config(folder)
    if found.llm is None:
        raise UserError(f"llm {folder!r}: holds a {found.kind}, not an LLM; import the folder of an LLM")
    return found.llm


def _part(makers: Mapping[str, Callable[[], ConfigDict]], part: str, name: str) -> ConfigDict:
    if name not in makers:
        raise UserError(f"{part} {name!r}: unknown; known are {', '.join(sorted(makers))}")
    return makers[name]()
