"""The JSON sidecar that dcm2niix and BIDS put beside a NIfTI volume."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from etils import epath

from vilam3_jax.data.stored_volume import UNKNOWN
from vilam3_jax.data.volume_io import body_part_name, modality_code, stated_units
from vilam3_jax.errors import UnavailableError, UserError
from vilam3_jax.runtime.paths import read_bytes

_MAX_BYTES = 4 << 20


@dataclasses.dataclass(frozen=True)
class Sidecar:
    """Fields of a sidecar as in `StoredVolume`; others may identify the patient and are not read."""

    modality: str = UNKNOWN
    body_part: str = UNKNOWN
    units: str = UNKNOWN
    notes: tuple[str, ...] = ()


def read_sidecar(path: epath.Path, stem: str) -> Sidecar:
    """Reads `stem`.json in the folder of `path`; an unreadable sidecar becomes a note.

    Raises:
      UnavailableError: the disk or the network fails.
    """
    # No listing: a folder may hold thousands of volumes, and `stem` is not text from a file.
    names = (path.parent / f"{stem}{suffix}" for suffix in (".json", ".JSON"))
    found = next((name for name in names if name.exists()), None)
    if found is None:
        return Sidecar()
    try:
        fields = json.loads(read_bytes(found, _MAX_BYTES).decode("utf-8-sig"))
    except UnavailableError:
        raise
    except (UserError, ValueError, RecursionError):
        return Sidecar(notes=("the JSON file beside it cannot be read; it is ignored",))
    if not isinstance(fields, dict):
        return Sidecar(notes=("the JSON file beside it is not an object; it is ignored",))
    notes: list[str] = []
    modality_text = _text(fields, "Modality", notes)
    modality = modality_code(modality_text)
    if modality_text and modality == UNKNOWN:
        notes.append("the JSON file beside it states an unknown modality; it is ignored")
    return Sidecar(
        modality,
        body_part_name(_text(fields, "BodyPartExamined", notes)),
        stated_units(_text(fields, "Units", notes), modality),
        tuple(notes),
    )


def _text(fields: dict[str, Any], key: str, notes: list[str]) -> str:
    value = fields.get(key)
    if value is None:
        return ""
    if isinstance(value, str):
        return " ".join(value.split())
    notes.append(f"{key} in the JSON file beside it is not text; it is ignored")
    return ""
