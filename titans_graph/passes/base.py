"""What a pass is: a named function from one compilation to the next, with a contract checked before and after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from titans_graph.passes.compilation import Compilation


@dataclass(frozen=True)
class Pass:
    """A named step of the compiler. ``optional`` passes can be disabled by name and preserve meaning either way.

    ``check_before`` and ``check_after`` raise AssertionError where the contract is broken: that is a defect of the
    compiler, never of a spec. Mistakes of a spec are diagnostics on the compilation.
    """

    name: ClassVar[str]
    optional: ClassVar[bool] = False

    def run(self, c: Compilation) -> Compilation:
        """The compilation after this pass; the argument is left as it was."""
        raise TypeError(f"{type(self).__name__} defines no run()")

    def check_before(self, c: Compilation) -> None:
        """Assert what the pass needs."""

    def check_after(self, c: Compilation) -> None:
        """Assert what the pass promises."""
