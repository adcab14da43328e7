"""Examples in TFDS's storage format: flat features, serialized as `tf.train.Example` protocol buffers.

None is stored as -1 or an empty text. `features_dict` declares the same features to TFDS, whose serializer
and parser agree with `encode` and `decode` (a test compares them). TFDS is imported only for that
declaration, TensorFlow never.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from google.protobuf.message import DecodeError

from vilam3_jax.data.examples import SCHEMA_VERSION, Example, ExpertRequest, ImageRef, Turn
from vilam3_jax.errors import UserError

_ABSENT = -1
_NUMBERS = {"schema", "images/axis", "images/index", "turns/supervised", "expert_requests/before_turn"}
_IMAGES = ("bytes", "path", "axis", "index", "window", "modality")
_TURNS = ("role", "text", "supervised")
_REQUESTS = ("expert", "args", "images", "before_turn", "policy", "question", "call")


def features_dict() -> Any:
    """Returns the features of an example as `tfds.features.FeaturesDict`."""
    import numpy as np
    import tensorflow_datasets as tfds

    text, number = tfds.features.Text, functools.partial(tfds.features.Scalar, dtype=np.int64)
    images = {
        # `features.Image` would decode the image at every read.
        "bytes": tfds.features.Tensor(shape=(), dtype=np.object_, doc="encoded image, or empty"),
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
    requests = {name: text() for name in _REQUESTS} | {
        "images": text(doc="JSON list of [number of the image, role]"),
        "before_turn": number(),
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
    """Returns the nested plain values that `features_dict` describes."""
    meta = example.meta
    images = [
        (
            image.data or b"",
            image.path or "",
            _ABSENT if image.axis is None else image.axis,
            _ABSENT if image.index is None else image.index,
            "" if image.window is None else f"{image.window[0]!r} {image.window[1]!r}",
            image.modality or "",
        )
        for image in example.images
    ]
    turns = [(turn.role, turn.text, turn.supervised) for turn in example.turns]
    requests = []
    for request in example.expert_requests:
        inputs = json.dumps([[image.image, image.role] for image in request.images], ensure_ascii=False)
        before = (request.expert, request.args, inputs, request.before_turn)
        requests.append((*before, request.policy, request.question, request.call))
    return {
        "id": example.id,
        "format": example.format,
        "schema": SCHEMA_VERSION,
        **{key: str(meta.get(key) or "") for key in ("patient", "modality", "licence")},
        "meta": json.dumps(meta, ensure_ascii=False, allow_nan=False, sort_keys=True),
        "images": _columns(_IMAGES, images),
        "turns": _columns(_TURNS, turns),
        "expert_requests": _columns(_REQUESTS, requests),
    }


def _columns(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> dict[str, list[Any]]:
    return {name: [row[column] for row in rows] for column, name in enumerate(names)}


def encode(example: Example) -> bytes:
    """Serializes a valid example deterministically.

    Raises `UserError` for a value that cannot be stored, such as a NaN in `meta`; quotes only the id.
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
    """Parses an example written by `encode` or TFDS; raises `UserError` for other data or schema versions."""
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
    def column(name: str) -> list[Any]:
        if name in _NUMBERS:
            return list(features[name].int64_list.value)
        return [value.decode() for value in features[name].bytes_list.value]

    def columns(part: str, names: Sequence[str]) -> Any:
        return zip(*(column(f"{part}/{name}") for name in names), strict=True)

    def optional(number: int) -> int | None:
        return None if number == _ABSENT else number

    encoded = [value or None for value in features["images/bytes"].bytes_list.value]
    images = tuple(
        ImageRef(data, path or None, optional(axis), optional(index), _window(window), modality or None)
        for data, (path, axis, index, window, modality) in zip(
            encoded, columns("images", _IMAGES[1:]), strict=True
        )
    )
    requests = columns("expert_requests", _REQUESTS)
    (name,), (form,), (meta,) = column("id"), column("format"), column("meta")
    return Example(
        id=name,
        format=form,
        images=images,
        turns=tuple(Turn(role, text, bool(target)) for role, text, target in columns("turns", _TURNS)),
        expert_requests=tuple(
            ExpertRequest.of(e, args, json.loads(i), *rest) for e, args, i, *rest in requests
        ),
        meta=json.loads(meta),
    )


def _window(text: str) -> tuple[float, float] | None:
    if not text:
        return None
    centre, width = text.split()
    return float(centre), float(width)


def _set(features: Any, name: str, column: Sequence[Any]) -> None:
    """Sets a feature. An empty feature keeps its type, which TFDS's parser requires."""
    if name in _NUMBERS:
        stored = features[name].int64_list
        stored.value.extend(int(value) for value in column)
    else:
        stored = features[name].bytes_list
        stored.value.extend(value.encode() if isinstance(value, str) else value for value in column)
    stored.SetInParent()


@functools.cache
def _message() -> Any:
    """Returns the class of `tf.train.Example`, from a separate pool, as the default may contain TensorFlow's.

    Source: tensorflow/core/example/{example,feature}.proto, without floats, which no feature uses.
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
