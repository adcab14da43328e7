"""New identifiers and dates: consistent over files by a keyed hash, put in place by dicognito."""

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
    """Raises:
    UserError: dicognito is not installed.
    """
    try:
        import dicognito.anonymizer  # noqa: F401
    except ImportError as error:
        raise UserError(
            "vilam3 data deidentify needs dicognito; run `pip install 'vilam3-jax[dicom]'`"
        ) from error


class Pseudonyms:
    """Replaces identifiers. One salt always gives the same replacements; without it nobody can redo them."""

    def __init__(self, salt: bytes) -> None:
        self._salt = salt
        self._class_tags = {tag for tag, kind in allow_list().kinds.items() if kind == CLASS_UID}
        self._class_tags |= {cast(int, tag_for_keyword(keyword)) for keyword in _FILE_META_CLASSES}
        self._of_patient = functools.lru_cache(maxsize=256)(self._new_anonymizer)

    def token(self, kind: str, text: str) -> str:
        """HMAC-SHA256 of `text`, 64 hexadecimal digits; `kind` keeps uses apart."""
        message = f"{kind}\0{text}".encode("utf-8", "surrogateescape")
        return hmac.new(self._salt, message, hashlib.sha256).hexdigest()

    def uid(self, uid: str) -> str:
        """A UID under 2.25, the root of UIDs that are made of UUIDs."""
        return f"2.25.{int(self.token('uid', uid)[:32], 16)}"

    def days(self, patient: str) -> int:
        """By how many days the dates of a patient move into the past; `patient` is a `token`."""
        return _MIN_DAYS + int(self.token("days", patient), 16) % (_MAX_DAYS - _MIN_DAYS + 1)

    def apply(self, dataset: pydicom.Dataset, patient: str) -> None:
        """Replaces in place, also in sequences and in the file meta information.

        PatientID gets a pseudonym, dates are shifted by a number of whole days that is the patient's own, and
        UIDs of anything but classes are mapped. Dates must be well-formed.

        Args:
          dataset: the copy of an object.
          patient: a `token` of the patient's identity.
        """
        dataset.PatientID = patient
        self._of_patient(patient).anonymize(dataset)

    def _new_anonymizer(self, patient: str) -> Anonymizer:
        from dicognito.anonymizer import Anonymizer
        from dicognito.datetimeanonymizer import DateTimeAnonymizer

        anonymizer = Anonymizer(id_prefix="P", seed=patient)
        # dicognito's own shift is in hours. It moves a time of day only together with its date, and so would
        # change the interval to times that have none, such as the start of an injection.
        anonymizer.add_element_handler(DateTimeAnonymizer(-24 * self.days(patient)))
        anonymizer.add_element_handler(cast(Any, _UidMapper(self, self._class_tags)))
        return anonymizer


class _UidMapper:
    """A handler of dicognito whose UIDs do not depend on the patient: references between patients hold."""

    def __init__(self, pseudonyms: Pseudonyms, class_tags: set[int]) -> None:
        self._pseudonyms = pseudonyms
        self._class_tags = class_tags

    def __call__(self, dataset: pydicom.Dataset, element: pydicom.DataElement) -> bool:
        if element.VR != "UI":
            return False
        if element.tag not in self._class_tags and element.value:
            uids = [element.value] if isinstance(element.value, str) else element.value
            element.value = [self._pseudonyms.uid(str(uid)) for uid in uids]
        return True
