"""Pass ``choose-kernels``: which implementation computes each node that has several; logged, overridable by name."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass, replace

from titans_graph.passes.base import Pass
from titans_graph.passes.compilation import Compilation

log = logging.getLogger("titans_graph.kernels")


@dataclass(frozen=True)
class ChooseKernels(Pass):
    """Nodes of components with a ``default_kernel`` get a definite choice: the one their parameter names, or the default."""

    name = "choose-kernels"

    def run(self, c: Compilation) -> Compilation:
        """Fill ``kernels`` and write the choice into the node's site."""
        chosen, sites = {}, dict(c.sites)
        for name, site in c.sites.items():
            default = c.nodes[name].component.default_kernel
            if not default:
                continue
            kernel = default if site.parameters.kernel == "auto" else site.parameters.kernel
            chosen[name] = kernel
            sites[name] = replace(site, parameters=dataclasses.replace(site.parameters, kernel=kernel))
        for kernel in sorted(set(chosen.values())):
            log.info("kernel %s: %s", kernel, ", ".join(n for n, k in chosen.items() if k == kernel))
        return replace(c, kernels=chosen, sites=sites)

    def check_after(self, c: Compilation) -> None:
        """No choice is left open."""
        assert all(kernel != "auto" for kernel in c.kernels.values())


@dataclass(frozen=True)
class Share(Pass):
    """Let equal regions (the layers of a stack) share one code object, so that each is compiled once."""

    name = "share"
    optional = True

    def run(self, c: Compilation) -> Compilation:
        """Set ``share``."""
        return replace(c, share=True)
