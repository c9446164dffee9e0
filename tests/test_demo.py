"""The demo: questions in, two answers per LM out."""

from __future__ import annotations

import io
import sys

import pytest
import tiny

from lw_fast import cli, demo
from lw_fast.api import LatentPrompt
from lw_fast.engine import World
from lw_fast.errors import UserError
from lw_fast.train import train


def no_example():
    raise AssertionError


def asked(*lines: str, example=no_example) -> list[tuple[str, str]]:
    rest = iter(lines)
    return list(demo.questions(lambda _label: next(rest, None), example))


def test_pairs_of_lines():
    assert asked("c1", "q1", "c2", "q2") == [("c1", "q1"), ("c2", "q2")]
    assert asked() == []


def test_an_empty_context_keeps_the_last_one():
    assert asked("", "c", "q1", "", "q2") == [("c", "q1"), ("c", "q2")]


def test_an_example_becomes_the_context():
    assert asked("/example", "", "q", example=lambda: ("c", "e")) == [("c", "e"), ("c", "q")]


@pytest.mark.parametrize("word", demo.QUIT)
def test_quit(word):
    assert asked("c", "q", word, "x") == [("c", "q")]
    assert asked("c", word, "x") == []


@pytest.mark.parametrize("lines", [("c",), ("c", ""), ("c", "q", "")])
def test_a_missing_question_is_told(lines):
    with pytest.raises(UserError, match="a question must follow the context 'c'"):
        asked(*lines)


def test_an_answer_counts_what_it_compares():
    lp = LatentPrompt(tiny.latent_model())
    e = tiny.examples(1)[0]
    found = demo.answer(lp, e.context, e.question)
    assert [row.lm for row in found.per_lm] == ["llama", "qwen"]
    assert found.latent_len == 6 and found.payload_bytes == 2 * 6 * 16
    z = lp.encode([(e.context, e.question)])
    for row in found.per_lm:
        assert [row.latent] == lp.generate(row.lm, z)
        assert row.text_tokens > 10 and row.text_seconds > 0 < row.latent_seconds


def test_the_table_shows_markup_as_it_is():
    from rich.console import Console

    row = demo.LMAnswer(
        lm="qwen", text="[b]x[/b]", text_tokens=7, text_seconds=0.1,
        latent="[/]", latent_seconds=0.2,
    )  # fmt: skip
    found = demo.Answer(
        context="c", question="[red]?", latent_len=4, payload_bytes=8, text_bytes=5,
        encode_seconds=0.01, per_lm=(row,),
    )  # fmt: skip
    console = Console(file=io.StringIO(), width=100)
    console.print(demo.table_of(found))
    shown = console.file.getvalue()
    assert all(text in shown for text in ("[red]?", "[b]x[/b]", "[/]", "100 ms", "200 ms"))


@pytest.fixture
def run_dir(tmp_path, lm_dirs, qa_file):
    files = dict(dataset=str(qa_file), eval_dataset=str(qa_file), samples=8, eval_samples=2)
    world = World(rank=0, local_rank=0, size=1, device=tiny.CPU)
    config = tiny.config(**files, lm=lm_dirs, kinds="latent", epochs=1)
    train(config, world, tmp_path / "runs" / "first")
    return tmp_path / "runs" / "first"


def test_piped_questions_and_the_newest_run(run_dir, monkeypatch, capsys):
    """Without --ckpt, the newest run in runs/."""
    monkeypatch.chdir(run_dir.parent.parent)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Ada is here.\nWho?\n/example\n"))
    assert cli.run(cli.COMMANDS["demo"], ["--max_new_tokens", "2", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert out.count("from latents") == 2 and "Who?" in out
    assert "context>" not in out and "Type a context" not in out


def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for argv, word in (
        ([], "no trained run in runs/"),
        (["--ckpt", "nowhere"], "no such folder"),
        (["--latent_len", "3"], "unrecognized"),
    ):
        assert cli.run(cli.COMMANDS["demo"], argv) == cli.EXIT_USER_ERROR
        err = capsys.readouterr().err
        assert word in err and err.count("\n") == 1
