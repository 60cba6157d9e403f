"""The tables of laws and deliberate defects in docs/reliability.md, from the laws themselves and ``caught.json``."""

from __future__ import annotations

import json
from pathlib import Path

from tests.properties import defects
from tests.properties.probes import PROBES, says

FILE = Path(__file__).with_name("caught.json")


def known() -> dict[str, dict[str, str]]:
    """Defect to the laws that catch it, in order of cost, each with the first graph on which it does."""
    found: dict[str, dict[str, str]] = json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {}
    return found


def tables() -> str:
    """Laws with what they say and how many defects each catches; defects with the laws that catch them."""
    caught = known()
    count = {law: sum(law in laws for laws in caught.values()) for law in PROBES}
    alone = {law: sum(list(laws) == [law] for laws in caught.values()) for law in PROBES}
    lines = ["| law | says | catches | alone |", "|---|---|---|---|"]
    lines += [f"| {law} | {says(law)} | {count[law]} | {alone[law] or ''} |" for law in PROBES]
    lines += ["", f"{len(defects.ALL)} defects:", "", "| defect | then | caught by |", "|---|---|---|"]
    lines += [f"| {d.name} | {d.wrong} | {', '.join(caught.get(d.name, ()))} |" for d in defects.ALL]
    return "\n".join([*lines, ""])
