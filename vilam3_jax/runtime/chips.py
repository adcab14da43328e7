"""Published specifications of accelerators, per chip.

TPUs: "System architecture" pages of Google's Cloud TPU documentation (peak bf16 compute, HBM, bidirectional
ICI and DCN bandwidth per chip; read in November 2026). DCN of v4, v5e and v6e: "How to Scale Your Model"
(Austin et al. 2025), chapter on TPUs. GPUs: NVIDIA's data sheets, dense bf16 without sparsity.

`clock` converts cycles of the TPU compiler to seconds. For v4, v5e and v5p it follows from peak operations
and the number of matrix units (v4 and v5p: 2 cores of 4 units of 128 x 128; v5e: one core of 4). We found no
consistent number of units for v6e and tpu7x. There we chose the clock for which a large bf16 matmul (16384 x
16384 on v6e, 8192 x 8192 on tpu7x) has the same ratio of estimated time to time at peak as on v5p.
"""

from __future__ import annotations

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A generation; all values per chip.

    Attributes:
      name: in names of topologies.
      kinds: JAX's names of its devices.
      flops: peak bf16 operations per second.
      hbm_bytes: memory; for TPUs, the part available to programs, from libtpu's errors.
      hbm_bandwidth: bytes per second.
      link_bandwidth: bytes per second of one ICI link in one direction; 0 without a torus.
      torus_axes: axes of the ICI torus; a chip has two links on each.
      dcn_bandwidth: bytes per second between slices.
      devices: JAX devices per chip.
      cores_in_name: whether product names (v5p-128) count cores, two per chip.
      clock: cycles per second of the compiler's estimates, see above; 0 for GPUs.
      scoped_vmem_kib: limit of vector memory per operation; half of a TPU core's memory where that is known
        to help, 0 for the compiler's default (16 MiB, v6e 32).
      generation_vmem_kib: the same for generation, whose products only read weights.
      sparse_cores: whether to offload gathers and scatters to them (the default on TPU7x).
    """

    name: str
    kinds: tuple[str, ...]
    flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float = 0.0
    torus_axes: int = 0
    dcn_bandwidth: float = 0.0
    devices: int = 1
    cores_in_name: bool = False
    clock: float = 0.0
    scoped_vmem_kib: int = 0
    generation_vmem_kib: int = 0
    sparse_cores: bool = False


# fmt: off
CHIPS = {
    chip.name: chip
    for chip in (
        # name, kinds, peak, memory, bandwidths of memory and of a link, torus axes, bandwidth between slices
        Chip("v4", ("TPU v4",), 275e12, int(30.75 * GIB), 1.2e12, 50e9, 3, 6.25e9,
             cores_in_name=True, clock=1.05e9),
        Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, int(15.75 * GIB), 0.8e12, 50e9, 2, 3.125e9,
             clock=1.5e9, scoped_vmem_kib=32768),
        Chip("v5p", ("TPU v5", "TPU v5p"), 459e12, int(95.74 * GIB), 2.765e12, 100e9, 3, 6.25e9,
             cores_in_name=True, clock=1.75e9, scoped_vmem_kib=32768, generation_vmem_kib=49152,
             sparse_cores=True),
        Chip("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, int(31.25 * GIB), 1.6e12, 100e9, 2, 12.5e9,
             clock=2.1e9, scoped_vmem_kib=65536, generation_vmem_kib=65536, sparse_cores=True),
        Chip("tpu7x", ("TPU7x", "TPU v7x"), 2307e12, int(2 * 94.75 * GIB), 7.38e12, 100e9, 3, 12.5e9,
             devices=2, cores_in_name=True, clock=2.45e9, scoped_vmem_kib=32768),
        Chip("h100", ("NVIDIA H100 80GB HBM3",), 989e12, 80 * GIB, 3.35e12),
        Chip("h200", ("NVIDIA H200",), 989e12, 141 * 10**9, 4.8e12),
        Chip("a100", ("NVIDIA A100-SXM4-80GB",), 312e12, 80 * GIB, 2.039e12),
    )
}
# fmt: on


def of_kind(device_kind: str) -> Chip | None:
    """The chip of a device kind of JAX; None if it is not in the table, such as a CPU."""
    return next((chip for chip in CHIPS.values() if device_kind in chip.kinds), None)
