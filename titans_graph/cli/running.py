"""``train``, ``generate``, ``eval`` and ``demo``: what takes time."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titans_graph.cli.options import Commands, add_spec, at_least, command, settings
from titans_graph.errors import UsageError
from titans_graph.training.config import TrainConfig

if TYPE_CHECKING:
    from titans_graph.training.checkpoint import Checkpoint

DATA_HELP = "a text file or a folder of text files (default: the Python standard library's sources)"


def add_commands(commands: Commands) -> None:
    """Add the parsers of this module's commands."""
    _add_train(commands)
    _add_generate(commands)
    _add_eval(commands)
    _add_demo(commands)


def run_train(options: argparse.Namespace) -> int:
    """Train, or go on training."""
    import torch

    from titans_graph.tasks import text
    from titans_graph.training.folder import set_aside
    from titans_graph.training.loop import is_main_process, print_note, train
    from titans_graph.training.objective import demand_language_model

    config = TrainConfig(**{f.name: getattr(options, f.name) for f in dataclasses.fields(TrainConfig)})
    torch.manual_seed(config.seed)
    model, init = _first_model(options)
    demand_language_model(model)
    data = text.load(options.data)
    print_note(data.report)
    out = options.out or Path("runs") / model.name
    if options.fresh and is_main_process() and (aside := set_aside(out)):
        print_note(f"the earlier run is now {aside}")
    print_note(f"{model.name}: {model.summary().parameters:,} parameters; writing to {out}")
    result = train(model, data, config, out, init=init)
    if result.signal:
        print_note(f"stopped after step {result.step} of {result.steps}; the same command goes on from there")
        return 128 + result.signal
    if is_main_process():
        print(f"{out}: step {result.step}, {result.bits_per_byte:.4f} bits per byte of validation text")
    print_note(f"next: {_generate_line(out, data.opening())}\n      titans-graph eval {shlex.quote(str(out))}")
    return 0


def _first_model(options: argparse.Namespace) -> tuple[Any, dict[str, Any] | None]:
    """The model to train, with random weights or those of ``--init``, and what the run notes of the latter."""
    from titans_graph import runtime
    from titans_graph.training.loop import print_note
    from titans_graph.training.start import first_weights

    values = settings(options.set)
    if options.spec is None and (values or options.init is None):
        raise UsageError("--set goes with a SPEC" if values else "name a SPEC, or with --init the run whose graph it is")
    model = None if options.spec is None else runtime.load(options.spec, **values)
    if options.init is None:
        return model, None
    if options.out is None:
        raise UsageError("--init starts a new run: say with --out where that is")
    out = Path(os.devnull) if options.fresh else options.out
    return first_weights(options.init, out, model, runtime.load, print_note)


def _generate_line(run: Path, opening: str) -> str:
    """A command that lets a run go on from words of its own text."""
    prompt = f" --prompt {shlex.quote(opening + ' ')}" if opening else ""
    return f"titans-graph generate {shlex.quote(str(run))}{prompt}"


def run_generate(options: argparse.Namespace) -> int:
    """The prompt and its continuation, as it comes."""
    from titans_graph.runtime.denormals import flushed
    from titans_graph.training.generate import generate

    model, _ = _trained(options.checkpoint)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    pieces = generate(
        model,
        options.prompt,
        tokens=options.tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        seed=options.seed,
    )
    print(options.prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace"), end="", flush=True)
    with flushed():
        for piece in pieces:
            print(piece, end="", flush=True)
    print()
    return 0


def run_eval(options: argparse.Namespace) -> int:
    """Bits per byte of a checkpoint and of the floors on the same bytes."""
    from tqdm import tqdm

    from titans_graph.runtime.denormals import flushed
    from titans_graph.tasks import text
    from titans_graph.tasks.floors import floors
    from titans_graph.training.evaluate import bits_per_byte, restart_of
    from titans_graph.training.folder import text_of
    from titans_graph.training.loop import print_note

    model, checkpoint = _trained(options.checkpoint)
    config = TrainConfig.from_plain(checkpoint.value("config"))
    data = text_of(checkpoint, print_note) if options.data is None else text.load(options.data)
    print_note(data.report)
    stretch = data.stretch(options.bytes)
    restart = restart_of(options.restart, config.length, bool(model.summary().grows))
    model.eval()
    device = next(model.parameters()).device
    with flushed(), tqdm(total=max(0, len(stretch) - 1), unit="B", unit_scale=True) as bar:
        value = bits_per_byte(model, stretch, restart=restart, device=device, progress=bar.update)
    how = f"state fresh every {restart} bytes" if restart else "one long stream"
    print(f"{model.name:<12} {value:.4f} bits per byte ({how}, step {checkpoint.step}, {len(stretch):,} bytes)")
    for name, floor in floors(data.train, stretch).rows():
        print(f"{name:<12} {floor:.4f}")
    return 0


def run_demo(options: argparse.Namespace) -> int:
    """Train two small models on the same text and compare them."""
    from titans_graph import runtime
    from titans_graph.tasks import text
    from titans_graph.training import demo
    from titans_graph.training.loop import print_note

    data = text.load(options.data)
    print_note(data.report)
    if options.fresh:
        demo.set_aside(options.out, print_note)
    result = demo.demo(
        runtime.load,
        data,
        options.out,
        minutes=options.minutes or demo.MINUTES,
        models=demo.MODELS,
        config=demo.CONFIG,
    )
    if result.signal:
        print_note("stopped; the same command goes on from there")
        return 128 + result.signal
    print(f"\n{demo.table(result, demo.CONFIG)}\n\nthe {result.rows[0].name} goes on after {result.prompt!r}:\n")
    print(f"{result.prompt}{result.sample}\n")
    print(f"loss curves: {options.out / 'loss.png'}\n{_next_steps(options.out / result.rows[0].name, data.opening())}")
    return 0


def _next_steps(run: Path, opening: str) -> str:
    from titans_graph.training import demo

    name = run.name
    sizes = " ".join(f"{key}={value}" for key, value in demo.MODELS[name].items())
    return (
        "where to look next\n"
        "  README.md                                      a tour of the project; docs/ has the rest\n"
        f"  titans-graph show {name} --set {sizes}\n"
        f"      the graph of the {name} that was just trained; with --code, the PyTorch code that is made from it\n"
        f"  {_generate_line(run, opening)}\n"
        f"  titans-graph eval {shlex.quote(str(run))}\n"
        "  titans-graph train mac --data YOUR_TEXT --out runs/mine"
    )


def _trained(path: Path) -> tuple[Any, Checkpoint]:
    """The model of a checkpoint on the best device there is, and the checkpoint."""
    import torch

    from titans_graph import runtime
    from titans_graph.training.checkpoint import find
    from titans_graph.training.loop import print_note

    checkpoint = find(path, print_note)
    model = checkpoint.model(runtime.load)
    if torch.cuda.is_available():
        model.to("cuda")
    return model, checkpoint


def _add_train(commands: Commands) -> None:
    train = command(
        commands,
        "train",
        "train a spec on text, byte by byte",
        "train mac --set dim=128 layers=2 --data my-texts/ --out runs/mac --steps 2000\n"
        "  titans-graph train --init runs/mac --data letters.txt --out runs/letters --learning-rate 3e-4\n"
        "  torchrun --nproc-per-node 2 -m titans_graph.cli train mac --out runs/mac",
        "A run in the same folder with the same settings goes on where it stopped.",
    )
    add_spec(train, needed=False)
    train.add_argument("--data", type=Path, metavar="PATH", help=DATA_HELP)
    train.add_argument("--out", type=Path, metavar="DIR", help="folder of the run (default: runs/NAME)")
    train.add_argument(
        "--init",
        type=Path,
        metavar="RUN",
        help="start from the weights of another run, or of one of its checkpoints, instead of random ones; SPEC may then be "
        "left out, or must be the same graph",
    )
    train.add_argument("--fresh", action="store_true", help="set an earlier run in that folder aside and start anew")
    for field in dataclasses.fields(TrainConfig):
        _add_setting(train, field)
    train.set_defaults(run=run_train)


def _add_setting(parser: argparse.ArgumentParser, field: dataclasses.Field[Any]) -> None:
    flag = f"--{field.name.replace('_', '-')}"
    text = f"{field.metadata['doc']} (default: {field.default}; {field.metadata['reason']})".replace("%", "%%")
    if field.default is False:
        parser.add_argument(flag, action="store_true", help=text)
    else:
        choices = field.metadata["choices"] or None
        metavar = None if choices else "N"
        parser.add_argument(flag, type=type(field.default), default=field.default, choices=choices, metavar=metavar, help=text)


def _add_generate(commands: Commands) -> None:
    generate = command(
        commands,
        "generate",
        "continue a prompt with a trained model",
        "generate runs/mac --prompt 'The first' --tokens 200",
    )
    generate.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="folder of a run, or of one of its checkpoints")
    generate.add_argument("--prompt", default="\n", metavar="TEXT", help="text to go on from (default: a newline)")
    generate.add_argument("--tokens", type=int, default=256, metavar="N", help="bytes to generate (default: 256)")
    generate.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest byte (default: 0.8)")
    generate.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest bytes; 0: from all (default)"
    )
    generate.add_argument("--seed", type=int, default=0, help="seed of the draws (default: 0)")
    generate.set_defaults(run=run_generate)


def _add_eval(commands: Commands) -> None:
    evaluate = command(commands, "eval", "measure a trained model in bits per byte, beside simple floors", "eval runs/mac")
    evaluate.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="folder of a run, or of one of its checkpoints")
    evaluate.add_argument(
        "--data",
        type=Path,
        metavar="PATH",
        help="a text file or a folder of text files, whose validation part is measured (default: the text that the run was "
        "trained on)",
    )
    evaluate.add_argument(
        "--bytes", type=at_least(0), default=262144, metavar="N", help="validation bytes; 0: all (default: 262144)"
    )
    evaluate.add_argument(
        "--restart",
        type=at_least(-1),
        default=-1,
        metavar="N",
        help="fresh state every N bytes; 0: never; -1 (default): never, or every training length where it grows",
    )
    evaluate.set_defaults(run=run_eval)


def _add_demo(commands: Commands) -> None:
    demo = command(
        commands, "demo", "train a small Titans and a transformer of the same size, in about three minutes", "demo --minutes 2"
    )
    demo.add_argument("--minutes", type=float, metavar="M", help="most time for both trainings together (default: 4)")
    demo.add_argument("--data", type=Path, metavar="PATH", help=DATA_HELP)
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="folder (default: runs/demo)")
    demo.add_argument("--fresh", action="store_true", help="start anew instead of going on with the demo in that folder")
    demo.set_defaults(run=run_demo)
