"""Tokenizers from Hugging Face folders; uses only the `tokenizers` library.

Text of users and reports never becomes a control token: `Tokenizer.encode` encodes `<|im_end|>` as ordinary
characters unless the caller passes `allow_special=True`.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from vilam3_jax.data.templates import CONTROL_TOKENS
from vilam3_jax.errors import UserError
from vilam3_jax.runtime.paths import PathLike, as_path, read_bytes, write_text_atomic

CHATML_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

# The largest known tokenizer.json is Gemma's, with 33 MB.
_MAX_FILE_BYTES = 256 << 20
_ROLES = ("bos", "eos", "pad")
_CONTROL = re.compile(r"<\|[^<>|]{1,64}\|>")  # the usual form of a control token


class Tokenizer:
    """Converts between text and token ids.

    Attributes:
      bos_id: id of the beginning-of-sequence token, or None if the model has none (Qwen).
      adds_bos: whether the post-processor of the file prepends `bos_id`; `encode` does not.
      eos_id: id that ends an answer.
      pad_id: id of unused positions; `eos_id` if the folder names none (Llama 3). Padding is identified by
        masks, never by this id.
      stop_ids: all ids at which generation stops, `eos_id` first.
      special_tokens: control tokens and their ids: the tokens that the file marks as special, those of the
        chat templates, those of the form `<|name|>`, and the beginning and end of a sequence. Text
        never becomes one of them.
      chat_template: Jinja template of the folder, or None. Kept for export only.
    """

    def __init__(
        self,
        tokenizer_json: str,
        *,
        eos_id: int,
        bos_id: int | None = None,
        pad_id: int | None = None,
        stop_ids: Sequence[int] = (),
        chat_template: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ):
        """Builds a tokenizer from the text of a `tokenizer.json`; most callers use `load_tokenizer`.

        `settings` is the content of `tokenizer_config.json`, which `save` writes back.
        """
        self._json, self._settings = tokenizer_json, dict(settings or {})
        self.bos_id, self.eos_id = bos_id, eos_id
        self.pad_id = eos_id if pad_id is None else pad_id
        self.stop_ids = tuple(dict.fromkeys((eos_id, *stop_ids)))
        self.chat_template = chat_template
        self._plain = _build(tokenizer_json, encode_special_tokens=True)
        added = self._plain.get_added_tokens_decoder()
        self.special_tokens = {token.content: index for index, token in added.items() if token.special}
        # Some files do not mark all control tokens.
        vocabulary = self._plain.get_vocab(with_added_tokens=True)
        ends = {self._plain.id_to_token(index) for index in (bos_id, eos_id) if index is not None}
        required = {token for token in vocabulary if token in CONTROL_TOKENS or _CONTROL.fullmatch(token)}
        self.special_tokens |= {token: vocabulary[token] for token in required | ends if token is not None}
        self._special_ids = frozenset(self.special_tokens.values())
        self.adds_bos = self._plain.encode("", add_special_tokens=True).ids[:1] == [bos_id]
        self.vocab_size = max(vocabulary.values()) + 1

    @property
    def fingerprint(self) -> str:
        """Returns a hash of everything that affects the encoding, independent of the file layout."""
        values = json.loads(self._json)
        decisive = {key: value for key, value in values.items() if key not in ("truncation", "padding")}
        text = json.dumps([decisive, self.bos_id, self.eos_id, self.pad_id], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """The text of the `tokenizer.json`."""
        return self._json

    @functools.cached_property
    def _with_specials(self) -> tokenizers.Tokenizer:
        # A second object, because switching the mode of one is not thread-safe.
        return _build(self._json, encode_special_tokens=False)

    def __reduce__(self) -> tuple[Any, ...]:
        # The library's own pickling loses `encode_special_tokens`.
        make = functools.partial(
            Tokenizer,
            eos_id=self.eos_id,
            bos_id=self.bos_id,
            pad_id=self.pad_id,
            stop_ids=self.stop_ids,
            chat_template=self.chat_template,
            settings=self._settings,
        )
        return make, (self._json,)

    def limited_to(self, size: int) -> Tokenizer:
        """Returns this tokenizer without added tokens of id `size` or higher.

        NVILA's tokenizer has media placeholders there, which have no row in the embedding. Raises `UserError`
        if more than `size` tokens remain or a required token would be removed.
        """
        values = json.loads(self._json)
        values["added_tokens"] = [token for token in values.get("added_tokens") or [] if token["id"] < size]
        make, _ = self.__reduce__()
        limited = make(json.dumps(values, ensure_ascii=False))
        if max(limited.vocab_size - 1, self.pad_id, *self.stop_ids, self.bos_id or 0) >= size:
            raise UserError(
                f"the tokenizer has {self.vocab_size} tokens, the model only {size}; use the tokenizer this "
                "model was trained with"
            )
        return limited

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Encodes `text` without additional tokens.

        `allow_special` encodes control tokens as such; use it only for text that the program wrote.
        """
        if allow_special:
            return self._with_specials.encode(text, add_special_tokens=False).ids
        ids: list[int] = []
        pieces = [text]
        while pieces:
            piece = pieces.pop()
            encoded = self._plain.encode(piece, add_special_tokens=False)
            found = [
                span
                for index, span in zip(encoded.ids, encoded.offsets, strict=True)
                if index in self._special_ids
            ]
            if not found:
                ids += encoded.ids
            elif len(piece) > 1:
                # The file does not mark the token, or its vocabulary contains it as an ordinary entry, too,
                # and may fold other characters to it. Cutting after the first one prevents a match.
                cuts = sorted({min(start + 1, len(piece) - 1) for start, _ in found})
                bounds = itertools.pairwise((0, *cuts, len(piece)))
                pieces += reversed([piece[first:last] for first, last in bounds if first < last])
        return ids

    def encode_opening(self, text: str) -> list[int]:
        """Encodes text at the start of a sequence: SentencePiece prepends a space, even before a space.

        Files for transformers' fast tokenizers may omit that second space; SentencePiece itself, which VILA
        used in training, does not.
        """
        return self.encode_continued(f" {text}") if text and self._adds_space else self.encode(text)

    def encode_continued(self, text: str) -> list[int]:
        """Encodes text after other tokens: without the space that SentencePiece prepends."""
        if not text or not self._adds_space:
            return self.encode(text)
        # These vocabularies encode a line end as a separate byte, which merges with nothing.
        anchor, ids = self.encode("\n"), self.encode("\n" + text)
        if ids[: len(anchor)] != anchor:
            raise UserError("this tokenizer merges line ends with the text after them; use its fast version")
        return ids[len(anchor) :]

    @functools.cached_property
    def _adds_space(self) -> bool:
        return self._plain.encode("a", add_special_tokens=False).tokens[0].startswith("▁")

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Returns the text of `ids`, without control tokens if `skip_special`."""
        kept = [int(index) for index in ids]
        if skip_special:
            kept = [index for index in kept if index not in self._special_ids]
        return self._plain.decode(kept, skip_special_tokens=skip_special)

    def token_id(self, token: str) -> int:
        """Returns the id of a token; raises `UserError` if the vocabulary does not contain it."""
        index = self._plain.token_to_id(token)
        if index is None:
            raise UserError(f"the tokenizer has no token {token!r}; use the one this model was trained with")
        return index

    def token(self, index: int) -> str | None:
        """Returns the vocabulary entry with this id, or None."""
        return self._plain.id_to_token(index)

    def save(self, directory: PathLike) -> None:
        """Writes a Hugging Face folder for `load_tokenizer` and transformers."""
        folder = as_path(directory)
        names = {f"{role}_token": getattr(self, f"{role}_id") for role in _ROLES}
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **self._settings}
        settings.update({key: self.token(index) for key, index in names.items() if index is not None})
        write_text_atomic(folder / "tokenizer.json", self._json)
        write_text_atomic(folder / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")
        ids = {"bos_token_id": self.bos_id, "eos_token_id": list(self.stop_ids), "pad_token_id": self.pad_id}
        write_text_atomic(folder / "generation_config.json", json.dumps(ids, indent=2) + "\n")
        if self.chat_template is not None:
            write_text_atomic(folder / "chat_template.jinja", self.chat_template)


def _build(tokenizer_json: str, *, encode_special_tokens: bool) -> tokenizers.Tokenizer:
    built = tokenizers.Tokenizer.from_str(tokenizer_json)
    # Files saved after training may enable truncation or padding, which silently corrupt texts.
    built.no_truncation()
    built.no_padding()
    built.encode_special_tokens = encode_special_tokens
    return built


def load_tokenizer(directory: PathLike) -> Tokenizer:
    """Loads the tokenizer of a Hugging Face model folder, local or `gs://`.

    Reads `tokenizer.json`; special tokens come from `tokenizer_config.json`, `special_tokens_map.json`,
    `generation_config.json` or `config.json`, in this order.

    Raises:
      UserError: the folder or a file is missing or damaged, or no file names the end-of-sequence token.
    """
    folder = as_path(directory)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such tokenizer folder; check the path")
    source = folder / "tokenizer.json"
    if not source.exists():
        hint = "it has only tokenizer.model: " if (folder / "tokenizer.model").exists() else ""
        raise UserError(
            f"{folder}: no tokenizer.json in this folder; {hint}save the model's fast tokenizer there "
            "(transformers: AutoTokenizer.from_pretrained(...).save_pretrained(folder))"
        )
    text = _read_text(source)
    try:
        built = tokenizers.Tokenizer.from_str(text)
        declared = json.loads(text).get("added_tokens") or []
    except Exception as error:  # the library raises plain Exception for every parse error
        raise UserError(f"{source}: not a readable tokenizer ({error}); download it again") from error
    for entry in declared:
        # The library renumbers added tokens that leave a gap after the vocabulary, which shifts every id.
        if built.token_to_id(entry["content"]) != entry["id"]:
            raise UserError(
                f"{source}: added token {entry['content']!r} claims id {entry['id']} but would get "
                f"{built.token_to_id(entry['content'])}; the vocabulary has a gap, download the file again"
            )

    settings = _read_json(folder / "tokenizer_config.json")
    by_name = [settings, _read_json(folder / "special_tokens_map.json")]
    by_id = [_read_json(folder / "generation_config.json"), _read_json(folder / "config.json")]
    found = {role: _special_id(role, built, folder, by_name, by_id) for role in _ROLES}
    if found["eos"] is None:
        raise UserError(
            f"{folder}: no end-of-sequence token; add eos_token to tokenizer_config.json "
            "or eos_token_id to config.json"
        )
    stops = [index for values in by_id for index in _ids(values.get("eos_token_id"))]
    template_file = folder / "chat_template.jinja"
    template = _read_text(template_file) if template_file.exists() else settings.get("chat_template")
    return Tokenizer(
        text,
        eos_id=found["eos"],
        bos_id=found["bos"],
        pad_id=found["pad"],
        stop_ids=stops,
        chat_template=template if isinstance(template, str) else None,
        settings=settings,
    )


def _read_text(path: PathLike) -> str:
    try:
        return read_bytes(path, _MAX_FILE_BYTES).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text; download it again") from error


def _read_json(path: Any) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: a JSON object was expected; download it again")
    return value


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [index for index in values if isinstance(index, int) and index >= 0]


def _special_id(
    role: str,
    built: tokenizers.Tokenizer,
    folder: Any,
    by_name: Sequence[Mapping[str, Any]],
    by_id: Sequence[Mapping[str, Any]],
) -> int | None:
    for values in by_name:
        name = values.get(f"{role}_token")
        if isinstance(name, dict):  # transformers also writes tokens with matching rules
            name = name.get("content")
        if isinstance(name, str):
            index = built.token_to_id(name)
            if index is None:
                raise UserError(
                    f"{folder}: {role}_token {name!r} is not in tokenizer.json; use the files of one model"
                )
            return index
    for values in by_id:
        if ids := _ids(values.get(f"{role}_token_id")):
            return ids[0]
    return None


def train_bpe(
    texts: Iterable[str], vocab_size: int, out_dir: PathLike, special_tokens: Sequence[str] = CHATML_SPECIALS
) -> Tokenizer:
    """Trains a byte-level BPE for small models trained from scratch, and saves it as a Hugging Face folder.

    Numbers are split into digits, as in SmolLM2 and Llama 2, so measurements share tokens.

    Args:
      texts: training texts.
      vocab_size: total vocabulary size, at least 256 bytes plus the special tokens. A small corpus may yield
        less.
      out_dir: folder to write.
      special_tokens: (padding, beginning, end, further control tokens...), which get the first ids.

    Returns:
      The tokenizer, as loaded by `load_tokenizer(out_dir)`.

    Raises:
      UserError: `vocab_size` is too small, or fewer than three distinct special tokens.
    """
    if len(special_tokens) < 3 or len(set(special_tokens)) != len(special_tokens):
        raise UserError(f"special_tokens {list(special_tokens)}: needs three or more different tokens")
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + len(special_tokens)
    if vocab_size < smallest:
        raise UserError(f"vocab_size {vocab_size}: must be at least {smallest} for bytes and special tokens")
    built = tokenizers.Tokenizer(models.BPE())
    built.pre_tokenizer = digit_byte_level()
    built.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    built.train_from_iterator(texts, trainer)
    # The trainer assigns the first ids to the special tokens, in order.
    result = Tokenizer(built.to_str(), pad_id=0, bos_id=1, eos_id=2)
    result.save(out_dir)
    return load_tokenizer(out_dir)


def digit_byte_level() -> pre_tokenizers.PreTokenizer:
    """Returns SmolLM2's pre-tokenizer: single digits, then GPT-2's byte-level split."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
