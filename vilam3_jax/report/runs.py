"""Reads the output of a run: a quickstart folder (stages and evaluation) or one training run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from etils import epath

from vilam3_jax.errors import UserError
from vilam3_jax.evals.rows import RESULT_FILE, ROWS_FILE
from vilam3_jax.runtime import paths

STAGES = ("stage1_vision", "stage2a_align", "stage2b_pretrain", "stage3_instruct", "stage4_expert")
# In the order of tables; the first columns are visible on a phone.
ARMS = ("stage4_experts", "stage4_no_experts", "stage4_falsified", "majority")
FURTHER_ARMS = ("stage3", "stage4_blank")  # not in a quickstart run of the default size
ROW_KEYS = ("item", "cluster", "correct", "unparsed", "question_type", "label_source", "oracle")
_FILES = (ROWS_FILE, RESULT_FILE)
_MAX_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training run.

    Attributes:
      name: of the run.
      result: `result.json`; empty until the run has finished.
      metrics: lines of `metrics.jsonl`.
      config: `config.json`; empty if missing.
    """

    name: str
    result: dict[str, Any]
    metrics: list[dict[str, Any]]
    config: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Arm:
    """One arm of the evaluation: `rows.jsonl` and `result.json`."""

    name: str
    rows: list[dict[str, Any]]
    result: dict[str, Any]

    @property
    def experts(self) -> str:
        """`on`, `off` or `falsified`."""
        return str(self._settings.get("experts", "off"))

    @property
    def images(self) -> str:
        """`true` or `blank`."""
        return str(self._settings.get("images", "true"))

    @property
    def split(self) -> str | None:
        """The split whose questions were asked, if recorded."""
        protocol = self.result.get("protocol")
        return protocol.get("split") if isinstance(protocol, dict) else None

    @property
    def is_majority(self) -> bool:
        """Whether this is the majority baseline, which always gives the most frequent training answer."""
        return self._settings.get("name") == "majority"

    @property
    def _settings(self) -> dict[str, Any]:
        found = self.result.get("arm")
        return found if isinstance(found, dict) else {}


@dataclasses.dataclass(frozen=True)
class Run:
    """A quickstart folder: stages in the order of training, arms in that of `ARMS` and `FURTHER_ARMS`, and
    `eval/retrieval.json`.
    """

    folder: epath.Path
    stages: list[Stage]
    arms: list[Arm]
    retrieval: dict[str, Any]


def read_json(path: epath.Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      UserError: missing, damaged, or not an object.
    """
    data = paths.read_bytes(path, _MAX_BYTES)
    try:
        value = json.loads(data)
    except ValueError as error:
        raise UserError(f"{path}: damaged JSON ({error}); regenerate the file") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}; regenerate the file")
    return value


def read_lines(path: epath.Path) -> list[dict[str, Any]]:
    """Reads JSON lines; drops a torn last line (its writer is running or was killed).

    Raises:
      UserError: the file is missing, or another line is damaged.
    """
    lines = paths.read_bytes(path, _MAX_BYTES).decode("utf-8", "replace").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise UserError(f"{path}: line {number} is damaged ({error}); regenerate the file") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}: line {number} is not a JSON object; regenerate the file")
        rows.append(row)
    return rows


def read_stage(folder: paths.PathLike, *, finished: bool) -> Stage:
    """Reads one training run.

    Args:
      folder: the run's workdir.
      finished: require `result.json`, which the run writes last.

    Raises:
      UserError: a file is missing or damaged.
    """
    root = paths.as_path(folder)
    metrics = read_lines(root / "metrics.jsonl")
    for number, row in enumerate(metrics, 1):
        if not isinstance(row.get("step"), int):
            raise UserError(f"{root / 'metrics.jsonl'}: line {number} has no integer 'step'; train again")
    result_path, config_path = root / "result.json", root / "config.json"
    result = read_json(result_path) if finished or result_path.exists() else {}
    config = read_json(config_path) if config_path.exists() else {}
    if not isinstance(config.get("model", {}), dict):
        raise UserError(f"{config_path}: 'model' is not an object; restore the file or train again")
    return Stage(str(result.get("name") or config.get("name") or root.name), result, metrics, config)


def read_arm(folder: epath.Path) -> Arm:
    """Reads one arm of the evaluation.

    Raises:
      UserError: a file is missing or damaged, there are no rows, or a row lacks a key.
    """
    path = folder / "rows.jsonl"
    rows = read_lines(path)
    if not rows:
        raise UserError(f"{path}: no rows; run `vilam3 evaluate --out {folder}` again")
    for number, row in enumerate(rows, 1):
        missing = [key for key in ROW_KEYS if key not in row]
        if missing:
            raise UserError(f"{path}: line {number} lacks {', '.join(missing)}; evaluate again")
    # The folder names the arm: two arms may share settings.
    return Arm(folder.name, [{**row, "arm": folder.name} for row in rows], read_json(folder / "result.json"))


def read_run(folder: paths.PathLike) -> Run:
    """Reads a quickstart folder.

    Raises:
      UserError: a file is missing or damaged, or the arms were asked different questions; names the file.
    """
    root = paths.as_path(folder)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; give the folder of a run")
    stages = [
        dataclasses.replace(read_stage(root / "stages" / name, finished=True), name=name) for name in STAGES
    ]
    found = [path.name for path in paths.children(root / "eval") if path.is_dir()]
    answered = [name for name in found if (root / "eval" / name / "rows.jsonl").exists()]
    further = [name for name in FURTHER_ARMS if name in answered]
    extra = [name for name in answered if name not in ARMS + FURTHER_ARMS]
    arms = [read_arm(root / "eval" / name) for name in (*ARMS, *further, *extra)]
    folders = [root / "eval" / arm.name for arm in arms]
    _check_alike(folders, arms, {"protocol_hash": "another protocol", "items_hash": "other questions"})
    return Run(root, stages, arms, read_json(root / "eval" / "retrieval.json"))


def evaluations_in(folder: paths.PathLike) -> list[epath.Path]:
    """The folder itself if it is a finished evaluation, else the finished ones directly below it.

    `vilam3 evaluate` writes one folder per arm, and `result.json` last.
    """
    root = paths.as_path(folder)
    candidates = [root, *(path for path in paths.children(root) if path.is_dir())]
    found = [path for path in candidates if all((path / name).exists() for name in _FILES)]
    return [root] if root in found else found


def read_evaluations(folders: Sequence[epath.Path]) -> list[Arm]:
    """Reads evaluations of one protocol, those with experts first.

    Arms are named after their folders, or after the paths if two folders have the same name.

    Raises:
      UserError: a file is missing or damaged, or the protocols differ.
    """
    folders = list(dict.fromkeys(folders))
    names = [folder.name for folder in folders]
    arms = []
    for folder in folders:
        arm = read_arm(folder)
        name = str(folder) if names.count(folder.name) > 1 else folder.name
        arms.append(Arm(name, [{**row, "arm": name} for row in arm.rows], arm.result))
    _check_alike(folders, arms, {"protocol_hash": "another protocol"})
    order = {"on": 0, "off": 1, "falsified": 2}
    return sorted(arms, key=lambda arm: (arm.is_majority, order.get(arm.experts, 1)))


def _check_alike(folders: Sequence[epath.Path], arms: Sequence[Arm], keys: dict[str, str]) -> None:
    for folder, arm in zip(folders, arms, strict=True):
        for key, what in keys.items():
            if arm.result.get(key) != arms[0].result.get(key):
                raise UserError(
                    f"{folder / RESULT_FILE}: {what} than in {arms[0].name}; "
                    "evaluate both again with the same data, protocol and limit"
                )
