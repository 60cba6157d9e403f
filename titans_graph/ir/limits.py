"""Limits and naming rules of declared graphs, the same for YAML, graph text and the builder.

They are far above what a model needs; past them a text is a mistake or an attack, and gets an error instead of
a machine without memory.
"""

from __future__ import annotations

import re

MAX_BYTES = 1_000_000
"""Size of a spec or graph text."""
MAX_DEPTH = 64
"""Nesting of mappings, lists and blocks."""
MAX_ELEMENTS = 100_000
"""Values in a file after aliases are expanded."""
MAX_NODES = 20_000
"""Copies of nodes after blocks and repeats are expanded."""
MAX_BLOCKS = 10_000
"""Blocks that a spec makes for the parameters they are used with."""
MAX_REPEAT = 10_000
"""Copies one ``repeat`` makes."""
MAX_DIAGNOSTICS = 100
"""Mistakes shown for one graph."""
MAX_INTEGER = 2**63 - 1
"""Largest whole number (and, negated, nearly the smallest)."""

NAME = re.compile(r"[^\W\d][\w-]*")
"""Names of nodes, inputs, outputs: a letter or underscore first, no dot (that is where a port begins)."""
BLOCK_NAME = re.compile(r"[^\W\d][\w-]*(\.[\w-]+)*")
"""Names of blocks and components, which may hold dots."""
PARAMETER_NAME = re.compile(r"[^\W\d]\w*")
"""Names of parameters; no dash, because ``$a-1`` is a difference."""
RESERVED = ("use", "in", "repeat")
"""Keys of a node, therefore no names of inputs or parameters."""
MAIN = "main"
"""The name of a graph's main block."""
