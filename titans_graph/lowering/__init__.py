"""From a plan of regions to ``torch.fx`` functions. See :mod:`titans_graph.lowering.lowered`."""

from titans_graph.lowering.lowered import Code, Holder, Lower, Lowered

__all__ = ["Code", "Holder", "Lower", "Lowered"]
