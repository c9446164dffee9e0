"""The command line: whatever is wrong ends in exit code 2 and one readable line on stderr."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny

from lw_fast import checkpoint, cli
from lw_fast.config import FIELDS
from lw_fast.data import Example
from lw_fast.errors import UserError

ROOT = Path(__file__).parents[1]
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
ENV = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
ENV |= {"CUDA_VISIBLE_DEVICES": ""}  # the same everywhere


def flags(**values) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


SETTINGS = flags(
    latent_len=4, d_z=8, encoder_dim=8, encoder_heads=2, encoder_layers=1, adapter_dim=8,
    reader="qwen", reader_layers="0,2", batch_size=8, samples=8, eval_samples=4, epochs=1,
    warmup_steps=1, max_new_tokens=2, kinds="latent", log_every=1, chunk_size=8, device="cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory, lm_dirs, qa_file) -> dict[str, str]:
    """Names for the files and folders of the cases, good and bad."""
    here = tmp_path_factory.mktemp("cli")
    whole = qa_file.read_bytes()
    stray = [Example(f"q{i}", "Ada lives in Rome.", "Who?", ("Bob",), 0) for i in range(9)]
    files = {
        "empty.json": b"",
        "half.json": whole[: len(whole) // 2],
        "half.json.gz": gzip.compress(whole)[:-20],
        "list.json": b"[1, 2]",
        "other.json": b'{"version": "1", "rows": []}',
        "bytes.json": b'{"data": "\xff"}',
        "notes.txt": b"not a model",
        "bad.gguf": b"GGUF and nothing more",
        "broken.toml": b"latent_len = [",
        "typo.toml": b"latent_lem = 8",
        "broken_ds.json": b"{",
        "unknown_ds.json": b'{"zero_optimization": {"stage": 2}, "zeroo": 1}',
        "owned_ds.json": b'{"zero_optimization": {"stage": 2}, "train_batch_size": 8}',
        "stage0_ds.json": b'{"zero_optimization": {"stage": 0}}',
        "clash_ds.json": b'{"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}',
    }
    for name, content in files.items():
        (here / name).write_bytes(content)
    tiny.write_squad(here / "stray.json", stray)
    (here / "nothing").mkdir()
    (here / "thesis").mkdir()
    (here / "thesis" / "thesis.tex").write_text("years")
    weightless = Path(shutil.copytree(lm_dirs["qwen"], here / "weightless"))
    (weightless / "model.safetensors").unlink()
    return {"here": str(here), "qa": str(qa_file), **lm_dirs}


def base(place) -> list[str]:
    """A training that works: two steps of a tiny pair."""
    lms = ["--lm.llama", place["llama"], "--lm.qwen", place["qwen"]]
    return [*lms, *flags(dataset=place["qa"], eval_dataset=place["qa"]), *SETTINGS]


# Name -> (command, arguments, what the line says). {here} and the like are places; BASE stands for
# a training that works, so that the rest is all that is wrong.
CASES: dict[str, tuple[str, str, str]] = {
    # flags and presets
    "unknown flag": ("train", "--latent_lem 8", "unrecognized arguments: --latent_lem 8"),
    "abbreviated flag": ("train", "--latent_l 8", "unrecognized arguments: --latent_l 8"),
    "stray word": ("train", "nano", "unrecognized arguments: nano"),
    "flag without value": ("train", "--epochs", "argument --epochs: expected one argument"),
    "not a number": ("train", "--epochs many", "argument --epochs: invalid int value: 'many'"),
    "not a choice": ("train", "--encoder_type cnn", "argument --encoder_type: invalid choice"),
    "not a bool": ("train", "--span_head maybe", "span_head must be a bool, got 'maybe'"),
    "unknown preset": ("train", "--preset nanno", "unknown preset 'nanno'; there are .*nano"),
    "missing preset file": ("train", "--preset {here}/none.toml", "No such file"),
    "broken preset file": ("train", "--preset {here}/broken.toml", "preset .*broken.toml: "),
    "preset with a typo": ("train", "--preset {here}/typo.toml", "did you mean latent_len"),
    "M of 0": ("train", "--latent_len 0", "latent_len must be greater than 0, got 0"),
    "M below 0": ("train", "--latent_len -3", "latent_len must be greater than 0, got -3"),
    "d_z of 0": ("train", "--d_z 0", "d_z must be greater than 0, got 0"),
    "batch of 0": ("train", "--batch_size 0", "batch_size must be greater than 0, got 0"),
    "too many copy slots": ("train", "--copy_slots 99", "must not exceed latent_len"),
    "heads that do not divide": ("train", "--encoder_heads 3", "must be a multiple"),
    "learning rate nan": ("train", "--lr nan", "lr must not be negative, got nan"),
    "beta of 1": ("train", "--beta2 1", "beta2 must be at least 0 and below 1"),
    "unknown kind of prompt": ("train", "--kinds txt --run_dir {here}/new", "kinds must name some"),
    "timeout of 0": ("train", "--timeout_seconds 0", "timeout_seconds must be greater than 0"),
    "no GPU": ("train", "--device cuda --run_dir {here}/new", "finds 0 GPUs"),
    # models
    "lm without source": ("train", "--lm.llama", "--lm.llama needs a name and a source"),
    "lm without name": ("train", "--lm. x", "needs a name and a source"),
    "lm with a bad name": ("train", "--lm.a-b x", "needs a name and a source"),
    "missing model": ("train", "BASE --lm.llama ./none", "lm.llama: no such model folder: ./none"),
    "missing gguf": ("train", "BASE --lm.llama {here}/none.gguf", "lm.llama: no such file"),
    "file that is no model": ("train", "BASE --lm.llama {here}/notes.txt", "not a .gguf model"),
    "gguf that is no model": ("train", "BASE --lm.llama {here}/bad.gguf", "not a readable GGUF"),
    "folder without a model": ("train", "BASE --lm.llama {here}/nothing", "lm.llama: "),
    "model without weights": ("train", "BASE --lm.llama {here}/weightless", "cannot load"),
    "hub name, offline": ("train", "BASE --lm.llama nobody/nothing", "lm.llama: "),
    "unknown random shape": ("train", "BASE --lm.llama random:gpt", "random:gpt is unknown"),
    "unknown reader": ("train", "BASE --reader ./none", "lm.reader: no such model folder"),
    "layers out of range": ("train", "BASE --reader_layers 0,7", "is outside 0..2 of qwen"),
    # DeepSpeed configs
    "ds: missing": ("train", "BASE --ds_config {here}/none.json", "cannot read ds_config"),
    "ds: not JSON": ("train", "BASE --ds_config {here}/broken_ds.json", "is not JSON"),
    "ds: unknown key": ("train", "BASE --ds_config {here}/unknown_ds.json", "unknown key zeroo"),
    "ds: trainer's key": ("train", "BASE --ds_config {here}/owned_ds.json", "with --batch_size"),
    "ds: stage 0": ("train", "BASE --ds_config {here}/stage0_ds.json", "stage must be 1, 2 or 3"),
    "ds: contradiction": ("train", "BASE --ds_config {here}/clash_ds.json", "needs stage 3, but"),
    # data
    "data: missing": ("train", "BASE --dataset {here}/none.json", "no such data file"),
    "data: empty": ("train", "BASE --dataset {here}/empty.json", "the file is empty"),
    "data: truncated": ("train", "BASE --dataset {here}/half.json", "not valid JSON, perhaps"),
    "data: truncated gzip": ("train", "BASE --dataset {here}/half.json.gz", "truncated gzip"),
    "data: a list": ("train", "BASE --dataset {here}/list.json", "not SQuAD layout"),
    "data: other layout": ("train", "BASE --dataset {here}/other.json", "not SQuAD layout"),
    "data: not text": ("train", "BASE --dataset {here}/bytes.json", "not UTF-8"),
    "data: answers elsewhere": (
        "train", "BASE --dataset {here}/stray.json", "the answers of 9 of 9 questions do not occur",
    ),
    "data: bad evaluation set": ("train", "BASE --eval_dataset {here}/half.json", "not valid JSON"),
    "data: no evaluation set": (
        "train", "--dataset {qa} --run_dir {here}/new", "eval_dataset is needed",
    ),
    "batch larger than the data": ("train", "BASE --batch_size 9", "batch_size 9 exceeds the 8"),
    # run folders
    "folder of another run": ("train", "BASE --run_dir {here}/run", "pass --resume or --overwrite"),
    "folder of something else": (
        "train", "BASE --run_dir {here}/thesis --overwrite", "something else than a run",
    ),
    "run_dir is a file": ("train", "BASE --run_dir {here}/notes.txt", "notes.txt"),
    "resume another configuration": (
        "train", "--run_dir {here}/run --resume --lr 1", "cannot change lr .* use --init_from",
    ),
    "resume with another preset": (
        "train", "--run_dir {here}/run --resume --preset nano", "--resume cannot change ",
    ),
    "resume what is not there": ("train", "--run_dir {here}/no --resume", "is not a run or checkp"),
    "resume without a folder": ("train", "--resume", "--resume needs --run_dir"),
    "resume a finished run": ("train", "--run_dir {here}/run --resume", "nothing to resume"),
    "resume and overwrite": ("train", "--run_dir {here}/run --resume --overwrite", "contradict"),
    "resume and init_from": (
        "train", "--run_dir {here}/run --resume --init_from {here}/run", "contradict",
    ),
    "damaged settings": ("train", "--run_dir {here}/damaged --resume", "config.json is damaged"),
    "init_from nothing": ("train", "BASE --init_from {here}/none", "no such folder"),
    "init_from another model": ("train", "BASE --init_from {here}/run --d_z 16", "does not fit"),
    "init_from truncated": (
        "train", "BASE --init_from {here}/torn/epoch1", r"encoder.pt has \d+ bytes instead of",
    ),
    "not finite": ("train", "BASE --lr 1e30 --epochs 9 --max_grad_norm 0", "not finite near"),
    # evaluation
    "eval: no checkpoint named": ("eval", "", "required: --ckpt"),
    "eval: missing": ("eval", "--ckpt {here}/none", "no such folder"),
    "eval: not a run": ("eval", "--ckpt {here}/thesis", "holds no complete checkpoint"),
    "eval: truncated": ("eval", "--ckpt {here}/torn/epoch1", "encoder.pt has .* bytes instead of"),
    "eval: altered": ("eval", "--ckpt {here}/altered/epoch1", "encoder.pt is damaged: its"),
    "eval: other adapter": ("eval", "--ckpt {here}/run --adapter_dim 9", "does not fit these"),
    "eval: other LM": ("eval", "--ckpt {here}/run --lm.smol {llama}", "has no adapter for smol"),
    "eval: LM of another width": (
        "eval", "--ckpt {here}/run --lm.llama {qwen}", "does not fit these settings",
    ),
    "eval: unknown kind": ("eval", "--ckpt {here}/run --kinds txt", "kinds must name some"),
    "eval: training flag": ("eval", "--ckpt {here}/run --lr 1", "unrecognized arguments: --lr 1"),
    "eval: bad data": ("eval", "--ckpt {here}/run --eval_dataset {here}/empty.json", "is empty"),
    "eval: out_dir is a file": (
        "eval", "--ckpt {here}/run --out_dir {here}/notes.txt", "cannot write into .*notes.txt",
    ),
}  # fmt: skip
# Said after notes about what is being done.
LATE = {"gguf that is no model", "resume a finished run", "init_from another model", "not finite"}
GOOD = {
    "train": ("train", "BASE --run_dir {here}/run"),
    "eval of a run": ("eval", "--ckpt {here}/run --out_dir {here}/eval1"),
    "eval of an epoch": (
        "eval", "--ckpt {here}/run/epoch1 --kinds text,latent --samples 2 --device cpu",
    ),
    "failed starts are forgotten": ("train", "BASE --run_dir {here}/again"),
    "overwrite": ("train", "BASE --run_dir {here}/again --overwrite"),
    "more epochs": ("train", "--run_dir {here}/again --resume --epochs 2"),
}  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(place) -> dict[str, tuple[int, str, str]]:
    """Exit code, stdout and stderr of every case, from two processes."""
    here = Path(place["here"])

    def argv(text: str, number: int) -> list[str]:
        words = text.format(**place).split()
        if words[:1] != ["BASE"]:
            return words
        folder = [] if "--run_dir" in words else ["--run_dir", str(here / f"run{number}")]
        return [*base(place), *folder, *words[1:]]

    def outcome(cases: dict) -> dict:
        listed = [(c[0], argv(c[1], i)) for i, c in enumerate(cases.values())]
        (here / "cases.json").write_text(json.dumps(listed))
        worker = Path(__file__).with_name("cli_worker.py")
        command = [sys.executable, str(worker), str(here / "cases.json"), str(here / "out.json")]
        env = ENV | {"LW_FAST_CACHE": str(here / "cache")}
        subprocess.run(command, check=True, env=env, timeout=200)
        return dict(zip(cases, json.loads((here / "out.json").read_text()), strict=True))

    good = outcome(GOOD)
    for name in ("torn", "altered", "damaged"):
        shutil.copytree(here / "run", here / name)
    path = here / "torn" / "epoch1" / "encoder.pt"
    path.write_bytes(path.read_bytes()[:-100])
    path = here / "altered" / "epoch1" / "encoder.pt"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    (here / "damaged" / "config.json").write_text("{")
    return good | outcome(CASES)


@pytest.mark.parametrize("name", list(CASES))
def test_mistakes(outcomes, name):
    """Exit code 2, one line on stderr, nothing on stdout, no traceback."""
    code, stdout, stderr = outcomes[name]
    lines = stderr.splitlines()
    assert code == cli.EXIT_USER_ERROR == 2, stderr
    assert lines and re.search(CASES[name][2], lines[-1]), stderr
    assert lines[-1].startswith("error: ") and "Traceback" not in stderr
    if name not in LATE:
        assert len(lines) == 1, stderr
        assert stdout == ""
    assert sum(line.startswith("error: ") for line in lines) == 1


@pytest.mark.parametrize("name", list(GOOD))
def test_commands_that_work(outcomes, name):
    """The same flags without the mistake; stderr holds notes, no warning of any library."""
    code, stdout, stderr = outcomes[name]
    assert code == 0, stderr
    assert re.search("run folder: |written to ", stdout)
    for line in stderr.splitlines():
        assert re.match("data: |PlainEngine on 1 x cpu|resumed ", line), line


def test_mistakes_lose_nothing(outcomes, place):
    """After all those tries the first run, and the folder of something else, are as they were."""
    here = Path(place["here"])
    assert checkpoint.latest(here / "run") == here / "run" / "epoch1"
    assert len((here / "run" / "log.jsonl").read_text().splitlines()) == 1
    assert [path.name for path in (here / "thesis").iterdir() if path.name != ".lock"] == [
        "thesis.tex"
    ]
    assert not (here / "new").exists() or not list((here / "new").glob("*/state.pt"))


def test_evaluations_lie_where_they_should(outcomes, place):
    here = Path(place["here"])
    kinds = json.loads((here / "eval1" / "metrics.json").read_text())
    assert "latent" in kinds and "text" not in kinds and kinds["samples"] == 4
    # --samples means questions to evaluate here, as in the original.
    metrics = json.loads((here / "run" / "eval_epoch1" / "metrics.json").read_text())
    assert "text" in metrics and metrics["samples"] == 2


def test_more_epochs_continue_the_run(outcomes, place):
    here = Path(place["here"])
    rows = [json.loads(line) for line in (here / "again" / "log.jsonl").open()]
    assert [row["step"] for row in rows] == [1, 2]
    assert json.loads((here / "again" / "config.json").read_text())["epochs"] == 2


# ------------------------------------------------------------------------------- Ctrl-C


def test_ctrl_c_saves_and_exits(tmp_path, place):
    """A real process: exit code 130, a complete checkpoint, no traceback, and it can go on."""
    command = [sys.executable, str(ROOT / "launch" / "train.py"), *base(place)]
    command += flags(run_dir=tmp_path / "run", epochs=100_000, save_every=0)
    process = subprocess.Popen(command, env=ENV, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    log, deadline = tmp_path / "run" / "log.jsonl", time.monotonic() + 60
    while not log.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=60)[1].decode()
    assert process.returncode == cli.EXIT_INTERRUPTED == 130, stderr
    assert "Traceback" not in stderr
    assert re.search(r"stopped after step \d+; --resume continues", stderr)
    saved = checkpoint.load(checkpoint.latest(tmp_path / "run"))
    assert saved.progress["global_step"] >= 1


# ------------------------------------------------------------------------------- flags


def test_every_setting_is_a_flag_with_its_help():
    """And --help shows each default, unless argparse prints it as a choice."""
    text = " ".join(cli.train_parser().format_help().split())
    for name, (_, spec) in FIELDS.items():
        assert f"--{name} " in text, name
        assert " ".join(spec.metadata["help"].split()) in text, name
    for name in ("--preset", "--ds_config", "--run_dir", "--resume", "--overwrite", "--init_from"):
        assert name in text
    assert "--local_rank" not in text  # the launcher's business


def test_only_given_flags_become_settings():
    """A default in a parser would override the preset."""
    given = vars(cli.train_parser().parse_args(["--d_z", "8", "--span_head", "false"]))
    assert {n: v for n, v in given.items() if n in FIELDS} == {"d_z": 8, "span_head": "false"}
    given = vars(cli.eval_parser().parse_args(["--ckpt", "x", "--prefix_gain", "2"]))
    assert {n: v for n, v in given.items() if n in FIELDS} == {"prefix_gain": 2.0}


def test_lm_flags():
    rest, lms = cli.split_lm_flags(
        ["--lm.a", "x/y", "--epochs", "3", "--lm.b=./m.gguf", "--lm.c", "random:s@t"]
    )
    assert rest == ["--epochs", "3"]
    assert lms == {"a": "x/y", "b": "./m.gguf", "c": "random:s@t"}
    for words in (["--lm.a"], ["--lm.a", "--epochs"], ["--lm.a="], ["--lm.", "x"]):
        with pytest.raises(UserError, match="needs a name and a source"):
            cli.split_lm_flags(words)


def test_load_4bit_is_nf4(monkeypatch):
    from lw_fast import model, run_folder

    seen = {}
    monkeypatch.setattr(run_folder, "resolve_checkpoint", lambda path: path)
    monkeypatch.setattr(
        model,
        "load_model",
        lambda path, device, overrides, *_, **__: seen.update(overrides) or 1 / 0,
    )
    with pytest.raises(ZeroDivisionError):
        cli.eval_main(["--ckpt", "x", "--load_4bit", "--samples", "5", "--out_dir", "/tmp"])
    assert seen == {"backbone_dtype": "nf4", "eval_samples": 5}


def test_default_run_dir():
    class World:
        all_gather = staticmethod(lambda value: [value])

    path = cli._default_run_dir("presets/mine.toml", World())
    assert re.fullmatch(r"runs/mine-\d{8}-\d{6}", str(path))


@pytest.mark.parametrize(("argv", "code"), [([], 2), (["--help"], 0), (["-h"], 0), (["tarin"], 2)])
def test_the_command_lists_its_parts(monkeypatch, capsys, argv, code):
    monkeypatch.setattr(sys, "argv", ["lw-fast", *argv])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == code
    captured = capsys.readouterr()
    assert "usage: lw-fast train|eval" in captured.err + captured.out


def test_the_command_runs_its_parts(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "argv", ["lw-fast", "train", "--epochs", "3"])
    monkeypatch.setattr(cli, "run", lambda command, argv: seen.append((command, argv)) or 7)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 7 and seen == [(cli.train_main, ["--epochs", "3"])]


def test_an_interrupt_anywhere_is_no_traceback(monkeypatch, capsys):
    monkeypatch.setattr(cli, "_quiet", lambda: None)

    def interrupted(argv):
        raise KeyboardInterrupt

    assert cli.run(interrupted, []) == 130
    assert capsys.readouterr().err == "stopped\n"


def test_an_error_of_several_lines_becomes_one(monkeypatch, capsys):
    monkeypatch.setattr(cli, "_quiet", lambda: None)

    def wrong(argv):
        raise UserError("first\n\tsecond")

    assert cli.run(wrong, []) == 2
    assert capsys.readouterr().err == "error: first second\n"
