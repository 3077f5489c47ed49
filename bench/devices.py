"""The devices that the project estimates for: what users call them, and torch's name, which finds their data sheets."""

DEVICES = {
    "A100": "NVIDIA A100-SXM4-80GB",
    "H100": "NVIDIA H100 80GB HBM3",
    "H200": "NVIDIA H200",
    "B200": "NVIDIA B200",
    "L4": "NVIDIA L4",
    "4090": "NVIDIA GeForce RTX 4090",
}


def short_name(name: str) -> str:
    """Of torch's name of a device: without the maker, who is nearly always the same."""
    return name.removeprefix("NVIDIA ").strip()
