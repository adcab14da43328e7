"""The JSON sidecar that dcm2niix and BIDS put beside a NIfTI volume."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from etils import epath

from vilam3_jax.data.stored_volume import UNKNOWN, StoredVolume
from vilam3_jax.data.volume_io import body_part_name, modality_code, stated_units
from vilam3_jax.errors import UnavailableError, UserError
from vilam3_jax.runtime.paths import read_bytes

_MAX_BYTES = 4 << 20


def with_sidecar(volume: StoredVolume, path: epath.Path, stem: str) -> StoredVolume:
    """Adds modality, body part and units from `stem`.json in the folder of `path`, if it exists.

    Other fields may identify the patient and are not read. An unreadable sidecar becomes a note.

    Raises:
      UnavailableError: the disk or the network fails.
    """
    # No listing: a folder may hold thousands of volumes, and `stem` is not text from a file.
    names = (path.parent / f"{stem}{suffix}" for suffix in (".json", ".JSON"))
    found = next((name for name in names if name.exists()), None)
    if found is None:
        return volume
    try:
        fields = json.loads(read_bytes(found, _MAX_BYTES).decode("utf-8-sig"))
    except UnavailableError:
        raise
    except (UserError, ValueError, RecursionError):
        return _with_note(volume, "the JSON file beside it cannot be read; it is ignored")
    if not isinstance(fields, dict):
        return _with_note(volume, "the JSON file beside it is not an object; it is ignored")
    notes = list(volume.notes)
    stated = _text(fields, "Modality", notes)
    modality = modality_code(stated)
    if stated and modality == UNKNOWN:
        notes.append("the JSON file beside it states an unknown modality; it is ignored")
    return dataclasses.replace(
        volume,
        modality=modality,
        body_part=body_part_name(_text(fields, "BodyPartExamined", notes)),
        units=stated_units(_text(fields, "Units", notes), modality),
        notes=tuple(notes),
    )


def _with_note(volume: StoredVolume, note: str) -> StoredVolume:
    return dataclasses.replace(volume, notes=(*volume.notes, note))


def _text(fields: dict[str, Any], key: str, notes: list[str]) -> str:
    value = fields.get(key)
    if value is None:
        return ""
    if isinstance(value, str):
        return " ".join(value.split())
    notes.append(f"{key} in the JSON file beside it is not text; it is ignored")
    return ""
