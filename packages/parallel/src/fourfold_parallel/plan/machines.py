"""Machines of the literature, with where each number is from.

Nominal rates are the vendors'. The share of the peak that products and attention reach in training was
fitted to published steps, two constants for each kind of GPU; the best single product that anybody
measured is faster (A100 .87, H100 .80, B200 .78), since a whole step runs into limits of power and heat.
Rates of elementwise kernels are 0.8 of the nominal memory rate.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fourfold_parallel.common.files import StrPath
from fourfold_parallel.plan.machine import GIB, Channel, Machine, Rate, Ring

SHEET = "stas00/ml-engineering, compute/accelerator and network (vendor sheets, measured products)"
AUTHORS = "axonn-ai/Megatron-AxoNN, branch gordon-bell-perlmutter, examples/comm_model.py"
SIMUMAX = "MooreThreads/SimuMax, configs/system/b200_bf16_ceperm.json (measured collectives)"
EFA = "nanotron ultrascale-playbook, pp_comm_bandwidth.html (measured collectives, 256 MB)"
MEMORY_SHARE = 0.8
GPU_KERNEL_S = 6e-6


def _node(bytes_per_s: float, devices: int, *, latency_s: float = 2e-5) -> tuple[Ring, ...]:
    """Rings of an all-to-all connected node, where every group sees the same rate."""
    strides = [s for s in (1, 2, 4, 8, 16, 32) if s < devices]
    return tuple(
        Ring(stride=stride, size=size, bytes_per_s=bytes_per_s, latency_s=latency_s)
        for stride in strides
        for size in (2, 4, 8, 16, 32, 64)
        if stride * size <= devices
    )


def _table(rows: dict[tuple[int, int], float], *, latency_s: float) -> tuple[Ring, ...]:
    return tuple(
        Ring(stride=stride, size=size, bytes_per_s=rate * GIB, latency_s=latency_s)
        for (stride, size), rate in rows.items()
    )


def _pcie(bytes_per_s: float) -> Channel:
    """Pinned copies reach about 0.85 of a link's nominal rate."""
    rate = 0.85 * bytes_per_s
    return Channel(out_bytes_per_s=rate, in_bytes_per_s=rate, out_latency_s=1e-5, in_latency_s=1e-5)


A100 = (
    Rate(precision="bf16", flops_per_s=312e12, share=0.80, attention_share=0.40),
    Rate(precision="fp32", flops_per_s=156e12, share=0.70, attention_share=0.10),
)


def _shared(rates: tuple[Rate, ...], share: float) -> tuple[Rate, ...]:
    """The rates with another share of products in bfloat16."""
    return tuple(replace(r, share=share) if r.precision == "bf16" else r for r in rates)


H100 = (
    Rate(precision="bf16", flops_per_s=989e12, share=0.65, attention_share=0.30),
    Rate(precision="fp32", flops_per_s=494e12, share=0.60, attention_share=0.06),
)
B200 = (
    Rate(precision="bf16", flops_per_s=2250e12, share=0.48, attention_share=0.20),
    Rate(precision="fp32", flops_per_s=1125e12, share=0.45, attention_share=0.04),
)
WEAK = "fitted: share of bf16, to the weak scaling of Singh et al. 2024 (claim P1)"
FITTED = "fitted: share and attention_share of bf16 to published training steps (benchmarks/plan_cases.py)"
MI250X = (
    Rate(precision="bf16", flops_per_s=191.5e12, share=0.65, attention_share=0.25),
    Rate(precision="fp32", flops_per_s=47.9e12, share=0.70, attention_share=0.20),
)

PERLMUTTER = Machine(
    name="perlmutter",
    sources=(WEAK, AUTHORS, SHEET, "4 A100 and 4 Slingshot-11 ports of 25 GB/s a node"),
    rates=_shared(A100, 0.60),
    memory_bytes=40 * GIB,
    memory_bytes_per_s=MEMORY_SHARE * 1.555e12,
    devices_per_node=4,
    rings=_table({(1, 2): 76, (1, 4): 225, (2, 2): 76}, latency_s=2e-5),
    node_bytes_per_s=59.52e9,
    network_latency_s=9e-6 * 4,
    kernel_s=GPU_KERNEL_S,
    host=_pcie(32e9),
)
FRONTIER = Machine(
    name="frontier",
    sources=(WEAK, AUTHORS, "4 MI250X (8 dies) and 4 Slingshot-11 ports of 25 GB/s a node"),
    rates=_shared(MI250X, 0.38),
    memory_bytes=64 * GIB,
    memory_bytes_per_s=MEMORY_SHARE * 1.64e12,
    devices_per_node=8,
    rings=_table(
        {(1, 2): 129, (1, 4): 52, (1, 8): 135, (2, 2): 50, (2, 4): 72, (4, 2): 36}, latency_s=3e-5
    ),
    node_bytes_per_s=109.98e9,
    network_latency_s=3.5e-5,
    kernel_s=1e-5,
)
ALPS = Machine(
    name="alps",
    sources=(WEAK, SHEET, "4 GH200 and 4 Slingshot-11 ports of 25 GB/s a node"),
    rates=_shared(H100, 0.33),
    memory_bytes=96 * GIB,
    memory_bytes_per_s=MEMORY_SHARE * 4.0e12,
    devices_per_node=4,
    rings=_node(0.75 * 450e9, 4),
    node_bytes_per_s=100e9,
    network_latency_s=3.6e-5,
    kernel_s=GPU_KERNEL_S,
)
DGX_A100 = Machine(
    name="dgx-a100",
    sources=(FITTED, SHEET, "8 A100 and 8 InfiniBand ports of 200 Gb/s a node"),
    rates=A100,
    memory_bytes=80 * GIB,
    memory_bytes_per_s=MEMORY_SHARE * 2.0e12,
    devices_per_node=8,
    rings=_node(0.77 * 300e9, 8),
    node_bytes_per_s=0.85 * 8 * 25e9,
    network_latency_s=1.5e-5,
    kernel_s=GPU_KERNEL_S,
    host=_pcie(32e9),
)
DGX_H100 = Machine(
    name="dgx-h100",
    sources=(FITTED, SHEET, "8 H100 and 8 InfiniBand ports of 400 Gb/s a node"),
    rates=H100,
    memory_bytes=80 * GIB,
    memory_bytes_per_s=MEMORY_SHARE * 3.35e12,
    devices_per_node=8,
    rings=_node(0.75 * 450e9, 8),
    node_bytes_per_s=0.85 * 8 * 50e9,
    network_latency_s=1.5e-5,
    kernel_s=GPU_KERNEL_S,
    host=_pcie(64e9),
)
DGX_H200 = Machine(
    name="dgx-h200",
    sources=(FITTED, SHEET, "8 H200 and 8 InfiniBand ports of 400 Gb/s a node"),
    rates=H100,
    memory_bytes=141e9,
    memory_bytes_per_s=MEMORY_SHARE * 4.8e12,
    devices_per_node=8,
    rings=_node(0.75 * 450e9, 8),
    node_bytes_per_s=0.85 * 8 * 50e9,
    network_latency_s=1.5e-5,
    kernel_s=GPU_KERNEL_S,
    host=_pcie(64e9),
)
DGX_B200 = Machine(
    name="dgx-b200",
    sources=(FITTED, SHEET, SIMUMAX, "8 B200 and 8 InfiniBand ports of 400 Gb/s a node"),
    rates=B200,
    memory_bytes=180 * GIB,
    memory_bytes_per_s=MEMORY_SHARE * 8.0e12,
    devices_per_node=8,
    rings=_node(0.70 * 900e9, 8, latency_s=2.4e-5),
    node_bytes_per_s=0.85 * 8 * 50e9,
    network_latency_s=1.5e-5,
    kernel_s=GPU_KERNEL_S,
    host=_pcie(64e9),
)
P5_H100 = Machine(
    name="p5-h100",
    sources=(FITTED, SHEET, EFA, "8 H100 a node, EFA"),
    rates=H100,
    memory_bytes=80 * GIB,
    memory_bytes_per_s=MEMORY_SHARE * 3.35e12,
    devices_per_node=8,
    rings=_node(250e9, 8),
    node_bytes_per_s=8 * 45e9,
    network_latency_s=3e-5,
    network_shares=((2, 1.0), (4, 0.6), (8, 0.38), (16, 0.30), (32, 0.18), (64, 0.09)),
    kernel_s=GPU_KERNEL_S,
)
MACHINES = {
    machine.name: machine
    for machine in (
        PERLMUTTER, FRONTIER, ALPS, DGX_A100, DGX_H100, DGX_H200, DGX_B200, P5_H100,
    )
}  # fmt: skip
"""By name."""


def machine_of(name: StrPath) -> Machine:
    """A known machine by name, or one from a file.

    Raises:
        ValueError: Neither; names the known ones.
    """
    text = str(name)
    if text in MACHINES:
        return MACHINES[text]
    if Path(text).is_file():
        return Machine.load(text)
    known = ", ".join(MACHINES)
    raise ValueError(
        f"machine {text!r} is neither known nor a file; known are {known}; "
        "`fourfold probe --out FILE` measures this one"
    )
