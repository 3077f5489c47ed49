"""The devices that the project estimates for, the links between them, and how long exchanges over these take.

A ring of N devices reduces and scatters S bytes, or gathers them, in N - 1 hops (Patarasuk and Yuan 2009, "Bandwidth
optimal all-reduce algorithms"). An all-reduce is both, and one call.

    (N - 1) / N * S / bandwidth + (N - 1) * hop

Over n nodes of g devices it goes in two levels: inside each node first, then each device exchanges its part S / g with
its counterparts through a network card of its own. Across many nodes the hops add up, and NCCL all-reduces over two
binary trees instead, in 2 log2(n) hops (Sanders, Speck and Traeff 2009, "Two-tree algorithms for full bandwidth
broadcast, reduction and scan"). The faster of both counts.
"""

import re
from dataclasses import dataclass

DEVICES = {
    "A100": "NVIDIA A100-SXM4-80GB",
    "H100": "NVIDIA H100 80GB HBM3",
    "H200": "NVIDIA H200",
    "B200": "NVIDIA B200",
    "L4": "NVIDIA L4",
    "4090": "NVIDIA GeForce RTX 4090",
}
NETWORK, CALL = 14.0, 8.4  # microseconds of a hop between nodes, and of any exchange before its first hop
NCCL = "NCCL's own model, src/graph/tuning.cc"
NVLINK, PCIE = 3.4, 5.7  # microseconds of a hop within a node
LINKS = (  # end of torch's name of a device, link, GB/s in one direction (data sheets add both up), hop, source
    (r"A100-SXM4-(40|80)GB", "NVLink 3", 300, NVLINK, "NVIDIA A100 data sheet: 600 GB/s, both ways"),
    (r"H100 (80|96)GB HBM3|H200", "NVLink 4", 450, NVLINK, "NVIDIA H100, H200 data sheets, SXM: 900 GB/s, both ways"),
    (r"B200", "NVLink 5", 900, NVLINK, "NVIDIA Blackwell data sheet: 1800 GB/s, both ways"),
    (r"A100(-PCIE-(40|80)GB| 80GB PCIe)|L40?S?", "PCIe 4 x16", 32, PCIE, "their data sheets: 64 GB/s, both ways"),
    (r"GeForce RTX (3090|4080|4090).*", "PCIe 4 x16", 32, PCIE, "PCI Express 4.0: 64 GB/s, both ways"),
    (r"H100 PCIe|GeForce RTX 5090", "PCIe 5 x16", 64, PCIE, "PCI Express 5.0: 128 GB/s, both ways"),
)


def short_name(name: str) -> str:
    """Of torch's name of a device: without the maker, who is nearly always the same."""
    return name.removeprefix("NVIDIA ").strip()


def link_of(name: str) -> tuple[str, float, float, str] | None:
    """(link, GB/s, microseconds of a hop, source) of a device with that name of torch's. None where it is not known."""
    return next((link for device, *link in LINKS if re.search(rf"(^|\s)({device})$", name.strip())), None)


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
        inside, between, _ = self._rings(size, devices)
        return (inside + between + self.call) * (devices > 1)

    def all_reduce(self, size: float, devices: int) -> float:
        """Seconds of one all-reduce of `size` bytes; 0 for a lone device."""
        inside, ring, tree = self._rings(size, devices)
        return (2 * inside + min(2 * ring, tree) + self.call) * (devices > 1)

    def _rings(self, size: float, devices: int) -> tuple[float, float, float]:
        """Seconds of half an all-reduce within a node, of half of one across, and of trees across, there and back."""
        assert devices <= self.node or devices % self.node == 0, (devices, self.node)
        g = min(devices, self.node)
        n, part = devices // g, size / g
        inside = (g - 1) / g * size / self.inside + (g - 1) * self.hop_inside
        ring = (n - 1) / n * part / self.between + (n - 1) * self.hop_between
        return inside, ring, 2 * part / self.between + 2 * (n - 1).bit_length() * self.hop_between
