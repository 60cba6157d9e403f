"""A run's folder: what it belongs to (``run.json``), and what happens when another run wants it."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from titans_graph.errors import CheckpointError
from titans_graph.tasks.text import Text
from titans_graph.training import atomic
from titans_graph.training.config import TrainConfig
from titans_graph.training.interface import LanguageModel

FILE = "run.json"


def identity(model: LanguageModel, text: Text, config: TrainConfig) -> dict[str, Any]:
    """All that decides which weights a run ends with, ready for JSON."""
    data = {"name": text.name, "identity": text.identity, "bytes": len(text.train)}
    return {"fingerprint": model.fingerprint, "spec": model.spec, "data": data, "config": config.identity()}


def claim(run: Path, wanted: dict[str, Any]) -> None:
    """Make ``run`` the folder of a run with identity ``wanted``, or raise CheckpointError naming what differs."""
    found = _read(run)
    if found is None:
        if any((run / "checkpoints").glob("step-*")):
            raise CheckpointError(f"{run}: checkpoints without {FILE}\n  help: choose another --out")
        atomic.write_file(run / FILE, json.dumps(wanted, indent=1).encode())
        return
    lines = differences(found, wanted)
    if lines:
        raise CheckpointError(
            f"{run}: holds another run; it differs in\n    "
            + "\n    ".join(lines)
            + "\n  help: choose another --out, give the settings of that run, or pass --fresh to set that run aside"
        )


def set_aside(run: Path) -> Path | None:
    """Rename a folder that holds a run to ``NAME.1`` (or the first free number); None where there is no run.

    CheckpointError where a process is training into it.
    """
    if not (run / FILE).is_file():
        return None
    number = 1
    while (target := run.with_name(f"{run.name}.{number}")).exists():
        number += 1
    with atomic.locked(run):
        try:
            return run.rename(target)
        except OSError as error:
            raise CheckpointError(f"{run}: cannot be renamed to {target}: {error.strerror or error}") from error


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """One line for each thing that differs between two identities; empty where they agree."""
    lines: list[str] = []
    if found.get("fingerprint") != wanted["fingerprint"]:
        changes = difflib.unified_diff(found.get("spec", "").splitlines(), wanted["spec"].splitlines(), n=0, lineterm="")
        shown = [line for line in changes if not line.startswith(("---", "+++", "@@"))]
        lines += ["the spec (- there, + here):", *(f"  {line}" for line in shown[:12])]
        lines += [f"  and {len(shown) - 12} more lines"] if len(shown) > 12 else []
    if found.get("data", {}).get("identity") != wanted["data"]["identity"]:
        there, here = found.get("data", {}), wanted["data"]
        lines.append(
            f"the text: {there.get('name')!r} with {there.get('bytes'):,} training bytes there, "
            f"{here['name']!r} with {here['bytes']:,} here"
        )
    old, new = found.get("config", {}), wanted["config"]
    lines += [f"{key}: {old.get(key)!r} there, {new.get(key)!r} here" for key in new | old if old.get(key) != new.get(key)]
    return lines


def _read(run: Path) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads((run / FILE).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{run / FILE}: cannot be read ({error})\n  help: choose another --out") from error
    return content
