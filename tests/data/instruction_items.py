"""Writes examples as items of VILA's instruction JSON, the inverse of `examples.from_instruction`."""

from __future__ import annotations

import re
from typing import Any

from vilam3_jax.data.examples import Example, ExpertRequest

FROM_ROLE = {"user": "human", "assistant": "gpt", "system": "system", "expert": "human"}


def to_instruction(example: Example) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Returns a VILA instruction item, and the image files to write (relative path -> bytes).

    `from_instruction` restores the example, with paths in place of bytes.
    """
    files: dict[str, bytes] = {}
    paths = []
    for index, image in enumerate(example.images):
        path = image.path
        if path is None:
            assert image.data is not None
            stem = re.sub(r"[^A-Za-z0-9_-]", lambda match: f"%{ord(match[0]):x}.", example.id)
            suffixes = {b"\x89PNG": ".png", b"\xff\xd8": ".jpg"}
            suffix = next((suffixes[start] for start in suffixes if image.data.startswith(start)), ".img")
            path = f"images/{stem}_{index}{suffix}"
            files[path] = image.data
        paths.append(path)
    item: dict[str, Any] = {"id": example.id}
    if paths:
        item |= {"image": paths[0]} if len(paths) == 1 else {"images": paths}
    item["conversations"] = [{"from": FROM_ROLE[turn.role], "value": turn.text} for turn in example.turns]
    item["vilam3"] = {
        "format": example.format,
        "roles": [turn.role for turn in example.turns],
        "supervised": [turn.supervised for turn in example.turns],
        "slices": [
            None if i.axis is None and i.window is None else [i.axis, i.index, i.window, i.modality]
            for i in example.images
        ],
        "experts": [plain_request(request) for request in example.expert_requests],
        "meta": example.meta,
    }
    return item, files


def plain_request(request: ExpertRequest) -> list[Any]:
    images = [[image.image, image.role] for image in request.images]
    words = [request.question, request.call] if request.question or request.call else []
    return [request.expert, request.args, images, request.before_turn, request.policy, *words]
