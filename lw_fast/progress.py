"""What a run shows on the terminal: a bar with rates and ETA, notes, and result tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

COLUMNS = ("LM", "prompt", "EM", "F1", "NLL/token", "FirstTok@1", "FirstTok@5")


class Progress:
    """A progress bar over optimiser steps; plain lines where there is no terminal."""

    def __init__(self, total: int, done: int, *, enabled: bool) -> None:
        self.console = Console(quiet=not enabled, soft_wrap=True)
        self.total = total
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rates]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not (enabled and self.console.is_terminal),
        )
        self._task = self._bar.add_task("training", total=total, completed=done, rates="")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, step: int, row: Mapping[str, Any]) -> None:
        """Shows the newest row of the log."""
        hits = " ".join(
            f"{key.split('/')[0]} {value:.2f}"
            for key, value in row.items()
            if key.endswith("first_token_top1")
        )
        rates = (
            f"loss {row['loss']:.3f}  first token right: {hits}  {row['samples/s']:.0f} samples/s  "
            f"{row['positions/s']:.0f} positions/s"
        )
        self._bar.update(self._task, completed=step, rates=rates)
        if self._bar.disable:
            left = (self.total - step) * row["seconds_per_step"]
            self.note(f"step {step}/{self.total}  {rates}  ETA {left:.0f} s")

    def note(self, text: str) -> None:
        """One line above the bar."""
        self.console.print(text, highlight=False)

    def table(self, title: str, rows: Sequence[Sequence[str]]) -> None:
        """The result table of one evaluation."""
        print_table(self.console, title, rows)


def print_table(console: Console, title: str, rows: Sequence[Sequence[str]]) -> None:
    """EM, F1, NLL/token and first-token accuracy per LM and prompt kind."""
    table = Table(*COLUMNS, title=title)
    for i, row in enumerate(rows):
        last_of_lm = i + 1 == len(rows) or rows[i + 1][0] != row[0]
        table.add_row(*row, end_section=last_of_lm)
    console.print(table)
