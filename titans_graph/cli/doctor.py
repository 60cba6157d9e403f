"""``doctor``: let a model read some tokens, and say what its memories did and whether anything went wrong.

``doctor --replay``: run the training step again that gave a NaN, and say where it came from.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titans_graph.cli.options import Commands, add_spec, command, settings
from titans_graph.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor


TOKENS = 1024


def add_commands(commands: Commands) -> None:
    """Add the parser of ``doctor``."""
    doctor = command(
        commands,
        "doctor",
        "look into the memories of a model while it reads: steps, gates, norms, and the first NaN",
        "doctor mac --tokens 2048\n  titans-graph doctor runs/mac --text notes.txt --json\n"
        "  titans-graph doctor --replay runs/mac/nonfinite-step-00000123",
        "SPEC may also be the folder of a training run or of one of its checkpoints. Ends with 1 where something is not "
        "finite, or a step is above the largest stable one.",
    )
    add_spec(doctor, needed=False)
    doctor.add_argument("--tokens", type=int, metavar="N", help=f"tokens to read (default: {TOKENS})")
    doctor.add_argument("--batch", type=int, metavar="B", help="rows to read at once (default: 1)")
    doctor.add_argument("--text", type=Path, metavar="FILE", help="read this file, byte by byte (default: a made-up text)")
    doctor.add_argument("--seed", type=int, help="seed of new weights and of the made-up text (default: 0)")
    doctor.add_argument(
        "--replay",
        type=Path,
        metavar="FOLDER",
        help="instead of SPEC: run again the training step kept here when it gave a NaN or infinity, and name the first "
        "node that did",
    )
    doctor.add_argument("--json", action="store_true", help="print everything as JSON")
    doctor.set_defaults(run=run_doctor)


def run_doctor(options: argparse.Namespace) -> int:
    """The report; 1 where something is wrong."""
    if options.replay is not None:
        return _replay(options)
    if options.spec is None:
        raise UsageError("name a SPEC, or --replay FOLDER")
    from titans_graph.runtime.health import doctor, sample

    for name, value in (("tokens", TOKENS), ("batch", 1), ("seed", 0)):
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.tokens < 1 or options.batch < 1:
        raise UsageError("--tokens and --batch must be at least 1")
    model = _model(options)
    if options.text is None:
        x = sample(model, options.batch, options.tokens, options.seed)
    else:
        x = _text(model, options.text, options.batch, options.tokens)
    found = doctor(model, x)
    print(json.dumps(found.plain(), indent=2, allow_nan=False) if options.json else found.text())
    return 0 if found.sound else 1


def _replay(options: argparse.Namespace) -> int:
    """Run a failed step again; 1 where it fails again."""
    for name in ("spec", "set", "tokens", "batch", "text", "seed"):
        if getattr(options, name) not in (None, []):
            shown = "SPEC" if name == "spec" else f"--{name}"
            raise UsageError(f"--replay takes model, batch and weights from its folder; {shown} has no effect with it")
    from titans_graph import runtime
    from titans_graph.training.replay import find, rerun

    found = rerun(find(options.replay), runtime.load)
    print(json.dumps(found.plain(), indent=2, allow_nan=False) if options.json else found.text())
    return 0 if found.finite else 1


def _model(options: argparse.Namespace) -> Any:
    """The model of a spec with new weights, or of a run with its trained ones."""
    import torch

    from titans_graph import runtime
    from titans_graph.spec import shipped

    values = settings(options.set)
    if not Path(options.spec).is_dir() or options.spec in shipped():
        torch.manual_seed(options.seed)
        return runtime.load(options.spec, **values)
    from titans_graph.training.checkpoint import find
    from titans_graph.training.loop import print_note

    if values:
        raise UsageError("--set: a trained model's parameters stand; --set goes with a spec")
    return find(options.spec, print_note).model(runtime.load)


def _text(model: Any, path: Path, rows: int, tokens: int) -> Tensor:
    """Rows ``[B, T]`` from places spread evenly over a file."""
    import torch

    (kind,) = model.compilation.inputs.values()
    if kind.dim is not None:
        raise UsageError("--text: this model reads a stream of features, not ids")
    content = path.read_bytes()
    if not content:
        raise UsageError(f"--text: {path} is empty")
    if len(content) < tokens:
        raise UsageError(f"--text: {path} has {len(content):,} bytes; give --tokens at most that")
    starts = [row * (len(content) - tokens) // max(1, rows - 1) for row in range(rows)]
    return torch.tensor([list(content[s : s + tokens]) for s in starts])
