"""lw-fast demo: ask a question, see each LM answer from the text and from the latents."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from lw_fast.cli import Parser, add_settings, split_lm_flags
from lw_fast.config import FIELDS
from lw_fast.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from lw_fast.api import LatentPrompt

EXAMPLE = "/example"
QUIT = ("/quit", "/exit")
WELCOME = f"""\
Type a context and a question about it. Enter alone keeps the context before;
{EXAMPLE} takes a question of the evaluation set; {QUIT[0]} or Ctrl-D ends."""


def demo_parser() -> Parser:
    """The flags of launch/demo.py."""
    parser = Parser(
        prog="demo",
        usage="demo [--ckpt DIR] [--SETTING VALUE ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Ask questions and compare the answers from text and from latents.\n\n"
            "  python launch/demo.py --ckpt runs/first\n"
            "  printf 'Amy owns a red rug.\\nWhich thing does Amy own?\\n' | lw-fast demo\n\n"
            "Piped input is read as pairs of lines: a context, a question."
        ),
        epilog="frozen LMs:\n  --lm.NAME SOURCE   another source for an LM of the checkpoint",
    )
    parser.add_argument(
        "--ckpt", type=Path, metavar="DIR", help="run or checkpoint (default: the newest in runs/)"
    )
    parser.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to run"
    )
    add_settings(parser, ("eval", "adapter", "backbone"))
    return parser


def main(argv: Sequence[str]) -> None:
    """launch/demo.py: answers questions until the input ends."""
    argv, lms = split_lm_flags(argv)
    flags = vars(demo_parser().parse_args(argv))
    settings = {name: value for name, value in flags.items() if name in FIELDS}
    folder = flags["ckpt"] or newest_run(Path("runs"))
    from rich.console import Console

    from lw_fast.api import LatentPrompt

    lp = LatentPrompt.from_checkpoint(folder, device=flags["device"], lms=lms, **settings)
    console = Console()
    interactive = sys.stdin.isatty()
    if interactive:
        console.print(f"{folder}\n{WELCOME}", highlight=False, markup=False)
    answer(lp, "warm", "up?")  # so that the first question pays for no initialisation
    ask = _asker(console.input) if interactive else _piped(sys.stdin)
    for context, question in questions(ask, example_of(lp)):
        console.print(table_of(answer(lp, context, question)))


def newest_run(runs: Path) -> Path:
    """The run folder in `runs` that saved a checkpoint last."""
    saved = sorted(runs.glob("*/latest"), key=lambda path: path.stat().st_mtime)
    if not saved:
        raise UserError(
            f"no trained run in {runs}/: train one (`lw-fast train`, minutes), or name one with "
            "--ckpt DIR"
        )
    return saved[-1].parent


# ------------------------------------------------------------------------------- questions


Ask = Callable[[str], str | None]
"""Label -> the next line, stripped; None where the input ends."""


def _asker(read: Callable[[str], str]) -> Ask:
    def ask(label: str) -> str | None:
        try:
            return read(f"{label}> ").strip()
        except EOFError:
            return None

    return ask


def _piped(stream: TextIO) -> Ask:
    def ask(label: str) -> str | None:
        line = stream.readline()
        return line.strip() if line else None

    return ask


def questions(ask: Ask, example: Callable[[], tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """(context, question) pairs, until the input ends.

    Raises:
        UserError: it ends, or has an empty line, where a question is due.
    """
    previous = ""
    while (context := ask("context")) is not None and context not in QUIT:
        if context == EXAMPLE:
            previous, asked = example()
            yield previous, asked
            continue
        if not (context or previous):
            continue
        question = ask("question")
        if not question:
            raise UserError(f"a question must follow the context {context or previous!r:.60}")
        if question in QUIT:
            return
        previous = context or previous
        yield previous, question


def example_of(lp: LatentPrompt) -> Callable[[], tuple[str, str]]:
    """Gives another question of the evaluation set at each call."""

    def endless() -> Iterator[tuple[str, str]]:
        from lw_fast.model import evaluation_examples

        rows = evaluation_examples(lp.model.config)
        while True:
            for row in rows:
                yield row.context, row.question

    found = endless()
    return lambda: next(found)


# ------------------------------------------------------------------------------- answers


@dataclass(frozen=True, kw_only=True)
class LMAnswer:
    """One LM's answers to one question."""

    lm: str
    text: str
    text_tokens: int
    text_seconds: float
    latent: str
    latent_seconds: float


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What all LMs say, and what the latent prompt costs."""

    context: str
    question: str
    latent_len: int
    payload_bytes: int
    """Of Z in fp16."""
    text_bytes: int
    encode_seconds: float
    per_lm: tuple[LMAnswer, ...]


def answer(lp: LatentPrompt, context: str, question: str) -> Answer:
    """Asks every LM twice: with the text, and with the latents."""
    pairs = [(context, question)]
    z, encode_seconds = _timed(lp.encode, pairs)
    per_lm = []
    for name in lp.lms:
        (text,), text_seconds = _timed(lp.generate_from_text, name, pairs)
        (latent,), latent_seconds = _timed(lp.generate, name, z)
        per_lm.append(
            LMAnswer(
                lm=name,
                text=text,
                text_tokens=lp.text_tokens(name, pairs)[0],
                text_seconds=text_seconds,
                latent=latent,
                latent_seconds=latent_seconds,
            )
        )
    return Answer(
        context=context,
        question=question,
        latent_len=lp.latent_len,
        payload_bytes=z.payload_bytes // 2,
        text_bytes=len(f"{context}{question}".encode()),
        encode_seconds=encode_seconds,
        per_lm=tuple(per_lm),
    )


def _timed(work: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    started = time.perf_counter()
    result = work(*args)  # ends in strings or CPU tensors, so it has waited for the device
    return result, time.perf_counter() - started


def table_of(asked: Answer) -> Table:
    """Text and latent side by side, one row per LM."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=escape(asked.question),
        caption=(
            f"{asked.latent_len} latents ({asked.payload_bytes} bytes in fp16) for "
            f"{asked.text_bytes} bytes of text, encoded in {_ms(asked.encode_seconds)}"
        ),
    )
    table.add_column("LM")
    for column in ("from text", "tokens", "time", "from latents", "vectors", "time"):
        table.add_column(column, justify="left" if column.startswith("from") else "right")
    for row in asked.per_lm:
        table.add_row(
            row.lm, escape(row.text), str(row.text_tokens), _ms(row.text_seconds),
            escape(row.latent), str(asked.latent_len), _ms(row.latent_seconds),
        )  # fmt: skip
    return table


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms"
