"""An expert with many failure modes, selected by the colour of the image."""

import os
import signal
import time
import zlib

import numpy as np
from vilam3_experts.base import ExpertFailure, Output
from vilam3_experts.descriptors import Descriptor

from vilam3_jax.data.experts.cards import Card

KILLS, HANGS, OOM, ALWAYS_OOM, CUDA, DECLINES, RAISES = 10, 11, 12, 13, 14, 15, 16
NAMES = {
    KILLS: "kills", HANGS: "hangs", OOM: "oom", ALWAYS_OOM: "always_oom", CUDA: "cuda", DECLINES: "declines",
    RAISES: "raises",
}  # fmt: skip


def descriptor(factory="Faulty", version="1"):
    return Descriptor(
        card=Card("FAULTY", (), "any", "classification", "fails", "none"),
        version=version, input="image", kind="classification", factory=f"faulty:{factory}",
    )  # fmt: skip


FAULTY = descriptor()


class OutOfMemoryError(RuntimeError):
    """Has the name of torch's class."""


def log(text):
    """Appends a line in one write, because several processes share the file."""
    if path := os.environ.get("FAULTY_LOG"):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(file, f"{os.getpid()} {text}\n".encode())
        os.close(file)


class Faulty:
    def __init__(self, weights, size=8):
        self.size = size
        if size == 8:
            log("built")

    def smaller(self):
        return Faulty(None, self.size // 2) if self.size > 1 else None

    def run(self, data, args):
        fault = int(data[0, 0, 0])
        log(f"run {fault} {self.size} {zlib.crc32(data.tobytes())}")
        if fault == KILLS:
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == HANGS:
            time.sleep(1000)
        if fault == ALWAYS_OOM or (fault == OOM and self.size > 2):
            raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        if fault == CUDA:
            raise RuntimeError("CUDA error: device-side assert triggered")
        if fault == DECLINES:
            raise ExpertFailure("no film of this kind")
        if fault == RAISES:
            raise RuntimeError(f"bad value {float(data.mean()):.3f} in /tmp/{float(data.std()):.3f}")
        time.sleep(float(os.environ.get("FAULTY_SECONDS", "0")))
        return Output(probabilities={"bright": float(np.mean(data)) / 255})


class Batched(Faulty):
    def run_batch(self, items, args):
        log(f"batch {len(items)}")
        answers = []
        for item in items:
            if int(item[0, 0, 0]) == OOM:
                raise OutOfMemoryError("CUDA out of memory")
            try:
                answers.append(self.run(item, args))
            except ExpertFailure as error:
                answers.append(error)
        return answers


class Unbuildable:
    def __init__(self, weights):
        os.kill(os.getpid(), signal.SIGKILL)


def refuses(weights):
    raise ValueError("these are no weights of mine")
