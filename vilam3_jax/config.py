"""Run configurations: recipes and overrides in, typed and validated sections out.

A recipe is a Python file with `get_config(arg)` that starts from `base_config()` and changes it.
`load` accepts what the command line accepts: `configs/stage3_instruct.py:tiny`. Recipes and overrides are
ml_collections; everything behind `load` and `parse` sees a `RunConfig` of frozen sections.
"""

from __future__ import annotations

import importlib.resources
import runpy
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from vilam3_jax.errors import UserError
from vilam3_jax.runtime.settings import flatten, from_mapping, suggestion
from vilam3_jax.training.run_config import RENAMED_KEYS, RunConfig

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


def base_config() -> ConfigDict:
    """The defaults of all runs, for recipes to change; other keys are refused."""
    values = RunConfig().to_dict()
    values["model"] = {}
    return ConfigDict(values)


def resolve(config: Any) -> RunConfig:
    """The typed config of a recipe's ConfigDict; a `RunConfig` is returned unchanged.

    Raises:
      UserError: an unknown key, or a value that a section refuses; names the key and the fix.
    """
    if isinstance(config, RunConfig):
        return config
    values = {**config, "data": {**config.data, "mixture": _mixture_rows(config.data.mixture, config.task)}}
    return from_mapping(RunConfig, values, RENAMED_KEYS)


def _mixture_rows(rows: Any, task: str) -> tuple[Any, ...]:
    """Replaces names of mixtures by their rows, so that a run's config is explicit."""
    from vilam3_jax.configs import mixtures  # recipes import this module

    for row in rows:
        stage = mixtures.get(row).stage if isinstance(row, str) else ""
        if stage and (stage == "stage1_vision") != (task == "contrastive"):
            raise UserError(f"config data.mixture: {row!r} is for {stage}, but this run has task={task!r}")
    return mixtures.rows_of(tuple(rows))


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


def usage(argv: Sequence[str], command: str, needs: str, purpose: str, values: flags.FlagValues) -> str:
    """The help of a command that takes a recipe and the flags `values`; '' if `argv` does not ask for it."""
    if not {"-h", "--help", "--helpfull"} & set(argv):
        return ""
    lines = [
        f"usage: vilam3 {command} --config=FILE[:ARG] {needs} [--config.KEY=VALUE ...]",
        "",
        purpose,
        "",
        "  --config=FILE[:ARG]  recipe and its argument, such as configs/stage3_instruct.py:tiny",
        "  --config.KEY=VALUE   change one key, such as --config.num_steps=10 or --config.mesh.fsdp=4",
    ]
    return "\n".join(lines + [f"  --{name:<18} {values[name].help}" for name in values])


def parse(argv: Sequence[str], flag_values: flags.FlagValues) -> RunConfig:
    """Parses `--config=FILE:ARG --config.key=value` and the flags already defined on `flag_values`.

    Raises:
      UserError: an unknown flag or config key (with the nearest known name), or a value of the wrong type.
    """
    argv = _with_recipes(argv)
    config_flags.DEFINE_config_file("config", lock_config=True, flag_values=flag_values, sys_argv=["", *argv])
    try:
        left = flag_values(["vilam3", *argv])[1:]
    except (flags.UnrecognizedFlagError, AttributeError, KeyError) as error:
        raise _unknown_override(argv, error) from error
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
    spec = next(item for item in reversed(argv) if item.startswith("--config="))
    given = {item[len("--config.") :].partition("=")[0] for item in argv if item.startswith("--config.")}
    return _checked(_with_imported_llm(config, spec, given))


def _with_imported_llm(config: Any, spec: str, given: Collection[str]) -> Any:
    """Starts a run of `FILE:SIZE,llm=FOLDER` from that LLM, unless `init` has another one.

    Args:
      config: of the recipe, with the overrides.
      spec: `FILE[:ARG]`.
      given: dotted keys of the overrides.
    """
    from vilam3_jax.configs import models  # recipes import this module

    folder = models.imported_llm(spec.partition(":")[2])
    if not folder:
        return config
    if config.task == "contrastive":
        raise UserError(
            f"config {spec}: this run trains no LLM; leave out llm={folder} (its tokenizer is "
            f"--config.model.tokenizer={folder}/tokenizer)"
        )
    # `everything` has the LLM of the stage before, which began with this one.
    if "init.llm" not in given and not config.init.everything:
        config.init.llm = folder
    return config


def _checked(config: Any) -> RunConfig:
    found = resolve(config)
    if found.model.llm is None:
        raise UserError("config model: names no model; set it in the recipe, to one of configs/models")
    return found


def _with_recipes(argv: Sequence[str]) -> list[str]:
    """The arguments, with paths of recipes resolved; checks that the recipes run."""
    found, rest = [], iter(argv)
    for item in rest:
        name, separator, spec = item.partition("=")
        if name not in ("--config", "-config"):
            found.append(item)
            continue
        spec = recipe_path(spec if separator else next(rest, ""))
        _run_recipe(*spec.split(":", 1))
        found.append(f"--config={spec}")
    return found


def _run_recipe(path: str, *argument: str) -> Any:
    """Runs a recipe here, to tell its errors from those of overrides."""
    try:
        recipe = runpy.run_path(path)
        if "get_config" not in recipe:
            raise UserError(f"{path}: is not a recipe, as it has no get_config(arg)")
        made = recipe["get_config"](*argument)
    except UserError:
        raise
    except Exception as error:  # a recipe is a program and may fail in any way
        lines = [
            frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path
        ]
        place = f"{path}:{lines[-1]}" if lines else path
        raise UserError(f"{place}: the recipe fails with {type(error).__name__}: {error}") from error
    if not isinstance(made, ml_collections.ConfigDict):
        raise UserError(f"{path}: get_config must return a ConfigDict; start from config.base_config()")
    return made


def load(spec: str, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Loads a recipe in Python, as `parse` does for the command line.

    Args:
      spec: `FILE[:ARG]`.
      overrides: dotted key → value.
    """
    path, *argument = recipe_path(spec).split(":", 1)
    config = _run_recipe(path, *argument)
    known = flatten(config)
    for key in overrides or {}:
        if key not in known and not any(name.startswith(key + ".") for name in known):
            raise _unknown_key(key, known)
    values = dict(overrides or {})
    if isinstance(values.get("data.mixture"), str):
        values["data.mixture"] = (values["data.mixture"],)
    try:
        config.update_from_flattened_dict(values)
    except (TypeError, ValueError) as error:
        raise UserError(f"config: {' '.join(str(error).split())}") from error
    return _checked(_with_imported_llm(config, spec, values))


def _unknown_key(key: str, known: Mapping[str, Any]) -> UserError:
    if key in RENAMED_KEYS:
        return UserError(f"config key {key} is now {RENAMED_KEYS[key]}; rename it")
    return UserError(f"config key {key}: unknown{suggestion(key, known)}")


def _unknown_override(argv: Sequence[str], error: Exception) -> UserError:
    """Names the overridden key that the recipe lacks."""
    spec = next((a.split("=", 1)[1] for a in argv if a.startswith("--config=")), "")
    try:
        known = flatten(_run_recipe(*spec.split(":", 1))) if spec else {}
    except (UserError, AttributeError, KeyError):
        known = {}
    for item in argv:
        if item.startswith("--config."):
            key = item[len("--config.") :].split("=", 1)[0]
            if known and key not in known:
                return _unknown_key(key, known)
    return UserError(f"config {spec}: {' '.join(str(error).split())}")
