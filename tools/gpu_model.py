"""What a GPU takes for the instructions of a loop: an estimate, by the throughput of its parts alone.

One trip of one warp through a kernel's main loop takes so many clocks of a part of the multiprocessor, which has four
quarters with a warp scheduler each:

    tensor   HMMA x its clocks (m16n8k16 of 16-bit types and m16n8k8 of TF32 take the same), at the rate that mma.sync
             reaches; a warp's quarter of an HGMMA of n columns as n / 8 HMMA, at the peak; without tensor cores FFMA x
             its clocks
    issue    all instructions: a scheduler issues one each clock, whatever becomes of it
    shared   bytes that LDSM, LDS, STS and LDGSTS move / 128, times four: the quarters share it; of HGMMA both operands,
             and what the TMA brings
    L2       bytes that LDGSTS, LDG and the TMA bring / the multiprocessor's share of L2's rate, times four

The longest of these bounds the loop. Its share of the peak is the clocks of HMMA (FFMA) at the peak by that bound. A
kernel that moves data is bounded by memory or by issue: its share is that of the bandwidth.

A layer takes the longer of what memory takes to move each tensor once, and of its arithmetic at the kernel's share of
the peak, by fill (tiles reach beyond the edges) and waves (the last one leaves multiprocessors idle); and what kernels
move that prepare its operands; and the parts of a split depth through L2.

Left out: latency, bank conflicts, that threads may share what they load, prologue and epilogue, the pipes of half rate
(integers), launches, power. So what is measured will be slower: this tells what is impossible and what has changed, not
what will come.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

REGISTERS = 64 * 1024  # of a multiprocessor
REGISTERS_AT_ONCE = 256  # for a warp
THREADS = 2048
BLOCKS = 32
RESERVED_SHARED = 1024  # of each block


@dataclass(frozen=True)
class Gpu:
    name: str
    arch: str  # whose machine code it runs
    number: int
    multiprocessors: int
    hertz: float
    hmma_clocks: float  # of a quarter, at the peak
    mma_sync: float  # the share of the peak that mma.sync reaches
    ffma_clocks: float
    bytes_per_second: float  # of memory, as copies reach it
    l2_bytes_per_clock: float
    shared_per_block: int
    shared_per_multiprocessor: int
    l2_bytes: int

    @property
    def facts(self) -> tuple[int, ...]:
        """csrc/cuda/runtime/device_info.h"""
        return (
            *(self.number, self.multiprocessors, THREADS),
            *(self.shared_per_block, self.shared_per_multiprocessor, self.l2_bytes),
        )

    @property
    def flop_per_second(self) -> float:
        """Of 16-bit types on the tensor cores, at the peak."""
        return 2 * 16 * 8 * 16 / self.hmma_clocks * 4 * self.multiprocessors * self.hertz


# A100-SXM4-40GB: 312 TFLOP/s; 1.555 TB/s, of which copies are taken to reach what they do on an H100.
# H100-SXM5: at 1.755 GHz 949 of the 989 TFLOP/s that it has at 1.83 GHz; mma.sync reaches about 62% of them, the rest
# is for wgmma; 3.35 TB/s, of which copies were measured to reach 3.0. That its L2 is as wide as the A100's is a guess.
GPUS = (
    Gpu("A100", "sm_80", 80, 108, 1.41e9, 8, 1.0, 2, 1.555e12 * 3.0 / 3.35, 5120, 163 << 10, 164 << 10, 40 << 20),
    Gpu("H100", "sm_90a", 90, 132, 1.755e9, 4, 0.62, 1, 3.0e12, 5120, 227 << 10, 228 << 10, 50 << 20),
)


@dataclass(frozen=True)
class Trip:
    """Of a warp through a main loop.

    Attributes:
        counts: instructions, by their class in machine_code.
        shared: clocks of shared memory.
        loaded: bytes that it brings from L2, or global memory.
        moved: for kernels that move data, the bytes that memory must move for it.
        asynchronous: whether the tensor cores read shared memory by themselves, as HGMMA has them do.
    """

    counts: Mapping[str, int]
    shared: int
    loaded: int
    moved: int = 0
    asynchronous: bool = False

    @property
    def instructions(self) -> int:
        return sum(self.counts.values())


@dataclass(frozen=True)
class Bound:
    by: str  # tensor, issue, shared, L2, memory
    share: float  # of the peak: of arithmetic, or of memory's bandwidth

    def __str__(self) -> str:
        return f"{self.share:.0%} {self.by}"


def bound(trip: Trip, gpu: Gpu) -> Bound:
    """Of a loop on the tensor cores or, without them, of fused multiply-adds; else of one that moves data."""
    tensor, fma = trip.counts.get("tensor", 0), trip.counts.get("fma", 0)
    clocks = {"issue": float(trip.instructions), "shared": 4.0 * trip.shared}
    if trip.moved:
        # Of a quarter's share of the bandwidth
        peak = clocks["memory"] = 4 * trip.moved * gpu.multiprocessors * gpu.hertz / gpu.bytes_per_second
    else:
        peak = tensor * gpu.hmma_clocks if tensor else fma * gpu.ffma_clocks
        clocks["tensor"] = peak / gpu.mma_sync if tensor and not trip.asynchronous else peak
        clocks["L2"] = 4 * trip.loaded * gpu.multiprocessors / gpu.l2_bytes_per_clock
    longest = max(clocks, key=lambda part: clocks[part])
    return Bound(longest, peak / clocks[longest])


def blocks_per_multiprocessor(gpu: Gpu, registers: int, threads: int, shared_bytes: int) -> int:
    warps = -(-threads // 32)
    of_warp = -(-registers * 32 // REGISTERS_AT_ONCE) * REGISTERS_AT_ONCE
    by_registers = REGISTERS // of_warp // 4 * 4 // warps  # a warp's are all in one quarter
    by_shared = gpu.shared_per_multiprocessor // (shared_bytes + RESERVED_SHARED)
    return min(by_registers, by_shared, THREADS // (warps * 32), BLOCKS)
