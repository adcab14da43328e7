"""New identifiers and dates, consistent across files: derived by a keyed hash, inserted by dicognito."""

from __future__ import annotations

import functools
import hashlib
import hmac
from typing import TYPE_CHECKING, Any, cast

import pydicom
from pydicom.datadict import tag_for_keyword

from vilam3_jax.data.deidentify.profile import CLASS_UID, allow_list
from vilam3_jax.errors import UserError

if TYPE_CHECKING:
    from dicognito.anonymizer import Anonymizer

# Dates move into the past by 1 to 10 years.
_MIN_DAYS, _MAX_DAYS = 365, 3652
_FILE_META_CLASSES = ("MediaStorageSOPClassUID", "TransferSyntaxUID", "ImplementationClassUID")


def check_installed() -> None:
    """Raises `UserError` if dicognito is not installed."""
    try:
        import dicognito.anonymizer  # noqa: F401
    except ImportError as error:
        raise UserError(
            "vilam3 data deidentify needs dicognito; run `pip install 'vilam3-jax[dicom]'`"
        ) from error


class Pseudonyms:
    """Replaces identifiers by a function of the salt, which cannot be recomputed without it."""

    def __init__(self, salt: bytes) -> None:
        self._salt = salt
        self._class_tags = {tag for tag, kind in allow_list().kinds.items() if kind == CLASS_UID}
        self._class_tags |= {cast(int, tag_for_keyword(keyword)) for keyword in _FILE_META_CLASSES}
        self._anonymizer = functools.lru_cache(maxsize=256)(self._new_anonymizer)

    def token(self, kind: str, text: str) -> str:
        """Returns the HMAC-SHA256 of `text` as 64 hexadecimal digits; `kind` separates the uses."""
        message = f"{kind}\0{text}".encode("utf-8", "surrogateescape")
        return hmac.new(self._salt, message, hashlib.sha256).hexdigest()

    def apply(self, dataset: pydicom.Dataset, patient: str) -> None:
        """Replaces identifiers in place, including those in sequences and file meta information.

        Sets PatientID to a pseudonym, shifts dates by a number of whole days that is constant per `patient`
        (a `token`), and maps all UIDs except class UIDs. Dates must be well-formed.
        """
        dataset.PatientID = patient
        self._anonymizer(patient).anonymize(dataset)

    def _new_anonymizer(self, patient: str) -> Anonymizer:
        from dicognito.anonymizer import Anonymizer
        from dicognito.datetimeanonymizer import DateTimeAnonymizer

        days = _MIN_DAYS + int(self.token("days", patient), 16) % (_MAX_DAYS - _MIN_DAYS + 1)
        anonymizer = Anonymizer(id_prefix="P", seed=patient)
        # dicognito shifts by hours and moves a time only together with its date. That would change intervals
        # to times without a date, such as the start of an injection.
        anonymizer.add_element_handler(DateTimeAnonymizer(-24 * days))
        anonymizer.add_element_handler(cast(Any, self._map_uids))
        return anonymizer

    def _map_uids(self, dataset: pydicom.Dataset, element: pydicom.DataElement) -> bool:
        """A dicognito handler. New UIDs do not depend on the patient, so references across patients hold."""
        if element.VR != "UI":
            return False
        if element.tag not in self._class_tags and element.value:
            uids = [element.value] if isinstance(element.value, str) else element.value
            # 2.25 is the root of UIDs derived from UUIDs.
            element.value = [f"2.25.{int(self.token('uid', str(uid))[:32], 16)}" for uid in uids]
        return True
