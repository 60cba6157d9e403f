"""A run's folder: what it belongs to (``run.json``), what is left of it, and what happens when another run wants it."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from titans_graph.errors import CheckpointError, DataError
from titans_graph.tasks import text as tasks
from titans_graph.tasks.text import Text
from titans_graph.training import atomic, checkpoint, logs, reading
from titans_graph.training.config import TrainConfig
from titans_graph.training.interface import LanguageModel

FILE = "run.json"
_SETTINGS = 20
"""Settings that are shown where they differ; a run has fewer."""
_COMPARED = 4000
"""Lines of two specs that are compared."""


def identity(model: LanguageModel, text: Text, config: TrainConfig, init: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """All that decides which weights a run ends with, ready for JSON; ``init``: of :mod:`titans_graph.training.start`."""
    data = {"name": text.name, "identity": text.identity, "bytes": len(text.train), "path": text.path}
    found = {"fingerprint": model.fingerprint, "spec": model.spec, "data": data, "config": config.identity()}
    return found if init is None else {**found, "init": dict(init)}


def first_weights(found: checkpoint.Checkpoint | None) -> dict[str, Any] | None:
    """What a run noted of the checkpoint that its first weights came from: ``path``, ``step``, ``sha256``; None without."""
    return _first(found.progress.get("identity")) if found else None


def _first(identity: Any) -> dict[str, Any] | None:
    noted = identity.get("init") if isinstance(identity, dict) else None
    if not isinstance(noted, dict):
        return None
    path, step, sha256 = (noted.get(key) for key in ("path", "step", "sha256"))
    whole = isinstance(path, str) and type(step) is int and abs(step) < 1 << 53 and isinstance(sha256, str)
    return {"path": path, "step": step, "sha256": sha256} if whole else {"path": "", "step": 0, "sha256": ""}


def claim(run: Path, wanted: dict[str, Any], note: checkpoint.Note) -> None:
    """Make ``run`` the folder of a run with identity ``wanted``, or raise CheckpointError naming what differs.

    A ``run.json`` that is missing or damaged is written anew, with a note, from what the newest checkpoint says.
    """
    found, wrong = _read(run)
    lines = differences(found, wanted) if found else []
    if found and not lines:
        return
    newest = checkpoint.newest(run, lambda text: None)
    again = newest.progress.get("identity") if newest else None
    if _whole(again):
        found, lines = again, differences(again, wanted)
    if found and lines:
        mend = _mend(run, found, wanted)
        raise CheckpointError(f"{run}: holds another run; it differs in\n    " + "\n    ".join(lines) + f"\n  help: {mend}")
    if (newest or wrong) and not _whole(again):
        raise CheckpointError(
            f"{run / FILE}: {wrong or 'is missing, but there are checkpoints'}; it cannot be told which run this is\n"
            "  help: choose another --out, or pass --fresh to set it aside"
        )
    if newest:
        wrong = wrong or ("disagrees with the checkpoints" if found else "is missing")
        note(f"note: {run / FILE} {wrong}; written anew from {newest.path.name}")
    atomic.write_file(run / FILE, json.dumps(wanted, indent=1).encode())


def _mend(run: Path, found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """What to do about a run that is another one; where it is of the same graph, its weights can be trained further."""
    further = f"--init {run} with another --out"
    same = {**wanted, "config": {**wanted["config"], "steps": found["config"].get("steps")}}
    if not differences(found, same):
        return (
            "the learning rate of every step depends on --steps, so a run keeps its number; to train its weights further, "
            f"start a new run from them: {further}"
        )
    mend = "choose another --out, give the settings of that run, or pass --fresh to set that run aside"
    return f"{mend}; to train its weights further: {further}" if found["fingerprint"] == wanted["fingerprint"] else mend


def text_of(found: checkpoint.Checkpoint, note: checkpoint.Note) -> Text:
    """The text that a checkpoint's run was trained on, read again from where it was; a note where it has changed since.

    DataError where it is gone or cannot be read, or where the run did not note a path.
    """
    identity = found.progress.get("identity")
    noted = identity.get("data") if isinstance(identity, dict) else None
    data = noted if isinstance(noted, dict) else {}
    path, name = _place(data)
    try:
        if path is None and name != tasks.STANDARD:
            raise DataError(f"{name or 'its text'}: the run did not note where that is")
        text = tasks.load(path)
    except DataError as error:
        reason = reading.shown(str(error).partition("\n")[0], 500)
        raise DataError(
            f"{found.path}: the text that this run was trained on cannot be read again: {reason}\n"
            "  help: say with --data where it is now, or which other text to take"
        ) from error
    if text.identity != data.get("identity"):
        note(
            f"note: {reading.shown(path or name, 500)} has changed since this run was trained on it; "
            "what is its validation part now may have been trained on"
        )
    return text


def _place(data: dict[str, Any]) -> tuple[str | None, str]:
    """Where a run's text was (None: nowhere, or the standard library), and its name; anybody may have written ``data``."""
    path, name = data.get("path"), data.get("name")
    name = name if isinstance(name, str) else ""
    path = path if isinstance(path, str) and os.path.isabs(path) else None
    if "path" not in data and name != tasks.STANDARD:
        path = name or None  # a run of an earlier version noted the path as it was given, and nothing else
    return path, reading.shown(name)


def loss(run: Path, found: checkpoint.Checkpoint | None) -> list[str]:
    """What of a run is gone where it goes on from ``found``, one line each: steps to repeat, records of the log.

    CheckpointError where checkpoints were written and none is left: a run never starts over without being told so.
    """
    records = logs.read(run)
    saved = [r["step"] for r in records if r["kind"] == "checkpoint"]
    if found is None and saved:
        raise CheckpointError(
            f"{run / 'checkpoints'}: no checkpoint is left; the log says that step {max(saved)} was saved\n"
            "  help: put it back from a copy; or start afresh from step 0, with --fresh (which sets this run aside) or "
            "another --out"
        )
    step = found.step if found else 0
    last = max((r["step"] for r in records if r["kind"] == "train"), default=0)
    lines = []
    if last > step:
        steps = f"step {last}" if last == step + 1 else f"steps {step + 1} to {last}"
        lines.append(f"{steps}, made after the last good checkpoint, {'is' if last == step + 1 else 'are'} run again")
    if lost := logs.missing(records, step):
        lines.append(f"{run / logs.FILE} is damaged or missing: it lacks {len(lost)} of the steps {lost[0]} to {lost[-1]}")
    return lines


def set_aside(run: Path) -> Path | None:
    """Rename a folder that holds a run, or what is left of one, to ``NAME.1`` (or the first free number); None without one.

    CheckpointError where a process is training into it.
    """
    if not any((run / name).exists() for name in (FILE, logs.FILE, "checkpoints")):
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
    if found["fingerprint"] != wanted["fingerprint"]:
        lines += spec_changes(found["spec"], wanted["spec"])
    there, here = found["data"], wanted["data"]
    if there.get("identity") != here["identity"]:
        lines.append(
            f"the text: {there.get('name')!r:.200} with {there.get('bytes'):,} training bytes there, "
            f"{here['name']!r} with {here['bytes']:,} here"
        )
    first, own = _first(found), _first(wanted)
    if (first and first["sha256"]) != (own and own["sha256"]):
        lines.append(f"the first weights: {_said(first)} there, {_said(own)} here")
    old, new = found["config"], wanted["config"]
    other = [key for key in new | old if old.get(key) != new.get(key)]
    lines += [f"{reading.shown(key, 60)}: {old.get(key)!r:.60} there, {new.get(key)!r:.60} here" for key in other[:_SETTINGS]]
    return lines + [f"and {len(other) - _SETTINGS} more settings"] * (len(other) > _SETTINGS)


def _said(init: dict[str, Any] | None) -> str:
    return f"step {init['step']} of {reading.shown(str(init['path']))}" if init else "drawn at random"


def spec_changes(there: str, here: str) -> list[str]:
    """Some of the lines in which two specs differ, under a heading."""
    shown = _changes(there.splitlines(), here.splitlines())
    lines = ["the spec (- there, + here):", *(f"  {line}" for line in shown[:12])]
    return lines + ([f"  and {len(shown) - 12} more lines"] if len(shown) > 12 else [])


def _changes(there: list[str], here: list[str]) -> list[str]:
    """The lines that differ, fit to be shown; comparing takes longer than the square of the lines, so not of any number."""
    if len(there) + len(here) > _COMPARED:
        return [f"- {len(there)} lines", f"+ {len(here)} lines"]
    changes = difflib.unified_diff(there, here, n=0, lineterm="")
    return [reading.shown(line, 160) for line in changes if not line.startswith(("---", "+++", "@@"))]


def _read(run: Path) -> tuple[dict[str, Any] | None, str]:
    """What ``run.json`` says, or what is wrong with it (empty where there is none)."""
    try:
        content = reading.json_of(run / FILE)
    except FileNotFoundError:
        return None, ""
    except (OSError, ValueError) as error:
        return None, f"cannot be read ({error})"
    return (content, "") if _whole(content) else (None, "is damaged")


def _whole(identity: Any) -> TypeGuard[dict[str, Any]]:
    """Whether it has the form that :func:`identity` gives."""
    if not isinstance(identity, dict):
        return False
    data, config = identity.get("data"), identity.get("config")
    words = isinstance(identity.get("fingerprint"), str) and isinstance(identity.get("spec"), str)
    size = data.get("bytes") if isinstance(data, dict) else None
    return words and isinstance(config, dict) and type(size) is int and abs(size) < 1 << 63
