"""Small inputs for the expert tests."""

import nibabel as nib
import numpy as np
from PIL import Image


def write_png(path, level, size=(9, 7)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), level, np.uint8)).save(path)


def head_volume(path, shape=(40, 48, 36)):
    """Writes a bright ball with a hole, and a separate small blob; returns the filled mask of the ball."""
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), -1)
    distance = np.linalg.norm(grid - np.array(shape) / 2, axis=-1)
    values = np.random.default_rng(0).uniform(0, 40, shape)
    values[distance < 12] = 1000
    values[distance < 3] = 0
    values[:3, :3, :3] = 1000
    nib.save(nib.Nifti1Image(values.astype(np.int16), np.diag([2.0, 2.0, 2.0, 1.0])), path)
    return distance < 12
