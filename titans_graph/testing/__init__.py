"""Hypothesis strategies for models with memory: ``titans_graph.testing.strategies``. Needs hypothesis."""
