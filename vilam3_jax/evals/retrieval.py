"""Zero-shot modality retrieval: is an image embedding nearest to the text embedding of its modality?

Measures the two towers of stage 1. Every held-out image is compared with one text embedding per modality, the
mean over several prompts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from vilam3_jax.data.examples import Example
from vilam3_jax.data.templates import TokenizerLike, encode_caption
from vilam3_jax.errors import UserError
from vilam3_jax.evals import protocol as protocols
from vilam3_jax.evals import statistics
from vilam3_jax.models import build


@dataclasses.dataclass(frozen=True)
class RetrievalProtocol(protocols.AnyProtocol):
    """Images and classes to compare with a contrastive model.

    Attributes:
      items: `images_of_pairs`, every distinct image of the split's image-text pairs, once.
      split: `meta["split"]` of the Examples used.
      classes: `modality`, the values of `meta["modality"]` among the items.
      prompts: templates with `{modality}`, the same for each class; their normalised embeddings are averaged.
      metric: `accuracy` of the nearest class by cosine similarity.
    """

    items: str
    split: str
    classes: str
    prompts: tuple[str, ...]
    metric: str


RETRIEVAL = protocols.register(
    RetrievalProtocol(
        id="retrieval",
        version=2,
        items="images_of_pairs",
        split="heldout",
        classes="modality",
        # Every modality has all planes, so that a plane does not reveal the class.
        prompts=(
            "{modality} image.",
            *(f"{plane} {{modality}} image." for plane in ("Axial", "Coronal", "Sagittal")),
        ),
        metric="accuracy",
    )
)


@dataclasses.dataclass(frozen=True)
class RetrievalItem:
    """An image, with the example to read it from."""

    example: Example
    modality: str
    cluster: str


def retrieval_items(
    examples: Iterable[Example], protocol: RetrievalProtocol = RETRIEVAL
) -> list[RetrievalItem]:
    """The distinct images of the protocol, in the order of the examples.

    Raises:
      UserError: fewer than two modalities, or an example lacks a meta key.
    """
    items: dict[tuple[Any, ...], RetrievalItem] = {}
    for example in examples:
        meta = example.meta
        if meta.get("split") != protocol.split or example.format not in ("pair", "caption"):
            continue
        try:
            cluster = str(meta.get("group") or meta["patient"])
            key = (meta["input_key"], example.images[0].axis, example.images[0].index)
            items.setdefault(key, RetrievalItem(example, str(meta["modality"]), cluster))
        except (KeyError, IndexError) as error:
            raise UserError(
                f"example {example.id!r}: {error!r} in its meta; prepare the dataset again"
            ) from error
    kinds = {item.modality for item in items.values()}
    if len(kinds) < 2:
        raise UserError(
            f"protocol {protocol.name}: {len(items)} image-text pairs of {len(kinds)} modalities in split "
            f"{protocol.split!r}; at least two modalities are needed"
        )
    return list(items.values())


def prompt_tokens(tokenizer: TokenizerLike, texts: Sequence[str], length: int) -> tuple[np.ndarray, ...]:
    """Tokens int32 [N, length] and their validity bool [N, length], encoded as in training."""
    tokens = np.full((len(texts), length), tokenizer.pad_id, np.int32)
    valid = np.zeros((len(texts), length), bool)
    for row, text in enumerate(texts):
        ids = encode_caption(tokenizer, text, length).tokens
        tokens[row, : len(ids)], valid[row, : len(ids)] = ids, True
    return tokens, valid


class TwoTowerEmbedder:
    """Embeds images and texts with a contrastive model, in batches of fixed shape."""

    def __init__(self, model_config: Any, params: Any, tokenizer: TokenizerLike, batch_size: int = 32):
        """Compiles nothing before first use."""
        graphdef, _ = build.abstract_model(model_config, "contrastive")
        self._params, self._tokenizer, self._batch = params, tokenizer, batch_size
        self._length = int(model_config.text_tower.max_length)
        self._images = jax.jit(lambda p, x: build.merge(graphdef, p).vision_tower.pooled(x))
        self._texts = jax.jit(lambda p, t, v: build.merge(graphdef, p).text_tower(t, v))

    def images(self, pixels: Sequence[np.ndarray]) -> np.ndarray:
        """Uint8 [S, S, 3] each -> float32 [N, E], unit length."""
        out = []
        for start in range(0, len(pixels), self._batch):
            batch = np.stack(pixels[start : start + self._batch])
            padded = np.pad(batch, ((0, self._batch - len(batch)), (0, 0), (0, 0), (0, 0)))
            out.append(np.asarray(self._images(self._params, padded), np.float32)[: len(batch)])
        return _unit(np.concatenate(out))

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> float32 [N, E], unit length."""
        tokens, valid = prompt_tokens(self._tokenizer, texts, self._length)
        return _unit(np.asarray(self._texts(self._params, tokens, valid), np.float32))


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def class_embeddings(
    texts: Callable[[Sequence[str]], np.ndarray], classes: Sequence[str], prompts: Sequence[str]
) -> np.ndarray:
    """Float32 [C, E], unit length: for each class the mean embedding of its prompts."""
    every = texts([prompt.format(modality=name) for name in classes for prompt in prompts])
    return _unit(every.reshape(len(classes), len(prompts), -1).mean(axis=1))


def evaluate_retrieval(
    items: Sequence[RetrievalItem],
    images: np.ndarray,
    classes: Sequence[str],
    class_embedding: np.ndarray,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """Scores nearest-class retrieval.

    Args:
      items: [N].
      images: float32 [N, E], unit length.
      classes: [C] names, which include the modality of every item.
      class_embedding: float32 [C, E], unit length.
      seed: seed of the bootstrap.

    Returns:
      `accuracy`; `balanced_accuracy` (mean over classes); `chance` (1 / C); `majority` (share of the most
      frequent class); `n`; `clusters`; `interval` (over clusters, None if too few); `per_cluster`; `note`;
      `per_class` (class -> n, clusters, accuracy); `confusion` (true class -> predicted class -> count).
    """
    predicted = [classes[i] for i in np.argmax(images @ class_embedding.T, axis=1)]
    rows = [
        {"cluster": item.cluster, "correct": guess == item.modality, "unparsed": False}
        for item, guess in zip(items, predicted, strict=True)
    ]
    whole = statistics.summarise_group(
        rows, arm="stage1", question_type="modality", label_source="image header", oracle=False, seed=seed
    )
    members = {name: [i for i, item in enumerate(items) if item.modality == name] for name in classes}
    per_class = {
        name: {
            "n": len(own),
            "clusters": len({items[i].cluster for i in own}),
            "accuracy": float(np.mean([rows[i]["correct"] for i in own])),
        }
        for name, own in members.items()
    }
    confusion = {
        name: {other: sum(predicted[i] == other for i in own) for other in classes}
        for name, own in members.items()
    }
    return {
        "accuracy": whole.accuracy,
        "balanced_accuracy": float(np.mean([one["accuracy"] for one in per_class.values()])),
        "chance": 1 / len(classes),
        "majority": max(one["n"] for one in per_class.values()) / len(items),
        **{key: getattr(whole, key) for key in ("n", "clusters", "interval", "per_cluster", "note")},
        "per_class": per_class,
        "confusion": confusion,
    }
