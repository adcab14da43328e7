"""`Example`, the record of a dataset, and its conversion from VILA's instruction JSON.

An example contains no tokens, templates, expert results or overlays. `data/render.py` adds them at load time,
so changing experts does not require rebuilding a dataset.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from vilam3_jax.data import content_keys, example_checks
from vilam3_jax.data.experts.grammar import Call, parse_turn
from vilam3_jax.errors import UserError

SCHEMA_VERSION = 3
IMAGE_MARKER = "<image>"
FORMATS = ("pair", "caption", "document", "conversation", "study")
ROLES = ("system", "user", "assistant", "expert")
POLICIES = ("always", "optional")

_TO_ROLE = {"human": "user", "gpt": "assistant"} | {role: role for role in ("user", "assistant", "system")}
_EXTENSION_KEY = "vilam3"  # ignored by VILA's own loader
_DIALOGUE_KEYS = ("conversations", "messages")
_MAX_QUOTED = 60  # characters of a value of a record in an error message
_MAX_QUOTED_ROLES = 8


@dataclasses.dataclass(frozen=True)
class ImageRef:
    """A reference to one image of an example.

    Attributes:
      data: an encoded 2-D image (PNG, JPEG, ...), or None if `path` is given.
      path: a '/'-separated path below the data root: a 2-D image, or a volume if `axis` is given.
      axis: slicing axis of the canonical (RAS) volume: 0, 1 or 2.
      index: slice along `axis`, in voxels; None with an axis: the whole volume, whose slices are chosen at
        load time.
      window: (centre, width) in the volume's intensity unit (HU for CT); None: the default of the model's
        preprocessing for the modality.
      modality: DICOM modality code for a volume file that states none, such as "CT" for NIfTI; None: as
        stated by the file.
    """

    data: bytes | None = None
    path: str | None = None
    axis: int | None = None
    index: int | None = None
    window: tuple[float, float] | None = None
    modality: str | None = None

    def problem(self) -> str | None:
        """Returns why this reference is invalid, or None."""
        if (self.data is None) == (self.path is None):
            return "needs either bytes or a path, not both"
        if self.data is not None and not self.data:
            return "has empty bytes"
        if self.path is not None and (reason := path_problem(self.path)):
            return reason
        if self.axis is None and self.index is not None:
            return "has an index but no axis"
        if self.axis is not None:
            if self.data is not None:
                return "has an axis, which requires a path to a volume"
            if self.axis not in (0, 1, 2) or (self.index is not None and self.index < 0):
                return f"axis {self.axis}, index {self.index} is not a slice"
        if self.window is not None and not self.window[1] > 0:
            return f"window {self.window} is not (centre, width > 0)"
        if self.modality is not None and (self.axis is None or not self.modality.isupper()):
            return f"modality {self.modality!r} is not a DICOM code of a volume, such as CT"
        return None


@dataclasses.dataclass(frozen=True)
class Turn:
    """One message: role, text with `<image>` markers, and whether it is a training target."""

    role: str
    text: str
    supervised: bool = False


@dataclasses.dataclass(frozen=True)
class RequestImage:
    """One input of an expert.

    Attributes:
      image: index of an image of the example.
      role: role of the image for the expert, such as "t1c"; "" for a single input.
    """

    image: int = 0
    role: str = ""


@dataclasses.dataclass(frozen=True)
class ExpertRequest:
    """A request for an expert's result at a position in the dialogue.

    Attributes:
      expert: name of the expert, as on its card.
      args: arguments of the call, e.g. "organs"; "" for none.
      images: inputs of the expert, in the order of its roles.
      before_turn: index of the assistant turn that follows the result. Requests before the same turn share
        one calling turn, in the order given.
      policy: "always": skip the example if there is no result; "optional": render it without the expert.
      question: question repeated in the expert's turn; "": text of the user's turn.
      call: text of the calling turn; "": the model's wording. Only the first request before a turn counts.
    """

    expert: str
    args: str = ""
    images: tuple[RequestImage, ...] = (RequestImage(),)
    before_turn: int = 1
    policy: str = "always"
    question: str = ""
    call: str = ""

    @classmethod
    def of(cls, expert: str, args: str, images: Any, *rest: Any) -> ExpertRequest:
        """A request from JSON values: `images` is a list of [image, role]."""
        return cls(expert, args, tuple(RequestImage(*image) for image in images), *rest)


@dataclasses.dataclass(frozen=True)
class Example:
    """One record. `meta` contains plain values only (text, numbers, booleans, lists, dicts).

    A `pair` or `caption` is a user turn with a single `<image>` and a supervised assistant turn; a
    `document` is a sequence of supervised assistant turns; a `conversation` alternates. A `study` has images
    but no turns: a rule of `data/experts/dialogues` turns it into a conversation at load time.
    """

    id: str
    format: str
    images: tuple[ImageRef, ...] = ()
    turns: tuple[Turn, ...] = ()
    expert_requests: tuple[ExpertRequest, ...] = ()
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)

    def input_key(self, images: Sequence[RequestImage]) -> str:
        """Returns the key of an expert's inputs, from `meta.input_key`; raises `ValueError` without it."""
        keys: Any = self.meta.get("input_key")
        if isinstance(keys, str):
            keys = [keys] * len(self.images)
        try:
            return content_keys.inputs_key([(image.role, keys[image.image]) for image in images])
        except (TypeError, LookupError, ValueError):
            raise ValueError("no meta.input_key") from None

    def __post_init__(self) -> None:
        for name in ("images", "turns", "expert_requests"):
            values = getattr(self, name)
            if isinstance(values, list):  # `problem` rejects other types
                object.__setattr__(self, name, tuple(values))

    def validate(self) -> Example:
        """Returns the example; raises `UserError` with its id and the first violation if it is invalid."""
        if reason := self.problem():
            raise UserError(f"example {_quoted(self.id)}: {reason}")
        return self

    def problem(self) -> str | None:
        """Returns the first violation of the format, or None. Fields may have any value."""
        return example_checks.type_problem(self) or _problem(self)


def path_problem(path: str) -> str | None:
    """Returns why `path` is not a valid path below a data root, or None."""
    parts = path.replace("\\", "/").split("/")
    if not path or path.startswith(("/", "\\", "~")) or "://" in path or re.match(r"[A-Za-z]:", path):
        return f"path {path!r} is not relative to the data root"
    if ".." in parts or "\0" in path:
        return f"path {path!r} leaves the data root"
    return None


def _quoted(value: object) -> str:
    return repr(value if not isinstance(value, str) else value[:_MAX_QUOTED])[: 2 * _MAX_QUOTED]


def _problem(example: Example) -> str | None:
    if example.format not in FORMATS:
        return f"format {_quoted(example.format)} is not one of {', '.join(FORMATS)}"
    for index, image in enumerate(example.images):
        if reason := image.problem():
            return f"image {index} {reason}"
    if example.format == "study":
        if example.turns or example.expert_requests:
            return "a study has no turns and no requests; its dialogue is made at load time"
        return None if example.images else "a study without images"
    if not example.turns:
        return "has no turns"
    for index, turn in enumerate(example.turns):
        if turn.role not in ROLES:
            return f"turn {index} has role {_quoted(turn.role)}, not one of {', '.join(ROLES)}"
        if turn.supervised and turn.role != "assistant":
            return f"turn {index} is supervised but has role {turn.role}"
        if turn.role == "system" and index > 0:
            return f"turn {index} is a system turn; only the first may be"
    markers = sum(turn.text.count(IMAGE_MARKER) for turn in example.turns)
    if markers != len(example.images):
        return f"{markers} {IMAGE_MARKER} markers for {len(example.images)} images"
    if reason := _role_problem(example):
        return reason
    if not any(turn.supervised for turn in example.turns):
        return "no turn is supervised"
    return _request_problem(example)


def _role_problem(example: Example) -> str | None:
    roles = [turn.role for turn in example.turns]
    if example.format in ("pair", "caption"):
        if roles != ["user", "assistant"] or example.turns[0].text.strip() != IMAGE_MARKER:
            return f"a {example.format} is a user turn '{IMAGE_MARKER}' and an assistant turn"
        return None
    if example.format == "document":
        if any(role != "assistant" for role in roles) or not all(t.supervised for t in example.turns):
            return "a document has supervised assistant turns only"
        return None
    dialogue = roles[1:] if roles[0] == "system" else roles
    if dialogue and dialogue[0] == "expert":
        return "starts with an expert turn; a conversation starts with a user turn"
    if any((role == "assistant") != (index % 2 == 1) for index, role in enumerate(dialogue)):
        return f"roles do not alternate user, assistant: {', '.join(roles[:_MAX_QUOTED_ROLES])}"
    for index, turn in enumerate(example.turns):
        if turn.role == "assistant" and IMAGE_MARKER in turn.text:
            return f"turn {index} contains a marker {IMAGE_MARKER}; assistant turns have no images"
    return None


def _request_problem(example: Example) -> str | None:
    if example.expert_requests and example.format != "conversation":
        return f"a {example.format} cannot have expert requests; only a conversation can"
    seen: set[tuple[int, str, str]] = set()
    for request in example.expert_requests:
        name = f"request for {_quoted(request.expert)}"
        if reason := Call(request.expert, request.args).problem():
            return f"{name}: {reason}"
        if request.policy not in POLICIES:
            return f"{name} has policy {_quoted(request.policy)}, not one of {', '.join(POLICIES)}"
        roles = [image.role for image in request.images]
        if not roles or len(set(roles)) != len(roles):
            return f"{name} has {len(roles)} images for {len(set(roles))} roles; each role needs one image"
        for image in request.images:
            if not 0 <= image.image < len(example.images):
                return f"{name} is for image {image.image} of {len(example.images)}"
        if not 0 <= request.before_turn < len(example.turns):
            return f"{name} is before turn {request.before_turn} of {len(example.turns)}"
        if example.turns[request.before_turn].role != "assistant":
            return f"{name} is before turn {request.before_turn}, which is not an assistant turn"
        call = (request.before_turn, request.expert, request.args)
        if call in seen:
            return f"{name} is duplicated before turn {request.before_turn}"
        seen.add(call)
        if IMAGE_MARKER in request.question or IMAGE_MARKER in request.call:
            return f"{name} has a marker {IMAGE_MARKER} in its text"
        first = next(r for r in example.expert_requests if r.before_turn == request.before_turn)
        if request is first and request.call:
            calls = [
                (r.expert, r.args) for r in example.expert_requests if r.before_turn == first.before_turn
            ]
            if [(c.expert, c.args) for c in parse_turn(request.call).calls] != calls:
                return f"{name} has a calling turn with other calls"
    return None


def from_instruction(item: Any) -> Example:
    """Reads one item of a VILA instruction JSON.

    Like VILA, drops a leading assistant message. If an item has images but no marker in a user turn, one
    `<image>` is inserted before its first user turn. Spaces are preserved; `text_rules.TextRules.spaces`
    normalizes them around images.

    Args:
      item: `id`; `conversations` or `messages` with `from`/`value` or `role`/`content`, where the content may
        be a list of parts of type `text`, `image` or `image_url`; and `image` or `images` (paths below the
        image folder, may be null). The key `vilam3` contains everything that VILA's format cannot express.

    Raises:
      UserError: names the item's id and the problem, without values of the item.
    """
    name = item.get("id") if isinstance(item, Mapping) else None
    name = str(name) if example_checks.is_int(name) else name
    try:
        if not isinstance(item, Mapping):
            raise ValueError(f"is {example_checks.kind_of(item)}, not an object")
        example = _read_item("" if name is None else name, item)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        reason = str(error) if type(error) is ValueError else type(error).__name__
        raise UserError(f"instruction item {_quoted(name)}: not in VILA's format ({reason})") from error
    return example.validate()


def _read_item(name: Any, item: Mapping[str, Any]) -> Example:
    extension = item.get(_EXTENSION_KEY)
    if extension is not None and not isinstance(extension, Mapping):
        raise ValueError(f"{_EXTENSION_KEY} is {example_checks.kind_of(extension)}, not an object")
    turns, inline_paths = _turns_of(item)
    paths = _paths_of(item)
    if paths and inline_paths:
        raise ValueError("names images both in its turns and outside them")
    paths = paths or inline_paths
    if not extension:
        turns = _normalized_by_vila(turns, bool(paths))
        return Example(
            id=name,
            format="conversation",
            images=tuple(ImageRef(path=path) for path in paths),
            turns=tuple(Turn(role, text, role == "assistant") for role, text in turns),
        )
    roles = extension.get("roles", [role for role, _ in turns])
    supervised = extension.get("supervised", [role == "assistant" for role in roles])
    slices = extension.get("slices", [None] * len(paths))
    for field, values, count in (
        ("roles", roles, len(turns)),
        ("supervised", supervised, len(turns)),
        ("slices", slices, len(paths)),
    ):
        if not isinstance(values, list) or len(values) != count:
            raise ValueError(f"{_EXTENSION_KEY}.{field} is not a list of {count}")
    return Example(
        id=name,
        format=extension.get("format", "conversation"),
        images=tuple(
            ImageRef(path=path) if cut is None else _slice_ref(path, *cut)
            for path, cut in zip(paths, slices, strict=True)
        ),
        turns=tuple(
            Turn(role, text, target) for role, (_, text), target in zip(roles, turns, supervised, strict=True)
        ),
        expert_requests=tuple(ExpertRequest.of(*request) for request in extension.get("experts", [])),
        meta=extension.get("meta", {}),
    )


def _paths_of(item: Mapping[str, Any]) -> list[Any]:
    """Returns the images named outside the turns. Null and "" (an empty table cell) mean none."""
    named = [item[key] for key in ("images", "image") if item.get(key) not in (None, "")]
    if len(named) > 1:
        raise ValueError("has both image and images")
    paths = named[0] if named else []
    paths = [paths] if isinstance(paths, str) else paths
    if not isinstance(paths, list):
        raise ValueError(f"its images are {example_checks.kind_of(paths)}, not a path or a list of paths")
    for index, path in enumerate(paths):
        if not isinstance(path, str):
            raise ValueError(f"image {index} is {example_checks.kind_of(path)}, not a path")
    return paths


def _turns_of(item: Mapping[str, Any]) -> tuple[list[tuple[str, str]], list[str]]:
    """Returns (role, text) of every turn, and the paths of images among their parts."""
    key = next((key for key in _DIALOGUE_KEYS if item.get(key) is not None), None)
    if key is None:
        raise ValueError(f"has none of {', '.join(_DIALOGUE_KEYS)}")
    messages, paths, turns = item[key], [], []
    if not isinstance(messages, list):
        raise ValueError(f"{key} is {example_checks.kind_of(messages)}, not a list")
    for index, turn in enumerate(messages):
        if not isinstance(turn, Mapping):
            raise ValueError(f"turn {index} is {example_checks.kind_of(turn)}, not an object")
        role = turn.get("from", turn.get("role"))
        if not isinstance(role, str) or role not in _TO_ROLE:
            raise ValueError(f"the role of turn {index} is not one of {', '.join(_TO_ROLE)}")
        text = turn.get("value", turn.get("content"))
        if isinstance(text, list):
            text = "".join(_part(part, index, paths) for part in text)
        if not isinstance(text, str):
            raise ValueError(f"the text of turn {index} is {example_checks.kind_of(text)}, not text")
        turns.append((_TO_ROLE[role], text))
    return turns, paths


def _part(part: Any, turn: int, paths: list[str]) -> str:
    """Returns the text of one content part; appends the path of an image to `paths`."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if kind not in ("image", "image_url"):
        raise ValueError(f"turn {turn} has a part that is neither text nor an image")
    found = part.get("image_url", part.get("image"))
    found = found.get("url") if isinstance(found, Mapping) else found
    if isinstance(found, str):
        paths.append(found)
    elif found is not None:  # without a path, the images are named outside the turns
        raise ValueError(f"turn {turn} has an image that is {example_checks.kind_of(found)}, not a path")
    return IMAGE_MARKER


def _slice_ref(path: str, axis: Any, index: Any, window: Any, modality: Any = None) -> ImageRef:
    return ImageRef(None, path, axis, index, None if window is None else tuple(window), modality)


def _normalized_by_vila(turns: list[tuple[str, str]], has_images: bool) -> list[tuple[str, str]]:
    if turns and turns[0][0] == "assistant":
        turns = turns[1:]
    if has_images and not any(IMAGE_MARKER in text for role, text in turns if role != "assistant"):
        first = next((index for index, (role, _) in enumerate(turns) if role == "user"), None)
        if first is not None:
            turns = [*turns]
            turns[first] = ("user", f"{IMAGE_MARKER}\n{turns[first][1]}")
    return turns
