"""Descriptions of memory networks: short names and graphs."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

_SIZES = st.integers(1, 4)
_PLAIN = ("silu", "gelu", "relu2", "tanh", "sigmoid", "norm.rms", "norm.layer", "scale")
_SHORT: list[Any] = [
    "linear",
    {"mlp": {"depth": 1}},
    {"mlp": {"depth": 2, "hidden": 3}},
    {"swiglu": {"hidden": 3}},
    {"lowrank": {"rank": 2}},
]


def memory_networks(dim: int = 3) -> st.SearchStrategy[Any]:
    """Descriptions of memory networks for keys of size ``dim``: shorthands and graphs."""
    return st.sampled_from(_SHORT) | network_graphs(dim)


@st.composite
def network_graphs(draw: st.DrawFn, dim: int = 3) -> dict[str, Any]:
    """A memory network declared as a graph of up to a dozen nodes, for keys of size ``dim``.

    Every node is read, sizes agree, weights may be used twice; the last node has size ``dim``.
    """
    nodes: dict[str, Any] = {}
    sizes, unread = {"x": dim}, set[str]()
    shared: list[tuple[str, int, int]] = []

    def add(name: str, use: str, inputs: list[str], width: int, **options: Any) -> str:
        nodes[name] = {"use": use, "in": inputs, **options}
        sizes[name] = width
        unread.difference_update(inputs)
        unread.add(name)
        return name

    uses = st.sampled_from(["fast.linear", "fast.linear", "fast.bias", "fast.gain", "tied", "add", "product", *_PLAIN])
    for i in range(draw(st.integers(1, 6))):
        use, name, source = draw(uses), f"n{i}", draw(st.sampled_from(sorted(sizes)))
        ties = [(w, b) for w, a, b in shared if a == sizes[source]]
        if use == "tied" and ties:
            weight, size = draw(st.sampled_from(ties))
            add(name, "fast.linear", [source], size, weight=weight, size=size)
        elif use in ("fast.linear", "tied"):
            size = draw(_SIZES)
            shared.append((add(name, "fast.linear", [source], size, size=size), sizes[source], size))
        elif use in ("add", "product"):
            alike = sorted(n for n, s in sizes.items() if s == sizes[source])
            add(name, use, [source, draw(st.sampled_from(alike))], sizes[source])
        else:
            extra = {"eps": 0.01} if use.startswith("norm") else {"by": 0.5} if use == "scale" else {}
            add(name, use, [source], sizes[source], **extra)
    ends = [add(f"end{i}", "fast.linear", [name], dim) for i, name in enumerate(sorted(unread))]
    if len(ends) > 1:
        add("y", "add", ends, dim)
    return {"nodes": nodes}
