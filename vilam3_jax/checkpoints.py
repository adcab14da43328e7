"""Orbax checkpoints of runs and exports of models: the only module that knows Orbax.

A *run checkpoint* is one step directory with `state` (parameters, optimizer, step, rng), `data` (one JSON
state per loader shard) and `run` (resolved config, versions, provenance). An *export* is parameters + model
config + tokenizer in one folder that `vilam3_jax.load(path)` opens anywhere.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import platform
import shutil
import uuid
from collections.abc import Collection, Mapping
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from vilam3_jax import paths
from vilam3_jax.config import ConfigDict
from vilam3_jax.errors import UserError
from vilam3_jax.models import trees

# Orbax logs every error that it also raises, with the stacks of all its threads.
logging.getLogger("absl").setLevel(logging.CRITICAL)

# Trained weights hardly compress; writing them takes a sixth of the time without, reading them half.
_UNCOMPRESSED = ocp.options.ArrayOptions(saving=ocp.options.ArrayOptions.Saving(use_compression=False))
Flat = dict[str, jax.Array]
EXPORT_FILES = ("model.json", "params")
_MAX_JSON = 64 << 20


def versions() -> dict[str, str]:
    """Versions of what can change a run's numbers."""
    names = ("vilam3-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


class RunCheckpoints:
    """Step directories of one run under `<workdir>/checkpoints`; newest kept, older removed."""

    def __init__(self, workdir: paths.PathLike, kept: int = 1) -> None:
        self._root = paths.as_path(workdir) / "checkpoints"
        self._root.mkdir(parents=True, exist_ok=True)
        self._manager = ocp.training.Checkpointer(
            self._root,
            # Orbax's own policies, which its protocols do not admit.
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),  # pyright: ignore[reportArgumentType]
            preservation_policy=ocp.training.preservation_policies.LatestN(kept),  # pyright: ignore[reportArgumentType]
        )

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint; an unfinished save does not count."""
        latest = self._manager.latest
        return None if latest is None else latest.step

    def save(self, step: int, state: Any, data: Mapping[str, Any], run: Mapping[str, Any]) -> None:
        """Starts an asynchronous save; `state` may be donated right after.

        Raises:
          UserError: the disk is full or cannot be written.
        """
        items = {
            "state": state,
            "data": {"json": json.dumps(data)},
            "run": {"json": json.dumps(run)},
        }
        try:
            with ocp.Context(array_options=_UNCOMPRESSED):
                self._manager.save_checkpointables_async(step, items, force=True)
        except (OSError, ValueError) as error:
            raise UserError(_disk_message(self._root, error)) from error

    def wait(self) -> None:
        """Blocks until the save in flight is complete."""
        try:
            self._manager.close()
        except (OSError, ValueError) as error:
            raise UserError(_disk_message(self._root, error)) from error

    def restore(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        """Loads a step onto the shardings of `abstract`.

        Returns:
          state, data, run.

        Raises:
          UserError: it is a checkpoint of another model or optimizer.
        """
        try:
            items = self._manager.load_checkpointables(step, {"state": abstract, "data": None, "run": None})
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self._root / str(step)}: does not fit this config ({_first_line(error)}); it is "
                "a checkpoint of another model, use another --workdir"
            ) from error
        return items["state"], json.loads(items["data"]["json"]), json.loads(items["run"]["json"])


def export_model(
    out: paths.PathLike,
    params: Mapping[str, Any],
    model_config: Mapping[str, Any],
    tokenizer_dir: paths.PathLike | None,
    extra: Mapping[str, Any],
) -> None:
    """Writes an export to a temporary folder beside `out`, then moves it there.

    Args:
      out: folder to create; an earlier export there is replaced only once the new one is complete.
      params: nested or flat dict of arrays.
      model_config: the `model` section of a config, plus `kind`.
      tokenizer_dir: Hugging Face tokenizer folder to copy, or None.
      extra: provenance (sources, licences, data).

    Raises:
      UserError: `out` is something else, or the disk is full.
    """
    out = paths.as_path(out)
    if out.exists() and any(out.iterdir()) and not (out / "model.json").exists():
        raise UserError(f"{out}: exists and is no export; choose another folder")
    temporary = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        temporary.mkdir(parents=True)
        flat = dict(params)
        if any(isinstance(v, Mapping) for v in flat.values()):
            flat = trees.flatten(flat)
        with ocp.Context(array_options=_UNCOMPRESSED):
            ocp.save(temporary / "params", flat)
        (temporary / "model.json").write_text(json.dumps(model_config, indent=1, sort_keys=True))
        (temporary / "provenance.json").write_text(
            json.dumps({"versions": versions(), **extra}, indent=1, sort_keys=True)
        )
        if tokenizer_dir:
            (temporary / "tokenizer").mkdir()
            for file in paths.as_path(tokenizer_dir).iterdir():
                if not file.is_dir():
                    file.copy(temporary / "tokenizer" / file.name)
        _replace_folder(temporary, out)
    except (OSError, ValueError) as error:
        temporary.rmtree(missing_ok=True)
        raise UserError(_disk_message(out, error)) from error


def load_model_config(export: paths.PathLike) -> ConfigDict:
    """Reads the model config of an export.

    Raises:
      UserError: `export` is no export.
    """
    export = paths.as_path(export)
    for name in EXPORT_FILES:
        if not (export / name).exists():
            raise UserError(
                f"{export}: {name} is missing, so this is no export; give the `export` folder of a run "
                "or the --out folder of `vilam3 convert import`"
            )
    try:
        return _tuples(ConfigDict(json.loads(paths.read_bytes(export / "model.json", _MAX_JSON))))
    except json.JSONDecodeError as error:
        raise UserError(f"{export / 'model.json'}: is damaged ({error}); export the model again") from error


def load_params(
    export: paths.PathLike, wanted: Mapping[str, jax.ShapeDtypeStruct], optional: Collection[str] = ()
) -> Flat:
    """Reads just the wanted parameters, each straight onto its sharding.

    Args:
      export: export folder.
      wanted: path → ShapeDtypeStruct; dtypes are converted, shapes must agree.
      optional: paths that may be absent and are then left out of the result.

    Raises:
      UserError: a wanted parameter is missing or has another shape.
    """
    load_model_config(export)
    folder = paths.as_path(export) / "params"
    stored = ocp.metadata(folder).metadata
    absent = [path for path in wanted if path not in stored and path not in optional]
    if absent:
        raise UserError(
            f"{export}: holds no {absent[0]} (and {len(absent) - 1} more); it is an export of another model"
        )
    present = {path: leaf for path, leaf in wanted.items() if path in stored}
    for path, leaf in present.items():
        if tuple(stored[path].shape) != tuple(leaf.shape):
            raise UserError(
                f"{export}: {path} has shape {tuple(stored[path].shape)}, this model needs "
                f"{tuple(leaf.shape)}; it is an export of another model"
            )
    with ocp.Context(
        pytree_options=ocp.options.PyTreeOptions(loading=ocp.options.PyTreeOptions.Loading(partial_load=True))
    ):
        return dict(ocp.load(folder, present))


def load_export(
    export: paths.PathLike, sharding: jax.sharding.Sharding | None = None
) -> tuple[dict[str, Any], ConfigDict, epath.Path]:
    """Opens an export on one device (or on `sharding`).

    Returns:
      Nested parameters, model config, tokenizer folder.
    """
    from vilam3_jax.models import vila  # the models import nothing from here, but their import is slow

    config = load_model_config(export)
    place = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    _, nested = vila.abstract_model(config, config.kind)
    wanted = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
        for path, leaf in trees.flatten(nested).items()
    }
    return trees.unflatten(load_params(export, wanted)), config, paths.as_path(export) / "tokenizer"


def _tuples(config: ConfigDict) -> ConfigDict:
    """JSON has no tuples; configs hold no lists."""
    for key, value in list(config.items()):
        if isinstance(value, ConfigDict):
            _tuples(value)
        elif isinstance(value, list):
            with config.ignore_type():
                config[key] = tuple(value)
    return config


def _replace_folder(new: epath.Path, out: epath.Path) -> None:
    old = None
    if out.exists():
        old = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}.old"
        out.rename(old)
    new.rename(out)
    if old is not None:
        shutil.rmtree(old) if "://" not in str(old) else old.rmtree()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__


def _disk_message(path: epath.Path, error: Exception) -> str:
    return f"{path}: cannot be written ({_first_line(error)}); free space or choose another folder"
