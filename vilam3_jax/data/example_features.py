"""Examples as TFDS stores them: flat features, serialised as `tf.train.Example` protocol buffers.

The only place that knows how `None` is stored: as -1, or as an empty text. `features_dict` declares the same
features to TFDS, whose own serialiser and parser agree with `encode` and `decode` (a test compares them).
TFDS is imported for that declaration alone, TensorFlow never.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from google.protobuf.message import DecodeError

from vilam3_jax.data.examples import SCHEMA_VERSION, Example, ExpertRequest, ImageRef, RequestImage, Turn
from vilam3_jax.errors import UserError

_ABSENT = -1
_NUMBERS = {"schema", "images/axis", "images/index", "turns/supervised", "expert_requests/before_turn"}


def features_dict() -> Any:
    """The features of an example, `tfds.features.FeaturesDict`."""
    import numpy as np
    import tensorflow_datasets as tfds

    text, number = tfds.features.Text, functools.partial(tfds.features.Scalar, dtype=np.int64)
    images = {
        # Not `features.Image`, which would decode the picture at every read.
        "bytes": tfds.features.Tensor(shape=(), dtype=np.object_, doc="encoded picture, or empty"),
        "path": text(doc="file below the data root, or empty"),
        "axis": number(doc="of the volume that is cut, or -1"),
        "index": number(doc="of the plane along the axis, or -1"),
        "window": text(doc="'centre width' in the volume's unit, or empty"),
        "modality": text(doc="DICOM code of a volume whose file states none, or empty"),
    }
    turns = {
        "role": text(doc="system, user, assistant or expert"),
        "text": text(doc="with <image> markers"),
        "supervised": tfds.features.Scalar(dtype=np.bool_, doc="whether it is a target of training"),
    }
    requests = {
        "expert": text(),
        "args": text(),
        "images": text(doc="JSON list of [number of the image, role]"),
        "before_turn": number(),
        "policy": text(),
        "question": text(),
        "call": text(),
    }
    return tfds.features.FeaturesDict(
        {
            "id": text(doc="unique in the dataset"),
            "format": text(doc="pair, caption, document, conversation or study"),
            "schema": number(doc="version of this layout"),
            "patient": text(doc="salted hash, or empty; a copy of meta's"),
            "modality": text(doc="a copy of meta's"),
            "licence": text(doc="a copy of meta's"),
            "meta": text(doc="JSON object"),
            "images": tfds.features.Sequence(images),
            "turns": tfds.features.Sequence(turns),
            "expert_requests": tfds.features.Sequence(requests),
        }
    )


def values(example: Example) -> dict[str, Any]:
    """The nested plain values that `features_dict` describes."""
    meta = example.meta
    return {
        "id": example.id,
        "format": example.format,
        "schema": SCHEMA_VERSION,
        "patient": str(meta.get("patient") or ""),
        "modality": str(meta.get("modality") or ""),
        "licence": str(meta.get("licence") or ""),
        "meta": json.dumps(meta, ensure_ascii=False, allow_nan=False, sort_keys=True),
        "images": {
            "bytes": [image.data or b"" for image in example.images],
            "path": [image.path or "" for image in example.images],
            "axis": [_ABSENT if image.axis is None else image.axis for image in example.images],
            "index": [_ABSENT if image.index is None else image.index for image in example.images],
            "window": [
                "" if i.window is None else f"{i.window[0]!r} {i.window[1]!r}" for i in example.images
            ],
            "modality": [image.modality or "" for image in example.images],
        },
        "turns": {
            "role": [turn.role for turn in example.turns],
            "text": [turn.text for turn in example.turns],
            "supervised": [turn.supervised for turn in example.turns],
        },
        "expert_requests": {
            "expert": [request.expert for request in example.expert_requests],
            "args": [request.args for request in example.expert_requests],
            "images": [
                json.dumps([[image.image, image.role] for image in request.images], ensure_ascii=False)
                for request in example.expert_requests
            ],
            "before_turn": [request.before_turn for request in example.expert_requests],
            "policy": [request.policy for request in example.expert_requests],
            "question": [request.question for request in example.expert_requests],
            "call": [request.call for request in example.expert_requests],
        },
    }


def encode(example: Example) -> bytes:
    """The stored form of a valid example; the same example always gives the same bytes.

    Raises:
      UserError: a value has no stored form, such as a NaN in `meta`. Names the id and quotes nothing else.
    """
    try:
        record = _message()()
        features = record.features.feature
        for name, value in values(example).items():
            if isinstance(value, Mapping):
                for key, column in value.items():
                    _set(features, f"{name}/{key}", column)
            else:
                _set(features, name, [value])
        return record.SerializeToString(deterministic=True)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"example {example.id!r}: cannot be stored ({type(error).__name__}); "
            "its meta must be plain JSON values and its texts valid Unicode"
        ) from None


def decode(data: bytes) -> Example:
    """Reads what `encode`, or TFDS with `features_dict`, wrote.

    Raises:
      UserError: not an example, or of another schema.
    """
    try:
        features = _message().FromString(data).features.feature
        schema = features["schema"].int64_list.value
        if list(schema) != [SCHEMA_VERSION]:
            raise UserError(
                f"example record has schema {schema[0] if schema else 'none'}, this version reads "
                f"{SCHEMA_VERSION}; prepare the dataset again"
            )
        return _example(features)
    except (DecodeError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise UserError(f"not an example record ({type(error).__name__}: {str(error)[:100]})") from error


def _example(features: Any) -> Example:
    def texts(name: str) -> list[str]:
        return [value.decode() for value in features[name].bytes_list.value]

    def numbers(name: str) -> list[int | None]:
        return [None if value == _ABSENT else value for value in features[name].int64_list.value]

    pictures = [value or None for value in features["images/bytes"].bytes_list.value]
    images = zip(
        pictures,
        [path or None for path in texts("images/path")],
        numbers("images/axis"),
        numbers("images/index"),
        [_window(text) for text in texts("images/window")],
        [modality or None for modality in texts("images/modality")],
        strict=True,
    )
    supervised = [bool(value) for value in features["turns/supervised"].int64_list.value]
    turns = zip(texts("turns/role"), texts("turns/text"), supervised, strict=True)
    requests = zip(
        texts("expert_requests/expert"),
        texts("expert_requests/args"),
        texts("expert_requests/images"),
        features["expert_requests/before_turn"].int64_list.value,
        texts("expert_requests/policy"),
        texts("expert_requests/question"),
        texts("expert_requests/call"),
        strict=True,
    )
    (name,), (kind,), (meta,) = texts("id"), texts("format"), texts("meta")
    return Example(
        id=name,
        format=kind,
        images=tuple(ImageRef(*image) for image in images),
        turns=tuple(Turn(*turn) for turn in turns),
        expert_requests=tuple(
            ExpertRequest(expert, args, tuple(RequestImage(*pair) for pair in json.loads(shown)), *rest)
            for expert, args, shown, *rest in requests
        ),
        meta=json.loads(meta),
    )


def _window(text: str) -> tuple[float, float] | None:
    if not text:
        return None
    centre, width = text.split()
    return float(centre), float(width)


def _set(features: Any, name: str, column: Sequence[Any]) -> None:
    """Sets a feature; an empty one keeps its type, which TFDS's parser looks for."""
    if name in _NUMBERS:
        stored = features[name].int64_list
        stored.value.extend(int(value) for value in column)
    else:
        stored = features[name].bytes_list
        stored.value.extend(value.encode() if isinstance(value, str) else value for value in column)
    stored.SetInParent()


@functools.cache
def _message() -> Any:
    """The class of `tf.train.Example`, from a pool of its own: the default one may hold TensorFlow's.

    Source: tensorflow/core/example/{example,feature}.proto; floats are left out, as no feature has any.
    """
    file = text_format.Parse(_PROTO, descriptor_pb2.FileDescriptorProto())
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tensorflow.Example"))


_PROTO = """
name: "vilam3_example.proto" package: "tensorflow" syntax: "proto3"
message_type { name: "BytesList"
  field { name: "value" number: 1 type: TYPE_BYTES label: LABEL_REPEATED } }
message_type { name: "Int64List"
  field { name: "value" number: 1 type: TYPE_INT64 label: LABEL_REPEATED } }
message_type { name: "Feature" oneof_decl { name: "kind" }
  field { name: "bytes_list" number: 1 oneof_index: 0 type: TYPE_MESSAGE type_name: ".tensorflow.BytesList" }
  field { name: "int64_list" number: 3 oneof_index: 0 type: TYPE_MESSAGE type_name: ".tensorflow.Int64List" }
}
message_type { name: "Features"
  field { name: "feature" number: 1 type: TYPE_MESSAGE type_name: ".tensorflow.Features.FeatureEntry"
          label: LABEL_REPEATED }
  nested_type { name: "FeatureEntry" options { map_entry: true }
    field { name: "key" number: 1 type: TYPE_STRING }
    field { name: "value" number: 2 type: TYPE_MESSAGE type_name: ".tensorflow.Feature" } } }
message_type { name: "Example"
  field { name: "features" number: 1 type: TYPE_MESSAGE type_name: ".tensorflow.Features" } }
"""
