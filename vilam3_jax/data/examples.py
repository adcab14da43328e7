"""The record of a dataset: an `Example`, and the VILA instruction JSON.

An example knows nothing of tokens, templates, experts' answers or overlays: those are rendered
when it is loaded (`data/render.py`), so switching experts never rebuilds a dataset.
"""

from __future__ import annotations

import dataclasses
import os
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

_FROM_ROLE = {"user": "human", "assistant": "gpt", "system": "system", "expert": "human"}
_TO_ROLE = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_EXTENSION_KEY = "vilam3"  # what VILA's own loader ignores
_DIALOGUE_KEYS = ("conversations", "messages")
_LONGEST_NAME = 60  # characters of an id, or another word of a record, in a message
_NAMED_ROLES = 8


@dataclasses.dataclass(frozen=True)
class ImageRef:
    """Where one image of an example comes from.

    Attributes:
      data: an encoded 2-D image (PNG, JPEG, ...), or None when `path` is given.
      path: a file below the dataset's data root, '/'-separated; a 2-D image, or a volume when
        `axis` is given.
      axis: which axis of the canonical (RAS) volume is cut: 0, 1 or 2.
      index: which plane along `axis`, in voxels; None with an axis: the whole volume, of which the slices are
        chosen at load time.
      window: (centre, width) in the volume's intensity unit (HU for CT); None: as the model's preprocessing
        shows its modality.
      modality: DICOM's code of a volume whose file states none, such as "CT" for a NIfTI file; None: as the
        file states.
    """

    data: bytes | None = None
    path: str | None = None
    axis: int | None = None
    index: int | None = None
    window: tuple[float, float] | None = None
    modality: str | None = None

    def problem(self) -> str | None:
        """Returns why this reference cannot be used, or None."""
        if (self.data is None) == (self.path is None):
            return "needs either bytes or a path, not both"
        if self.data is not None and not self.data:
            return "has empty bytes"
        if self.path is not None and (reason := path_problem(self.path)):
            return reason
        if self.axis is None and self.index is not None:
            return "has an index and no axis"
        if self.axis is not None:
            if self.data is not None:
                return "axis and index are for volumes, which are given by path"
            if self.axis not in (0, 1, 2) or (self.index is not None and self.index < 0):
                return f"axis {self.axis}, index {self.index} is no slice"
        if self.window is not None and not self.window[1] > 0:
            return f"window {self.window} is not (centre, width > 0)"
        if self.modality is not None and (self.axis is None or not self.modality.isupper()):
            return f"modality {self.modality!r} is not a DICOM code of a volume, such as CT"
        return None


@dataclasses.dataclass(frozen=True)
class Turn:
    """One message: who speaks, the text with `<image>` markers, and whether it is a target."""

    role: str
    text: str
    supervised: bool = False


@dataclasses.dataclass(frozen=True)
class RequestImage:
    """One input of an expert.

    Attributes:
      image: which of the example's images.
      role: what the expert takes it for, such as "t1c"; "" for the only input.
    """

    image: int = 0
    role: str = ""


@dataclasses.dataclass(frozen=True)
class ExpertRequest:
    """A place where an expert's result belongs.

    Attributes:
      expert: the expert's name, as on its card.
      args: the call's arguments, e.g. "organs"; "" for none.
      images: what the expert sees, in the order of its roles.
      before_turn: index of the assistant turn that the result comes before. Requests before the same turn are
        made in one turn, in their order here.
      policy: "always": without a result the example is skipped; "optional": it is then
        rendered without the expert.
      question: what the expert's turn repeats; "" for the words of the user's turn.
      call: the words of the calling turn; "" for those of the model's wording. Of several requests before one
        turn, the first one's count.
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
        """Reads the plain values of `wire_values`."""
        return cls(expert, args, tuple(RequestImage(*image) for image in images), *rest)

    def wire_values(self) -> list[Any]:
        """Plain values, for JSON."""
        images = [[image.image, image.role] for image in self.images]
        words = [self.question, self.call] if self.question or self.call else []
        return [self.expert, self.args, images, self.before_turn, self.policy, *words]


@dataclasses.dataclass(frozen=True)
class Example:
    """One record. `meta` holds plain values only (text, numbers, booleans, lists, dicts).

    `pair` and `caption` are a user turn that is one `<image>` and a supervised assistant turn;
    `document` is a run of assistant turns, all supervised; `conversation` alternates. A `study` has images
    and no turns: a rule of `data/experts/dialogues` makes a conversation of it when it is loaded.
    """

    id: str
    format: str
    images: tuple[ImageRef, ...] = ()
    turns: tuple[Turn, ...] = ()
    expert_requests: tuple[ExpertRequest, ...] = ()
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)

    def input_key(self, images: Sequence[RequestImage]) -> str:
        """The key of what an expert sees, from the content keys of the images (`meta.input_key`).

        Raises:
          ValueError: the example does not state them.
        """
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
            if isinstance(values, list):  # what is no list is refused by `problem`
                object.__setattr__(self, name, tuple(values))

    def validate(self) -> Example:
        """Returns itself if the record keeps the contract.

        Raises:
          UserError: names the example's id and the first broken rule.
        """
        if reason := self.problem():
            raise UserError(f"example {_name(self.id)}: {reason}")
        return self

    def problem(self) -> str | None:
        """Returns the first rule of the contract that is broken, or None; whatever the values are."""
        return example_checks.type_problem(self) or _problem(self)


def path_problem(path: str) -> str | None:
    """Returns why `path` may not be followed below a data root, or None."""
    parts = path.replace("\\", "/").split("/")
    if not path or path.startswith(("/", "\\", "~")) or "://" in path or re.match(r"[A-Za-z]:", path):
        return f"path {path!r} is not relative to the data root"
    if ".." in parts or "\0" in path:
        return f"path {path!r} leaves the data root"
    return None


def _name(value: object) -> str:
    """An id, or another word of a record, short enough for a message."""
    return repr(value if not isinstance(value, str) else value[:_LONGEST_NAME])[: 2 * _LONGEST_NAME]


def _problem(example: Example) -> str | None:
    if example.format not in FORMATS:
        return f"format {_name(example.format)} is none of {', '.join(FORMATS)}"
    for position, image in enumerate(example.images):
        if reason := image.problem():
            return f"image {position} {reason}"
    if example.format == "study":
        return _study_problem(example)
    if not example.turns:
        return "has no turns"
    for position, turn in enumerate(example.turns):
        if turn.role not in ROLES:
            return f"turn {position} has role {_name(turn.role)}, none of {', '.join(ROLES)}"
        if turn.supervised and turn.role != "assistant":
            return f"turn {position} is supervised but spoken by {turn.role}"
        if turn.role == "system" and position > 0:
            return f"turn {position} is a system turn; only the first may be"
    markers = sum(turn.text.count(IMAGE_MARKER) for turn in example.turns)
    if markers != len(example.images):
        return f"{markers} {IMAGE_MARKER} markers for {len(example.images)} images"
    if reason := _role_problem(example):
        return reason
    if not any(turn.supervised for turn in example.turns):
        return "no turn is supervised, nothing can be learnt from it"
    return _request_problem(example)


def _study_problem(example: Example) -> str | None:
    if example.turns or example.expert_requests:
        return "a study has no turns and no requests; its dialogue is made when it is loaded"
    return None if example.images else "a study without images"


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
    spoken = roles[1:] if roles[0] == "system" else roles
    if spoken and spoken[0] == "expert":
        return "an expert speaks first; a conversation begins with the user"
    for position, role in enumerate(spoken):
        if (role == "assistant") != (position % 2 == 1):
            return f"roles do not alternate user, assistant: {', '.join(roles[:_NAMED_ROLES])}"
    for position, turn in enumerate(example.turns):
        if turn.role == "assistant" and IMAGE_MARKER in turn.text:
            return f"turn {position} holds a marker {IMAGE_MARKER}, but an assistant shows no images"
    return None


def _request_problem(example: Example) -> str | None:
    if example.expert_requests and example.format != "conversation":
        return f"a {example.format} has no expert requests; only a conversation has"
    taken: set[tuple[int, str, str]] = set()
    for request in example.expert_requests:
        name = f"request for {_name(request.expert)}"
        if reason := Call(request.expert, request.args).problem():
            return f"{name}: {reason}"
        if request.policy not in POLICIES:
            return f"{name} has policy {_name(request.policy)}, none of {', '.join(POLICIES)}"
        roles = [image.role for image in request.images]
        if not roles or len(set(roles)) != len(roles):
            return f"{name} has {len(roles)} images of {len(set(roles))} roles; each role is needed once"
        for image in request.images:
            if not 0 <= image.image < len(example.images):
                return f"{name} is for image {image.image} of {len(example.images)}"
        if not 0 <= request.before_turn < len(example.turns):
            return f"{name} is before turn {request.before_turn} of {len(example.turns)}"
        if example.turns[request.before_turn].role != "assistant":
            return f"{name} is before turn {request.before_turn}, which no assistant speaks"
        call = (request.before_turn, request.expert, request.args)
        if call in taken:
            return f"{name} is made twice before turn {request.before_turn}"
        taken.add(call)
        if IMAGE_MARKER in request.question or IMAGE_MARKER in request.call:
            return f"{name} has a marker {IMAGE_MARKER} in its words"
        first = next(r for r in example.expert_requests if r.before_turn == request.before_turn)
        if request is first and request.call:
            made = [(r.expert, r.args) for r in example.expert_requests if r.before_turn == first.before_turn]
            if [(c.expert, c.args) for c in parse_turn(request.call).calls] != made:
                return f"{name} has a calling turn that makes other calls"
    return None


def from_instruction(item: Any) -> Example:
    """Reads one item of a VILA instruction JSON.

    A leading message of the assistant is dropped, as VILA does. An item that names images but has no marker
    in any user turn gets one `<image>` in front of its first user turn. Spaces stay as they are: what becomes
    of them around an image is a rule of the model (`text_rules.TextRules.spaces`).

    Args:
      item: `id`; `conversations`, or `messages`, of `from`/`value` or `role`/`content`, where content may be
        a list of parts of type `text`, `image` or `image_url`; and `image` or `images` (paths below the image
        folder), which may be null. Our own extension key carries what VILA has no word for.

    Raises:
      UserError: names the item's id and what is wrong, without values of the item.
    """
    name = item.get("id") if isinstance(item, Mapping) else None
    name = str(name) if example_checks.is_int(name) else name
    try:
        if not isinstance(item, Mapping):
            raise ValueError(f"is {example_checks.kind_of(item)}, not an object")
        example = _read_item("" if name is None else name, item)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        reason = str(error) if type(error) is ValueError else type(error).__name__
        raise UserError(f"instruction item {_name(name)}: not in the VILA form ({reason})") from error
    return example.validate()


def _read_item(name: Any, item: Mapping[str, Any]) -> Example:
    extension = item.get(_EXTENSION_KEY)
    if extension is not None and not isinstance(extension, Mapping):
        raise ValueError(f"{_EXTENSION_KEY} is {example_checks.kind_of(extension)}, not an object")
    turns, shown = _turns_of(item)
    paths = _paths_of(item)
    if paths and shown:
        raise ValueError("names images both in its turns and beside them")
    paths = paths or shown
    if not extension:
        turns = _as_vila_reads(turns, bool(paths))
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
            raise ValueError(f"{_EXTENSION_KEY}.{field} is no list of {count}")
    return Example(
        id=name,
        format=extension.get("format", "conversation"),
        images=tuple(
            ImageRef(path=path) if cut is None else _slice_of(path, *cut)
            for path, cut in zip(paths, slices, strict=True)
        ),
        turns=tuple(
            Turn(role, text, target) for role, (_, text), target in zip(roles, turns, supervised, strict=True)
        ),
        expert_requests=tuple(ExpertRequest.of(*request) for request in extension.get("experts", [])),
        meta=extension.get("meta", {}),
    )


def _paths_of(item: Mapping[str, Any]) -> list[Any]:
    """The images named beside the turns; null, or an empty text in a table's column, names none."""
    named = [item[key] for key in ("images", "image") if item.get(key) not in (None, "")]
    if len(named) > 1:
        raise ValueError("has both image and images")
    paths = named[0] if named else []
    paths = [paths] if isinstance(paths, str) else paths
    if not isinstance(paths, list):
        raise ValueError(f"its images are {example_checks.kind_of(paths)}, not a path or a list of paths")
    for position, path in enumerate(paths):
        if not isinstance(path, str):
            raise ValueError(f"image {position} is {example_checks.kind_of(path)}, not a path")
    return paths


def _turns_of(item: Mapping[str, Any]) -> tuple[list[tuple[str, str]], list[str]]:
    """((role, text) of every turn, paths of the images among their parts)."""
    key = next((key for key in _DIALOGUE_KEYS if item.get(key) is not None), None)
    if key is None:
        raise ValueError(f"has none of {', '.join(_DIALOGUE_KEYS)}")
    spoken, paths, turns = item[key], [], []
    if not isinstance(spoken, list):
        raise ValueError(f"{key} is {example_checks.kind_of(spoken)}, not a list")
    for position, turn in enumerate(spoken):
        if not isinstance(turn, Mapping):
            raise ValueError(f"turn {position} is {example_checks.kind_of(turn)}, not an object")
        role = turn.get("from", turn.get("role"))
        if not isinstance(role, str) or role not in _TO_ROLE:
            raise ValueError(f"turn {position} is spoken by none of {', '.join(_TO_ROLE)}")
        text = turn.get("value", turn.get("content"))
        if isinstance(text, list):
            text = "".join(_part(part, position, paths) for part in text)
        if not isinstance(text, str):
            raise ValueError(f"the text of turn {position} is {example_checks.kind_of(text)}, not text")
        turns.append((_TO_ROLE[role], text))
    return turns, paths


def _part(part: Any, position: int, paths: list[str]) -> str:
    """The text of one part of a content; the path of an image is added to `paths`."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if kind not in ("image", "image_url"):
        raise ValueError(f"turn {position} has a part that is neither text nor an image")
    found = part.get("image_url", part.get("image"))
    found = found.get("url") if isinstance(found, Mapping) else found
    if isinstance(found, str):
        paths.append(found)
    elif found is not None:  # the images are then beside the turns
        raise ValueError(f"turn {position} has an image that is {example_checks.kind_of(found)}, not a path")
    return IMAGE_MARKER


def _slice_of(
    path: str,
    axis: int | None,
    index: int | None,
    window: list[float] | None,
    modality: str | None = None,
) -> ImageRef:
    """A slice, or a whole volume, as `to_instruction` writes it; older files state no modality."""
    return ImageRef(None, path, axis, index, None if window is None else tuple(window), modality)  # type: ignore[arg-type]


def _as_vila_reads(turns: list[tuple[str, str]], has_images: bool) -> list[tuple[str, str]]:
    if turns and turns[0][0] == "assistant":
        turns = turns[1:]
    if has_images and not any(IMAGE_MARKER in text for role, text in turns if role != "assistant"):
        first = next((place for place, (role, _) in enumerate(turns) if role == "user"), None)
        if first is not None:
            turns = [*turns]
            turns[first] = ("user", f"{IMAGE_MARKER}\n{turns[first][1]}")
    return turns


def to_instruction(example: Example) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Returns the VILA instruction item, and the image files (by relative path) to write beside it.

    `from_instruction` gives back the same example, with bytes turned into paths.
    """
    files: dict[str, bytes] = {}
    paths = []
    for position, image in enumerate(example.images):
        if image.path is not None:
            paths.append(image.path)
            continue
        assert image.data is not None  # an image without a path
        stem = re.sub(r"[^A-Za-z0-9_-]", lambda match: f"%{ord(match[0]):x}.", example.id)
        path = f"images/{stem}_{position}{_suffix(image.data)}"
        files[path] = image.data
        paths.append(path)
    item: dict[str, Any] = {"id": example.id}
    if paths:
        item |= {"image": paths[0]} if len(paths) == 1 else {"images": paths}
    item["conversations"] = [{"from": _FROM_ROLE[turn.role], "value": turn.text} for turn in example.turns]
    item[_EXTENSION_KEY] = {
        "format": example.format,
        "roles": [turn.role for turn in example.turns],
        "supervised": [turn.supervised for turn in example.turns],
        "slices": [
            None if i.axis is None and i.window is None else [i.axis, i.index, i.window, i.modality]
            for i in example.images
        ],
        "experts": [request.wire_values() for request in example.expert_requests],
        "meta": example.meta,
    }
    return item, files


def _suffix(data: bytes) -> str:
    if data.startswith(b"\x89PNG"):
        return ".png"
    return ".jpg" if data.startswith(b"\xff\xd8") else os.extsep + "img"
