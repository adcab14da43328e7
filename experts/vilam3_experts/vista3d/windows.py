"""Sliding windows for many prompts: MONAI's result, without the logits of a whole volume.

MONAI's `sliding_window_inference` keeps the weighted sum of the logits of every prompt for every voxel: 7 GB
for 117 prompts of a 270 x 270 x 200 volume. Only the maximum over the prompts is needed, and it is final for
a voxel once the last window over it has run. The volume is therefore divided into cells, the boxes between
the borders of all windows. The sums of a cell are kept, in memory or in a scratch file, from its first window
to its last, and then become one label per voxel.
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

Box = tuple[slice, ...]
Cell = tuple[int, int, int]
"""Positions of a cell among the window borders of the three axes."""

_WORK_PROMPTS = 8  # prompts that are summed and compared at once


@dataclasses.dataclass(frozen=True)
class WindowSettings:
    """Size and overlap of windows, and padding of small volumes: `constant` (zeros) or `replicate`."""

    roi: tuple[int, int, int]
    overlap: float
    padding: str


class PromptNetwork(Protocol):
    """A network in two halves, so that prompts can be decoded in chunks.

    Attributes:
      prompt_chunk: prompts per call of `decode`; None for all.
    """

    prompt_chunk: int | None

    def encode(self, window: torch.Tensor) -> torch.Tensor:
        """The features of [1, 1, x, y, z], which do not depend on the prompts."""
        ...

    def decode(self, features: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        """Logits [P, x, y, z] for `prompts`, int64 [P]."""
        ...


class SplitNetwork:
    """MONAI's `VISTA3D`, split before the product of the feature map with the class embeddings."""

    prompt_chunk: int | None = _WORK_PROMPTS

    def __init__(self, network: Any) -> None:
        """Wraps a `monai.networks.nets.VISTA3D`, or a module with its `image_encoder` and `class_head`."""
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


class WindowLayout:
    """The windows over a volume of `size` voxels, in MONAI's order, and the cells of each window."""

    def __init__(self, size: Sequence[int], settings: WindowSettings) -> None:
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
        self.windows: list[Box] = dense_patch_slices(padded, settings.roi, steps)
        self._starts = [sorted({w[axis].start for w in self.windows}) for axis in range(3)]
        self._edges = [
            sorted({e for s in starts for e in (s, s + r)})
            for starts, r in zip(self._starts, settings.roi, strict=True)
        ]

    def cells(self, window: Box) -> Iterator[Cell]:
        """Yields the cells of a window."""
        ranges = [
            range(edges.index(w.start), edges.index(w.stop))
            for edges, w in zip(self._edges, window, strict=True)
        ]
        return itertools.product(*ranges)  # pyright: ignore[reportReturnType]

    def box(self, cell: Cell) -> Box:
        """The voxels of a cell."""
        return tuple(slice(e[i], e[i + 1]) for e, i in zip(self._edges, cell, strict=True))

    def covering(self, cell: Cell) -> list[Box]:
        """The windows over a cell, in the order in which they run."""
        starts = [
            [s for s in axis if s <= box.start and box.stop <= s + r]
            for axis, box, r in zip(self._starts, self.box(cell), self.roi, strict=True)
        ]
        return [
            tuple(slice(s, s + r) for s, r in zip(corner, self.roi, strict=True))
            for corner in itertools.product(*starts)
        ]

    def max_open_voxels(self) -> int:
        """Maximum number of voxels whose sums must be kept at the same time."""
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
    """Sums of open cells in an anonymous scratch file."""

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
        self._seek(cell, first)
        data = values.contiguous().cpu().numpy().data.cast("B")
        if self._file.write(data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def load(self, cell: Cell, first: int, like: torch.Tensor) -> torch.Tensor:
        values = np.empty(tuple(like.shape), np.float32)
        self._seek(cell, first)
        if self._file.readinto(values.data.cast("B")) != values.nbytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return torch.from_numpy(values).to(like.device)

    def drop(self, cell: Cell) -> None:
        offset, voxels = self._offsets.pop(cell)
        self._free.setdefault(voxels, []).append(offset)

    def _seek(self, cell: Cell, first: int) -> None:
        offset, voxels = self._offsets[cell]
        self._file.seek(offset + 4 * voxels * first)


Sums = MemorySums | FileSums


@contextlib.contextmanager
def open_sums(layout: WindowLayout, prompts: int, device: torch.device, memory_bytes: int) -> Iterator[Sums]:
    """Keeps sums on `device` if they fit into `memory_bytes`, else in a scratch file in TMPDIR."""
    if 4 * prompts * layout.max_open_voxels() <= memory_bytes:
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
    prompt_chunk: int | None,
    amp: bool,
) -> torch.Tensor:
    """The prompt with the largest logit at every voxel, if that logit is above 0.

    Equals `sliding_window_inference(mode="gaussian")` followed by an argmax over the prompts, with voxels
    whose logits are all below 0 as background. Above `memory_bytes`, the sums of unfinished voxels go from
    `sums_device` to a scratch file. `amp` is for GPUs only.

    Args:
      image: float32 [1, 1, X, Y, Z] on the CPU.

    Returns:
      uint8 [X, Y, Z] on the CPU: position in `prompts` plus 1; 0 is background.

    Raises:
      ExpertFailure: a logit is NaN.
      torch.OutOfMemoryError: `device` is too small for a window.
    """
    if len(prompts) > 255:
        raise ValueError(f"{len(prompts)} prompts; at most 255 fit into a byte")
    layout = WindowLayout(image.shape[2:], settings)
    if any(layout.pad):
        image = F.pad(image, layout.pad, mode=settings.padding)
    weight = compute_importance_map(layout.roi, mode="gaussian", device=device)
    ids = torch.tensor(prompts, dtype=torch.int64, device=device)
    labels = torch.zeros(layout.size, dtype=torch.uint8)
    half = torch.autocast(device.type, enabled=amp and device.type == "cuda")
    with torch.inference_mode(), half, open_sums(layout, len(ids), sums_device, memory_bytes) as sums:
        for window in layout.windows:
            features = network.encode(image[(..., *window)].to(device))
            argmax = _WindowArgmax(layout, window, weight, sums)
            for first in range(0, len(ids), prompt_chunk or len(ids)):
                logits = network.decode(features, ids[first : first + (prompt_chunk or len(ids))])
                logits *= weight  # in the network's precision, as MONAI does
                for start in range(0, len(logits), _WORK_PROMPTS):
                    argmax.add(first + start, logits[start : start + _WORK_PROMPTS].float())
                del logits
            argmax.finish(labels)
    return labels[layout.inside]


class _WindowArgmax:
    """The cells of one window: accumulates their sums, and the argmax of those it is the last window of."""

    def __init__(self, layout: WindowLayout, window: Box, weight: torch.Tensor, sums: Sums) -> None:
        self._sums = sums
        self._cells: list[_CellState] = []
        for cell in layout.cells(window):
            covering = layout.covering(cell)
            box = layout.box(cell)
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
        """Adds weighted logits, float32 [P, x, y, z], of the prompts from `first` on; overwrites them."""
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
            better = largest > state.value  # strictly, because MONAI takes the first of equal logits
            torch.maximum(state.value, largest, out=state.value)
            state.label = torch.where(better, (position + (first + 1)).to(torch.uint8), state.label)

    def finish(self, labels: torch.Tensor) -> None:
        """Writes the finished cells to `labels`, uint8 [X, Y, Z]."""
        for state in self._cells:
            if state.count is not None:
                labels[state.box] = state.label.cpu()
                if not state.is_first:
                    self._sums.drop(state.cell)


@dataclasses.dataclass
class _CellState:
    cell: Cell
    box: Box
    local: Box  # within the window
    is_first: bool  # the window is the first one over the cell
    count: torch.Tensor | None = None  # sum of the weights; only in the last window over the cell
    value: torch.Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))
    label: torch.Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))


def _within(box: Box, window: Box) -> Box:
    return tuple(slice(b.start - w.start, b.stop - w.start) for b, w in zip(box, window, strict=True))


def retry_with_less_memory(
    run: Callable[..., torch.Tensor], network: PromptNetwork, device: torch.device, host_bytes: int
) -> torch.Tensor:
    """Calls `run(prompt_chunk, sums_device, memory_bytes)` with less and less memory until it fits.

    The sums are moved off the device first, then fewer prompts are decoded at once. Raises `ExpertFailure` if
    one prompt at a time does not fit.
    """
    host = torch.device("cpu")
    attempts: list[tuple[int | None, torch.device, int]] = []
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        attempts.append((network.prompt_chunk, device, free // 2))
    attempts += [(chunk, host, host_bytes) for chunk in (network.prompt_chunk, _WORK_PROMPTS, 1)]
    for chunk, sums_device, memory_bytes in dict.fromkeys(attempts):
        try:
            return run(prompt_chunk=chunk, sums_device=sums_device, memory_bytes=memory_bytes)
        except torch.OutOfMemoryError:
            pass  # the traceback references the tensors, so the cache is emptied after the handler
        except OSError as error:
            raise ExpertFailure(f"scratch file: {error.strerror}; make room in TMPDIR") from error
        torch.cuda.empty_cache()
    raise ExpertFailure("out of GPU memory even for one prompt at a time; use a GPU with more memory")
