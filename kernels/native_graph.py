"""Sums of products in a traced graph become one operation each.

Differentiation adds up what reaches a value over several ways, each of them a product, and a chunk's query pass reads three
products at once. As separate products all but one are written to memory only to be added; one operation keeps the sum in
registers. Transposes and signs around a product go into it.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Graph, Node

aten = torch.ops.aten


@torch.library.custom_op("titans_graph::sum_of_products", mutates_args=())
def sum_of_products(left: list[Tensor], right: list[Tensor], signs: list[int]) -> Tensor:
    """Sum of ``sign * left @ right`` over the lists: ``[N, M, K]`` and ``[N, K, P]``, any K each, to ``[N, M, P]``."""
    terms = [sign * torch.bmm(a, b) for a, b, sign in zip(left, right, signs, strict=True)]
    return torch.stack(terms).sum(0)


@sum_of_products.register_fake
def _(left: list[Tensor], right: list[Tensor], signs: list[int]) -> Tensor:
    return left[0].new_empty(left[0].shape[0], left[0].shape[1], right[0].shape[2])


SUM = torch.ops.titans_graph.sum_of_products.default


def kind_of(node: Node) -> tuple[tuple[int, ...], torch.dtype] | None:
    """Shape and type of a traced node's value; None where it is no tensor."""
    value: Any = node.meta.get("val", node.meta.get("tensor_meta"))
    return (tuple(value.shape), value.dtype) if hasattr(value, "dtype") else None


def gather_products(graph: Graph) -> None:
    """Put every product, and every sum that has products among its terms, into one operation.

    The graph must not change values in place: products move to where their sum was.
    """
    taken: set[Node] = set()
    for node in reversed(list(graph.nodes)):
        if node in taken or node.target not in (aten.add.Tensor, aten.sub.Tensor, aten.bmm.default):
            continue
        terms = _Terms(node)
        if not terms.products:
            continue
        taken |= terms.inner
        with graph.inserting_before(node):
            result = terms.write(graph)
        node.replace_all_uses_with(result)
    graph.eliminate_dead_code()


class _Terms:
    """What a node is the sum of: products, and others, each with its sign."""

    def __init__(self, root: Node) -> None:
        self.root, self.kind = root, kind_of(root)
        self.products: list[tuple[_Operand, _Operand, int]] = []
        self.others: list[tuple[Node, int]] = []
        self.inner: set[Node] = set()
        self._add(root, 1)

    def _add(self, node: Node, sign: int) -> None:
        # Only what nothing else reads need not exist by itself. A term that is broadcast or converted is no term of the whole.
        alike = kind_of(node) == self.kind
        mine = alike and (node is self.root or len(node.users) == 1)
        parts = _addends(node) if mine else None
        product = _product(node) if mine else None
        if parts is not None:
            self.inner.add(node)
            for part, factor in parts:
                self._add(part, sign * factor)
        elif product is not None:
            self.inner.add(node)
            a, b = product
            self.products.append((a, b, sign * a.sign * b.sign))
        elif node.target is not aten.new_zeros.default or not alike:
            self.others.append((node, sign))

    def write(self, graph: Graph) -> Node:
        """The sum as new nodes; the products in one of them."""
        left = [a.write(graph) for a, _, _ in self.products]
        right = [b.write(graph) for _, b, _ in self.products]
        result = graph.call_function(SUM, (left, right, [sign for _, _, sign in self.products]))
        for other, sign in self.others:
            result = graph.call_function(aten.add.Tensor if sign > 0 else aten.sub.Tensor, (result, other))
        return result


class _Operand:
    """One side of a product without the signs and the transposes around it."""

    def __init__(self, node: Node, *, transposed: bool) -> None:
        self.transposed, self.sign = transposed, 1
        while True:
            if node.target is aten.neg.default:
                self.sign = -self.sign
            elif _transposes(node):
                self.transposed = not self.transposed
            else:
                break
            node = node.all_input_nodes[0]
        self.node = node

    def write(self, graph: Graph) -> Node:
        return graph.call_function(aten.transpose.int, (self.node, 1, 2)) if self.transposed else self.node


def _addends(node: Node) -> list[tuple[Node, int]] | None:
    """What a sum, a difference or a negation is made of, with signs; None for anything else."""
    known: dict[Any, tuple[int, ...]] = {aten.add.Tensor: (1, 1), aten.sub.Tensor: (1, -1), aten.neg.default: (-1,)}
    signs = known.get(node.target)
    if signs is None or node.kwargs or not all(isinstance(x, Node) for x in node.args):
        return None
    if len(set(node.args)) < len(signs):
        return None  # x + x: taken apart, chains of them would have twice the terms at every link
    return list(zip(cast("tuple[Node, ...]", node.args), signs, strict=True))


def _product(node: Node) -> tuple[_Operand, _Operand] | None:
    """The two sides of a product, or of one that is transposed and read by nothing else; None for anything else."""
    if node.target is aten.bmm.default:
        left, right = cast("tuple[Node, Node]", node.args)
        return _Operand(left, transposed=False), _Operand(right, transposed=False)
    inner = node.all_input_nodes[0] if _transposes(node) else None
    if inner is None or inner.target is not aten.bmm.default or len(inner.users) != 1:
        return None
    left, right = cast("tuple[Node, Node]", inner.args)
    return _Operand(right, transposed=True), _Operand(left, transposed=True)


def _transposes(node: Node) -> bool:
    """Whether a node swaps rows and columns of matrices ``[N, M, K]``."""
    kind = kind_of(node)
    if node.target is not aten.transpose.int or kind is None or len(kind[0]) != 3:
        return False
    return {cast("int", d) % 3 for d in node.args[1:]} == {1, 2}
