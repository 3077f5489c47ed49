"""How devices reach each other, and how long collectives over rings of them take. Arithmetic only.

A ring of N devices all-reduces S bytes by a reduce-scatter and an all-gather; each sends (N - 1) / N * S bytes to the
next device in N - 1 hops (Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms"):

    reduce-scatter = all-gather = (N - 1) / N * S / bandwidth + (N - 1) * hop,     all-reduce = both + one call

Over nodes of g devices each it goes in two levels: inside each node first, then across the n nodes, where every device
exchanges the part of S / g that it has with its counterparts through a network card of its own:

    (g - 1) / g * S / inside + (g - 1) * hop  +  (n - 1) / n * S / g / between + (n - 1) * hop between nodes

Across many nodes the hops add up, and NCCL all-reduces over two binary trees instead (Sanders, Speck and Traeff 2009,
"Two-tree algorithms for full bandwidth broadcast, reduction and scan"): all of the part up and down again, in
2 log2(n) hops. The faster of both counts.
"""

import re
from dataclasses import dataclass

HOP_NETWORK = 14.0  # microseconds; this and what follows: NCCL's own model of a ring (src/graph/tuning.cc, "Simple")
HOP_NVLINK, HOP_PCIE = 3.4, 5.7
CALL = 8.4  # microseconds: what any exchange takes before its first hop
NCCL = "NCCL's own model, src/graph/tuning.cc"


@dataclass(frozen=True)
class Link:
    """Between the devices of one node."""

    devices: str  # regular expression for the end of torch.cuda.get_device_name()
    kind: str
    gbytes: float  # GB/s in one direction; data sheets mostly add both up
    hop: float  # microseconds
    source: str


LINKS = (
    Link(r"V100-SXM[23]-(16|32)GB", "NVLink 2", 150, HOP_NVLINK, "NVIDIA V100 data sheet: 300 GB/s, both ways"),
    Link(r"A100-SXM4-(40|80)GB", "NVLink 3", 300, HOP_NVLINK, "NVIDIA A100 data sheet: 600 GB/s, both ways"),
    Link(r"H100 (80|96)GB HBM3", "NVLink 4", 450, HOP_NVLINK, "NVIDIA H100 data sheet, SXM: 900 GB/s, both ways"),
    Link(r"H200", "NVLink 4", 450, HOP_NVLINK, "NVIDIA H200 data sheet, SXM: 900 GB/s, both ways"),
    Link(r"B200", "NVLink 5", 900, HOP_NVLINK, "NVIDIA Blackwell data sheet: 1800 GB/s, both ways"),
    Link(r"A100(-PCIE-(40|80)GB| 80GB PCIe)", "PCIe 4 x16", 32, HOP_PCIE, "NVIDIA A100 data sheet: 64 GB/s, both ways"),
    Link(r"L40?S?", "PCIe 4 x16", 32, HOP_PCIE, "NVIDIA L4 and L40 data sheets: 64 GB/s, both ways"),
    Link(r"H100 PCIe", "PCIe 5 x16", 64, HOP_PCIE, "NVIDIA H100 data sheet, PCIe: 128 GB/s, both ways"),
    Link(r"GeForce RTX (3090|4080|4090).*", "PCIe 4 x16", 32, HOP_PCIE, "PCI Express 4.0: 64 GB/s, both ways"),
    Link(r"GeForce RTX 5090", "PCIe 5 x16", 64, HOP_PCIE, "PCI Express 5.0: 128 GB/s, both ways"),
)


def link_of(name: str) -> Link | None:
    """The link of a device with that torch.cuda.get_device_name(); None where it is not known."""
    return next((link for link in LINKS if re.search(rf"(^|\s){link.devices}$", name.strip())), None)


@dataclass(frozen=True)
class Fabric:
    """Nodes of devices: bytes/s in one direction, of one device, as reached; seconds of a hop and of a call."""

    node: int  # devices that one node has
    inside: float
    between: float
    hop_inside: float = 0.0
    hop_between: float = 0.0
    call: float = 0.0

    def gather(self, size: float, devices: int) -> float:
        """Seconds of one all-gather, or one reduce-scatter, of `size` bytes in all; 0 for a lone device."""
        if devices == 1:
            return 0.0
        g, n = self._nodes(devices)
        return self._inside(size, g) + _ring(size / g, n, self.between, self.hop_between) + self.call

    def all_reduce(self, size: float, devices: int) -> float:
        """Seconds of one all-reduce of `size` bytes."""
        if devices == 1:
            return 0.0
        g, n = self._nodes(devices)
        ring = 2 * _ring(size / g, n, self.between, self.hop_between)
        tree = 2 * size / g / self.between + 2 * (n - 1).bit_length() * self.hop_between
        return 2 * self._inside(size, g) + min(ring, tree) + self.call

    def _nodes(self, devices: int) -> tuple[int, int]:
        """(devices of a node, nodes)"""
        assert devices <= self.node or devices % self.node == 0, (devices, self.node)
        g = min(devices, self.node)
        return g, devices // g

    def _inside(self, size: float, devices: int) -> float:
        return _ring(size, devices, self.inside, self.hop_inside)


def _ring(size: float, members: int, bandwidth: float, hop: float) -> float:
    """Seconds of half an all-reduce."""
    return (members - 1) / members * size / bandwidth + (members - 1) * hop
