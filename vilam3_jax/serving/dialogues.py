"""Finished dialogues that clients may continue, with the results of their experts; kept for a while."""

from __future__ import annotations

from vilam3_jax.data.experts.record import memory_bytes
from vilam3_jax.inference.agent import Transcript
from vilam3_jax.serving.kept import Kept

_MAX_BYTES = 1 << 29


def dialogue_store(*, seconds: float, max_bytes: int = _MAX_BYTES) -> Kept[Transcript]:
    """A store of dialogues by the ids of their last answers."""
    fix = "it was not asked with store: true, or it expired; send all messages again"
    return Kept("dialogue", fix, seconds=seconds, max_bytes=max_bytes, size=_size)


def _size(transcript: Transcript) -> int:
    """Bytes of its images and label maps; those that dialogues share count for each."""
    images = {id(image): image.nbytes for turn in transcript.turns for image in turn.images}
    images |= {id(image): image.nbytes for scan in transcript.scans for image in (scan.image, *scan.images)}
    maps = sum(memory_bytes(result.annotation) for _, result in transcript.results)
    return sum(images.values()) + sum(len(scan.png) for scan in transcript.scans) + maps + 4096
