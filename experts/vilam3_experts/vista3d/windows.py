"""Sliding windows for many prompts: MONAI's result, without the logits of a whole volume.

MONAI's `sliding_window_inference` keeps the weighted sum of the logits of every prompt for every voxel: 117
prompts of a 270 x 270 x 200 volume are 7 GB. Only their maximum is wanted, and a voxel's maximum is known
once the last window that covers it has run. So the volume is cut into cells, the boxes between the borders of
all windows; the sums of a cell are kept, in memory or in a scratch file, from its first window to its last,
and then become one label.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from monai.data.utils import compute_importance_map, dense_patch_slices

from vilam3_experts.base import ExpertFailure

Cell = tuple[int, int, int]
_WORK_PROMPTS = 8  # prompts that are summed and compared at once


@dataclasses.dataclass(frozen=True)
class WindowSettings:
    """How windows are laid.

    Attributes:
      roi: voxels of a window along the three axes.
      overlap: share of a window that the next one along an axis repeats.
      padding: how a volume smaller than a window is filled up, `constant` (zeros) or `replicate`.
    """

    roi: tuple[int, int, int]
    overlap: float
    padding: str


class PromptNetwork(Protocol):
    """A network in two halves, so that prompts can be asked in portions.

    Attributes:
      portion: prompts that one call of `decode` should be asked for; None for all.
    """

    portion: int | None

    def encode(self, window: torch.Tensor) -> torch.Tensor:
        """The part of the work that does not depend on the prompts, for [1, 1, x, y, z]."""
        ...

    def decode(self, features: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        """Logits [P, x, y, z] for `prompts`, int64 [P]."""
        ...


class SplitNetwork:
    """MONAI's `VISTA3D`: everything up to the class head's feature map, and its product with embeddings."""

    portion: int | None = _WORK_PROMPTS

    def __init__(self, network: Any) -> None:
        """Takes a `monai.networks.nets.VISTA3D`, or a module with the same `image_encoder`, `class_head`."""
        self._network = network

    def encode(self, window: torch.Tensor) -> torch.Tensor:
        _, features = self._network.image_encoder(window, with_point=False, with_label=True)
        return self._network.class_head.image_post_mapping(features)

    def decode(self, features: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        head = self._network.class_head
        embedding = head.class_embeddings(prompts[:, None])
        if head.use_mlp:
            embedding = head.mlp(embedding)
        _, channels, *size = features.shape
        return (embedding[:, 0] @ features.view(channels, -1)).view(len(prompts), *size)


class Plan:
    """Which windows there are, in MONAI's order, and which cells each of them covers."""

    def __init__(self, size: Sequence[int], settings: WindowSettings) -> None:
        """Lays the windows over a volume of `size` voxels."""
        self.roi = settings.roi
        padded = tuple(max(n, r) for n, r in zip(size, settings.roi, strict=True))
        self.size = padded
        missing = [p - n for p, n in zip(padded, size, strict=True)]
        self.pad = [side for m in reversed(missing) for side in (m // 2, m - m // 2)]
        self.inside = tuple(slice(m // 2, m // 2 + n) for m, n in zip(missing, size, strict=True))
        steps = [
            r if r == n else max(1, int(r * (1 - settings.overlap)))
            for r, n in zip(settings.roi, padded, strict=True)
        ]
        self.windows: list[tuple[slice, ...]] = dense_patch_slices(padded, settings.roi, steps)
        self._starts = [sorted({w[axis].start for w in self.windows}) for axis in range(3)]
        self._edges = [
            sorted({e for s in starts for e in (s, s + r)})
            for starts, r in zip(self._starts, settings.roi, strict=True)
        ]

    def cells(self, window: tuple[slice, ...]) -> Iterator[Cell]:
        """Cells inside a window, by their positions among the edges of the three axes."""
        ranges = [
            range(edges.index(w.start), edges.index(w.stop))
            for edges, w in zip(self._edges, window, strict=True)
        ]
        return itertools.product(*ranges)  # pyright: ignore[reportReturnType]

    def box(self, cell: Cell) -> tuple[slice, ...]:
        """The voxels of a cell."""
        return tuple(slice(e[i], e[i + 1]) for e, i in zip(self._edges, cell, strict=True))

    def covering(self, cell: Cell) -> list[tuple[slice, ...]]:
        """The windows over a cell, in the order in which they run."""
        starts = [
            [s for s in axis if s <= box.start and box.stop <= s + r]
            for axis, box, r in zip(self._starts, self.box(cell), self.roi, strict=True)
        ]
        return [
            tuple(slice(s, s + r) for s, r in zip(corner, self.roi, strict=True))
            for corner in itertools.product(*starts)
        ]

    def open_voxels(self) -> int:
        """The most voxels whose sums have to be kept at any time."""
        kept = most = 0
        for window in self.windows:
            for cell in self.cells(window):
                covering = self.covering(cell)
                voxels = math.prod(s.stop - s.start for s in self.box(cell))
                if len(covering) > 1 and window == covering[0]:
                    kept += voxels
                most = max(most, kept)
                if len(covering) > 1 and window == covering[-1]:
                    kept -= voxels
        return most


class MemorySums:
    """Sums of open cells on a device."""

    def __init__(self, prompts: int, device: torch.device) -> None:
        self._prompts, self._device = prompts, device
        self._cells: dict[Cell, torch.Tensor] = {}

    def save(self, cell: Cell, first: int, values: torch.Tensor) -> None:
        if cell not in self._cells:
            size = (self._prompts, *values.shape[1:])
            self._cells[cell] = torch.empty(size, dtype=torch.float32, device=self._device)
        self._cells[cell][first : first + len(values)] = values

    def load(self, cell: Cell, first: int, like: torch.Tensor) -> torch.Tensor:
        return self._cells[cell][first : first + len(like)].to(like.device)

    def drop(self, cell: Cell) -> None:
        del self._cells[cell]


class FileSums:
    """Sums of open cells in a scratch file, which has no name and goes with the process."""

    def __init__(self, prompts: int, file: Any) -> None:
        self._prompts, self._file, self._end = prompts, file, 0
        self._offsets: dict[Cell, tuple[int, int]] = {}
        self._free: dict[int, list[int]] = {}

    def save(self, cell: Cell, first: int, values: torch.Tensor) -> None:
        voxels = math.prod(values.shape[1:])
        if cell not in self._offsets:
            reusable = self._free.get(voxels)
            offset = reusable.pop() if reusable else self._end
            if offset == self._end:
                self._end += 4 * voxels * self._prompts
            self._offsets[cell] = (offset, voxels)
        offset, _ = self._offsets[cell]
        self._file.seek(offset + 4 * voxels * first)
        data = values.contiguous().cpu().numpy().data.cast("B")
        if self._file.write(data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def load(self, cell: Cell, first: int, like: torch.Tensor) -> torch.Tensor:
        offset, voxels = self._offsets[cell]
        values = np.empty(tuple(like.shape), np.float32)
        self._file.seek(offset + 4 * voxels * first)
        if self._file.readinto(values.data.cast("B")) != values.nbytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return torch.from_numpy(values).to(like.device)

    def drop(self, cell: Cell) -> None:
        offset, voxels = self._offsets.pop(cell)
        self._free.setdefault(voxels, []).append(offset)


Sums = MemorySums | FileSums


@contextlib.contextmanager
def open_sums(plan: Plan, prompts: int, device: torch.device, memory_bytes: int) -> Iterator[Sums]:
    """Keeps sums on `device` if they fit into `memory_bytes`, else in a scratch file in TMPDIR."""
    if 4 * prompts * plan.open_voxels() <= memory_bytes:
        yield MemorySums(prompts, device)
        return
    with tempfile.TemporaryFile(buffering=0) as file:
        yield FileSums(prompts, file)


def argmax_labels(
    image: torch.Tensor,
    network: PromptNetwork,
    prompts: Sequence[int],
    settings: WindowSettings,
    *,
    device: torch.device,
    sums_device: torch.device,
    memory_bytes: int,
    portion: int | None,
    amp: bool,
) -> torch.Tensor:
    """The prompt with the largest logit at every voxel, where that logit is above 0.

    The same as `sliding_window_inference(mode="gaussian")`, logits < 0 -> background and argmax over prompts.

    Args:
      image: float32 [1, 1, X, Y, Z] on the CPU.
      network: asked once per window to encode, and per portion of prompts to decode.
      prompts: class ids.
      settings: of the windows.
      device: where the network is.
      sums_device: where the sums of unfinished voxels are kept, up to `memory_bytes`.
      portion: prompts per call of `decode`, None for all.
      amp: run the network in float16 where that is enough.

    Returns:
      uint8 [X, Y, Z] on the CPU: position in `prompts` plus 1; 0 is background.

    Raises:
      ExpertFailure: a logit is not a number.
      torch.OutOfMemoryError: `device` is too small for a window.
    """
    if len(prompts) > 255:
        raise ValueError(f"{len(prompts)} prompts; at most 255 fit into a byte")
    plan = Plan(image.shape[2:], settings)
    if any(plan.pad):
        image = F.pad(image, plan.pad, mode=settings.padding)
    weight = compute_importance_map(plan.roi, mode="gaussian", device=device)
    ids = torch.tensor(prompts, dtype=torch.int64, device=device)
    labels = torch.zeros(plan.size, dtype=torch.uint8)
    half = torch.autocast(device.type, enabled=amp and device.type == "cuda")
    with torch.inference_mode(), half, open_sums(plan, len(ids), sums_device, memory_bytes) as sums:
        for window in plan.windows:
            features = network.encode(image[(..., *window)].to(device))
            best = _Best(plan, window, weight, sums)
            for first in range(0, len(ids), portion or len(ids)):
                logits = network.decode(features, ids[first : first + (portion or len(ids))])
                logits *= weight  # in the network's precision, as MONAI does
                for start in range(0, len(logits), _WORK_PROMPTS):
                    best.add(first + start, logits[start : start + _WORK_PROMPTS].float())
                del logits
            best.finish(labels)
    return labels[plan.inside]


class _Best:
    """The cells of one window: sums are continued or skipped; those complete keep their largest."""

    def __init__(self, plan: Plan, window: tuple[slice, ...], weight: torch.Tensor, sums: Sums) -> None:
        self._sums = sums
        self._cells: list[_CellState] = []
        for cell in plan.cells(window):
            covering = plan.covering(cell)
            box = plan.box(cell)
            state = _CellState(cell, box, _within(box, window), window == covering[0])
            if window == covering[-1]:
                count = torch.zeros([s.stop - s.start for s in box], device=weight.device)
                for other in covering:
                    count += weight[_within(box, other)]
                state.count = count
                state.value = torch.zeros_like(count)
                state.label = torch.zeros_like(count, dtype=torch.uint8)
            self._cells.append(state)

    def add(self, first: int, logits: torch.Tensor) -> None:
        """Takes weighted logits, float32 [P, x, y, z], of the prompts from `first` on; overwrites them."""
        for state in self._cells:
            part = logits[(slice(None), *state.local)]
            if not state.is_first:
                part += self._sums.load(state.cell, first, part)
            if state.count is None:
                self._sums.save(state.cell, first, part)
                continue
            part /= state.count
            largest, position = part.max(0)
            if bool(largest.isnan().any()):
                raise ExpertFailure("the network returned NaN; check its weights, or run without a GPU")
            better = largest > state.value  # strictly: of equals MONAI takes the first
            torch.maximum(state.value, largest, out=state.value)
            state.label = torch.where(better, (position + (first + 1)).to(torch.uint8), state.label)

    def finish(self, labels: torch.Tensor) -> None:
        """Writes the cells that are complete into uint8 [X, Y, Z]."""
        for state in self._cells:
            if state.count is not None:
                labels[state.box] = state.label.cpu()
                if not state.is_first:
                    self._sums.drop(state.cell)


@dataclasses.dataclass
class _CellState:
    cell: Cell
    box: tuple[slice, ...]
    local: tuple[slice, ...]
    is_first: bool
    count: torch.Tensor | None = None
    value: torch.Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))
    label: torch.Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))


def _within(box: tuple[slice, ...], window: tuple[slice, ...]) -> tuple[slice, ...]:
    return tuple(slice(b.start - w.start, b.stop - w.start) for b, w in zip(box, window, strict=True))


def retry_smaller(
    run: Callable[[int | None, torch.device, int], torch.Tensor],
    network: PromptNetwork,
    device: torch.device,
    host_bytes: int,
) -> torch.Tensor:
    """Calls `run(portion, sums_device, memory_bytes)` with less and less memory until it fits.

    First the sums leave the device, then fewer prompts are asked at once.

    Raises:
      ExpertFailure: one prompt at a time is too much, or there is no room for the scratch file.
    """
    host = torch.device("cpu")
    tries: list[tuple[int | None, torch.device, int]] = []
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        tries.append((network.portion, device, free // 2))
    tries += [(network.portion, host, host_bytes), (_WORK_PROMPTS, host, host_bytes), (1, host, host_bytes)]
    for portion, where, memory in dict.fromkeys(tries):
        try:
            return run(portion, where, memory)
        except torch.OutOfMemoryError:
            pass  # its traceback holds the tensors: the cache is emptied when that is gone
        except OSError as error:
            raise ExpertFailure(f"scratch file: {error.strerror}; make room in TMPDIR") from error
        torch.cuda.empty_cache()
    raise ExpertFailure("out of GPU memory even for one prompt at a time; use a GPU with more memory")
