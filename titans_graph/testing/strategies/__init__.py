"""Strategies that draw graphs, memory networks, inputs and ways to read them (needs hypothesis).

    from hypothesis import given
    from titans_graph.testing import strategies as tgs

    @given(graph=tgs.graphs(), data=st.data())
    def test_mine(graph, data):
        model = tg.build(graph).double()
        reading = data.draw(tgs.readings(graph))
        ...

A failing example is noted as a spec that can be pasted into a file, and shrinks to few nodes with small sizes. A component of
your own is drawn as soon as it has a recipe (:func:`recipe`). Sizes are small, so that float64 on a CPU is quick.
"""

from titans_graph.testing.strategies.draft import RECIPES, Draft, Recipe, recipe, recipe_of
from titans_graph.testing.strategies.drawing import graphs
from titans_graph.testing.strategies.inputs import (
    Reading,
    Run,
    documents,
    readings,
    splits,
    streams,
    token_batches,
    vocabulary,
)
from titans_graph.testing.strategies.networks import memory_networks, network_graphs
from titans_graph.testing.strategies.planted import MISTAKES, Planted, near_valid_specs

__all__ = [
    "MISTAKES",
    "RECIPES",
    "Draft",
    "Planted",
    "Reading",
    "Recipe",
    "Run",
    "documents",
    "graphs",
    "memory_networks",
    "near_valid_specs",
    "network_graphs",
    "readings",
    "recipe",
    "recipe_of",
    "splits",
    "streams",
    "token_batches",
    "vocabulary",
]
