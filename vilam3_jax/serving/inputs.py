"""What a request asks: its messages, their images, and how to answer."""

from __future__ import annotations

import base64
import binascii
import contextlib
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vilam3_jax.data import file_kinds
from vilam3_jax.data.isolation import DecoderProcess
from vilam3_jax.data.volumes import AXES
from vilam3_jax.errors import UnavailableError, UserError
from vilam3_jax.inference.agent import DEFAULT_MAX_NEW_TOKENS, Query
from vilam3_jax.inference.assistant import Assistant, check_grid
from vilam3_jax.inference.constraints import AnswerForm
from vilam3_jax.inference.images import Scan, open_image
from vilam3_jax.inference.sampling import GREEDY, Sampling
from vilam3_jax.serving.errors import ApiError, bad_request
from vilam3_jax.serving.fields import Fields
from vilam3_jax.serving.files import FileStore

NO_EXPERTS = "this server has none; start it with --annotations or --expert_host"
MAX_MESSAGES = 256
MAX_PARTS = 64
MAX_ID = 128  # characters
# Fields of OpenAI's interfaces that change nothing here, such as labels of the client.
LABELS = (
    *("metadata", "user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "service_tier"),
    "parallel_tool_calls",
)
_MAX_IMAGES = 16
MAX_STOPS = 4
MAX_STOP_CHARACTERS = 200
_CHARACTERS_PER_POSITION = 16  # of a long text; longer ones are refused before they are tokenized
MAX_SLICES = 16
MAX_NUMBER = 1_000_000
_DATA_URL = re.compile(r"data:[\w.+-]*/?[\w.+-]*(?:;[\w.+-]+=[\w.+-]*)*;base64,", re.IGNORECASE | re.ASCII)
_ROLE = re.compile(r"[a-z][a-z0-9]{0,15}")
_HTTP = re.compile(r"\s*(https?|ftp|file):", re.IGNORECASE)
# Otherwise a model may write blanks without end.
_COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclasses.dataclass(frozen=True)
class View:
    """What is shown of an image; see `open_image`."""

    axis: str | None = None
    index: int | None = None
    slices: int = 1
    window: tuple[float, float] | None = None
    modality: str | None = None
    series: str | None = None
    frame: int | None = None


@dataclasses.dataclass(frozen=True)
class ImagePart:
    """An image of a message: the id of an uploaded file, the bytes of a data URL, or a checked path."""

    source: str | bytes | Path
    view: View
    role: str = ""


@dataclasses.dataclass(frozen=True)
class Said:
    """A message: role is system, user or assistant."""

    role: str
    text: str
    images: tuple[ImagePart, ...] = ()


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of `vilam3`.

    Attributes:
      experts: whether the model may call experts.
      images: whether the answer holds the image as shown to the model, and the overlay of an expert.
      masks: whether label maps of experts are kept for a while, so that the client can fetch them.
      transcript: whether the answer holds the turns that the user does not see.
      view: of images without options of their own.
    """

    experts: bool
    images: bool = False
    view: View = View()
    masks: bool = False
    transcript: bool = False


@dataclasses.dataclass(frozen=True)
class Ask:
    """A checked request.

    Attributes:
      said: the dialogue, which ends with the user's question.
      options: see `Options`.
      max_new_tokens: limit of every turn of the model.
      sampling: of every turn.
      stops: texts that end the answer; they are not part of it.
      form: of the answer, or None.
      log_probs: whether the answer holds the log-probabilities of its tokens.
      previous: id of the answer that the question follows, whose dialogue was kept; "" for none.
      store: whether the dialogue is kept, so that a question can follow.
    """

    said: tuple[Said, ...]
    options: Options
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    sampling: Sampling = GREEDY
    stops: tuple[str, ...] = ()
    form: AnswerForm | None = None
    log_probs: bool = False
    previous: str = ""
    store: bool = False


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """The messages of a request with their images read."""

    question: Query
    exchanges: tuple[tuple[Query, str], ...]
    system: str


def options_of(fields: Fields, *, experts: bool) -> Options:
    """Takes the rest of `vilam3`, which clients send in `extra_body`; `experts` is the default."""
    given = fields.flag("experts", experts)
    if given and not experts:
        raise fields.error("experts", NO_EXPERTS)
    options = Options(
        given,
        fields.flag("images", False),
        view_of(fields),
        masks=fields.flag("masks", False),
        transcript=fields.flag("transcript", False),
    )
    fields.finish()
    return options


def view_of(fields: Fields) -> View:
    """Takes the options of an image."""
    window = fields.take("window")
    if window is not None:
        numbers = isinstance(window, list) and len(window) == 2
        if not numbers or not all(type(one) in (int, float) and abs(one) <= MAX_NUMBER for one in window):
            raise fields.error("window", "must be [CENTRE, WIDTH], for example [50, 400]")
        if not window[1] > 0:
            raise fields.error("window", "the width must be above 0")
        window = (float(window[0]), float(window[1]))
    return View(
        axis=fields.choice("axis", sorted(AXES)) if fields.has("axis") else None,
        index=fields.integer("slice", 0, MAX_NUMBER),
        slices=fields.integer("slices", 1, MAX_SLICES) or 1,
        window=window,
        modality=fields.text("modality", limit=16) if fields.has("modality") else None,
        series=fields.text("series", limit=128) if fields.has("series") else None,
        frame=fields.integer("frame", 0, MAX_NUMBER),
    )


def image_part(part: Fields, source: str, where: str, default: View) -> ImagePart:
    """An image of a content part, from a data URL or a file id; `where` names its field."""
    own = part.object("vilam3")
    role, view = "", default
    if own is not None:
        role = own.text("role", "")
        if role and not _ROLE.fullmatch(role):
            raise own.error("role", "must be a sequence such as t1c, t1, t2 or flair")
        given = view_of(own)
        own.finish()
        view = given if given != View() else default
    return ImagePart(_source(source, where), view, role)


def _source(source: str, where: str) -> str | bytes:
    return source if source.startswith("file-") else data_of(source, where)


def data_of(source: str, where: str) -> bytes:
    """The bytes of a data URL in the field `where`; raises `ApiError`."""
    if _HTTP.match(source):
        raise bad_request(
            f"{where}: this server fetches no URLs; send the image as a data URL, or upload it to /v1/files",
            where,
        )
    head = _DATA_URL.match(source, 0, 256)
    if head is None:
        raise bad_request(
            f"{where}: must be a data URL (data:image/png;base64,…) or the id of an uploaded file", where
        )
    try:
        data = base64.b64decode(source[head.end() :].encode("ascii"), validate=True)
    except (ValueError, binascii.Error):
        raise bad_request(
            f"{where}: the data URL is not valid base64; encode the file again", where
        ) from None
    if not data:
        raise bad_request(f"{where}: the data URL is empty; send a file", where)
    return data


def sampling_of(body: Fields) -> Sampling:
    """Takes temperature, top_p and seed; greedy by default."""
    temperature = body.number("temperature", 0, 2)
    top_p = body.number("top_p", 0, 1)
    seed = body.integer("seed", -(2**63), 2**63 - 1)
    return Sampling(
        temperature=temperature or 0.0,
        # OpenAI's 0 means the most probable token.
        top_p=1.0 if top_p is None else max(top_p, 1e-6),
        seed=(seed or 0) % 2**32,
    )


def limit_of(body: Fields, keys: Sequence[str], default: int, max_length: int) -> int:
    """Takes the limit of new tokens from the first of `keys` that is given."""
    given = [body.integer(key, 1, MAX_NUMBER) for key in keys]
    return min(next((one for one in given if one is not None), default), max_length)


def stops_of(body: Fields) -> tuple[str, ...]:
    """Takes stop, a string or a list of up to four."""
    value = body.take("stop")
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or not all(isinstance(one, str) and one for one in stops):
        raise body.error("stop", "must be a string, or a list of strings that are not empty")
    if len(stops) > MAX_STOPS or any(len(one) > MAX_STOP_CHARACTERS for one in stops):
        raise body.error(
            "stop", f"must be up to {MAX_STOPS} strings of up to {MAX_STOP_CHARACTERS} characters"
        )
    return tuple(dict.fromkeys(stops))


def form_of(body: Fields, key: str, *, nested: bool) -> AnswerForm | None:
    """Takes the form of the answer: text, json_object or json_schema (nested in an object of that name)."""
    fields = body.object(key)
    if fields is None:
        return None
    kind = fields.choice("type", ("text", "json_object", "json_schema"))
    schema: dict[str, Any] = {"type": "object"}
    if kind == "json_schema":
        inner = fields.object("json_schema") if nested else fields
        if inner is None:
            raise fields.error("json_schema", "is missing; give an object with name and schema")
        inner.ignore("name", "description", "strict")
        given = inner.object("schema")
        if given is None:
            raise inner.error("schema", "is missing; give a JSON schema")
        schema = given.take_all()
        if nested:
            inner.finish()
    fields.finish()
    if kind == "text":
        return None
    try:
        return AnswerForm.json_of({**schema, "x-guidance": _COMPACT})
    except UserError as error:
        raise fields.error("schema", str(error)) from None


def dialogue_of(messages: Sequence[Said], max_length: int, *, previous: str = "") -> tuple[Said, ...]:
    """Joins consecutive messages of one role, those of the system at the start, and checks their order.

    `previous` is the id of the answer that they follow, or "".

    Raises:
      ApiError: no question at the end, an empty one, more text than the model can read, or messages that a
        kept dialogue has already.
    """
    size, limit = sum(len(one.text) for one in messages), max_length * _CHARACTERS_PER_POSITION
    if size > limit:
        raise ApiError(
            400,
            f"the messages have {size} characters, this model reads {limit}; ask something shorter",
            "context_length_exceeded",
        )
    if sum(len(one.images) for one in messages) > _MAX_IMAGES:
        raise bad_request(f"more than {_MAX_IMAGES} images; send fewer")
    joined: list[Said] = []
    for one in sorted(messages, key=lambda one: one.role != "system"):
        if joined and joined[-1].role == one.role:
            last = joined.pop()
            text = "\n".join(text for text in (last.text, one.text) if text)
            one = Said(one.role, text, last.images + one.images)
        joined.append(one)
    turns = [one for one in joined if one.role != "system"]
    if not turns or turns[-1].role != "user":
        raise bad_request("the last message must be the user's question")
    if turns[0].role != "user":
        raise bad_request("the first message after the system's must be the user's")
    if not turns[-1].text.strip():
        raise bad_request("the question is empty; ask something")
    if previous and len(joined) > 1:
        raise bad_request(
            "the dialogue so far was kept; send only the question that follows, or all messages without the "
            "id of the previous answer"
        )
    for one in turns:
        roles = [image.role for image in one.images if image.role]
        if len(set(roles)) < len(roles):
            raise bad_request("two images have the same role; give each sequence its own")
    return tuple(joined)


def read(
    said: Sequence[Said],
    *,
    assistant: Assistant,
    store: FileStore,
    decoder: DecoderProcess,
    owner: str,
    keep: contextlib.ExitStack,
) -> Dialogue:
    """Reads the images of a dialogue of `dialogue_of`; files of data URLs exist until `keep` ends."""
    processor = assistant.generator.processor

    def opened(part: ImagePart) -> Scan:
        stored = store.get(part.source, owner) if isinstance(part.source, str) else None
        if stored is not None and (seen := store.views.get(stored, part.view)) is not None:
            return dataclasses.replace(seen, role=part.role)
        if isinstance(part.source, Path):
            path = part.source
        elif isinstance(part.source, bytes):
            path = keep.enter_context(store.for_one_request(part.source))
        else:
            assert stored is not None
            path = stored.path
        try:
            if stored is None and file_kinds.identify(path).reader == "dicom":
                raise UserError("DICOM is not read from data URLs; upload the file to /v1/files")
            scan = open_image(
                path,
                processor.kept_size,
                preprocessing=processor.preprocessing,
                decoder=decoder,
                **dataclasses.asdict(part.view),
            )
        except UnavailableError as error:
            raise UnavailableError(store.without_paths(str(error))) from None
        except UserError as error:
            raise bad_request(store.without_paths(str(error)), code="unusable_file") from None
        if stored is not None:
            size = sum(image.nbytes for image in (scan.image, *scan.images)) + len(scan.png)
            store.views.keep(stored, part.view, scan, size)
        return dataclasses.replace(scan, role=part.role)

    system = "".join(one.text for one in said if one.role == "system").strip()
    turns = [one for one in said if one.role != "system"]
    asked = [
        (Query(one.text.strip(), tuple(map(opened, one.images))) if one.role == "user" else None, one.text)
        for one in turns
    ]
    for query, _ in asked:
        if query is not None and len(sequences := [scan for scan in query.scans if scan.role]) > 1:
            check_grid(sequences)
    questions = [query for query, _ in asked if query is not None]
    answers = [text for query, text in asked if query is None]
    return Dialogue(questions[-1], tuple(zip(questions[:-1], answers, strict=True)), system)
