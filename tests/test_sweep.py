"""Sweeps: points, folder, queue and the command line."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import sys
import threading
import time
import tomllib
from pathlib import Path

import pytest

from benchmarks import sweep_rows
from benchmarks.rows import read_rows
from lw_fast import cli, sweep_queue
from lw_fast.config import build_config, from_dict, to_dict
from lw_fast.errors import UserError
from lw_fast.run_results import read_run
from lw_fast.sweep import table_of
from lw_fast.sweep_folder import csv_rows, open_sweep, read_sweep, write_csv
from lw_fast.sweep_points import build_points, drawn, grid, listed, to_toml, with_seeds
from lw_fast.sweep_queue import Job, Queue, StopRule, new_jobs, visible_devices
from lw_fast.sweep_worker import Worker

STUB = (sys.executable, str(Path(__file__).with_name("sweep_stub.py")))


def points(*words: str, **overrides):
    return build_points(grid(words), "nano", overrides, {})


def names(made) -> list[str]:
    return [point.name for point in made]


# ------------------------------------------------------------------------------- points


def test_a_grid_is_every_combination():
    made = points("latent_len=8,16", "d_z=64,128")
    assert names(made) == [f"latent_len={m},d_z={d}" for m in (8, 16) for d in (64, 128)]
    assert (made[3].config.encoder.latent_len, made[3].config.encoder.d_z) == (16, 128)


def test_values_are_told_apart_by_what_they_mean():
    assert names(points("latent_len=8,08", "span_head=true,yes,TRUE")) == [
        "latent_len=8,span_head=true"
    ]


def test_lms_are_an_axis_too():
    made = points("lm.qwen=nano:qwen,random:qwen2.5-0.5b")
    assert [dict(p.config.lm)["qwen"] for p in made] == ["nano:qwen", "random:qwen2.5-0.5b"]
    assert all(p.config.lm["llama"] == "nano:llama" for p in made)
    assert made[0].name.startswith("lm.qwen=nano_qwen-") and len(set(names(made))) == 2


def test_names_are_folder_names():
    made = points("eval_dataset=/a/b.json", "reader=../x")[0]
    assert (
        "/" not in made.name
        and made.name == points("eval_dataset=/a/b.json", "reader=../x")[0].name
    )
    long = points(f"eval_dataset={'x' * 300}")[0]
    assert len(long.name) < 120


def test_a_list_of_points():
    made = build_points(
        listed(["latent_len=8 reader_layers=0,2", "latent_len=4 reader_layers=1"]), "nano", {}, {}
    )
    assert made[0].config.encoder.reader_layers == "0,2" and len(made) == 2


def test_a_draw_grows_with_its_number():
    values = grid(["latent_len=1,2,3,4,5,6", "d_z=8,16"])
    few, more = drawn(values, 3, seed=1), drawn(values, 6, seed=1)
    assert len(few) == 3 and all(point in more for point in few)
    assert drawn(values, 3, seed=1) == few != drawn(values, 3, seed=2)


def test_seeds():
    assert with_seeds([{"d_z": "8"}], [1, 2]) == [
        {"d_z": "8", "seed": "1"},
        {"d_z": "8", "seed": "2"},
    ]
    assert with_seeds([{"d_z": "8"}], []) == [{"d_z": "8"}]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["latent_lem=8"], "unknown setting 'latent_lem'; did you mean latent_len"),
        (["latent_len"], "write NAME=VALUE"),
        (["latent_len="], "write NAME=VALUE"),
        (["latent_len=,"], "no value"),
        (["d_z=8", "d_z=16"], "twice"),
        (["latent_len=8,x"], r"must be a int.*\(in the point latent_len=x\)"),
        (["latent_len=0"], "greater than 0"),
        (["encoder_type=bytes"], "must be one of"),
        (["lm.a b=x"], "cannot have this name"),
    ],
)
def test_a_point_that_cannot_be(words, message):
    with pytest.raises(UserError, match=message):
        points(*words)


def test_other_refusals():
    with pytest.raises(UserError, match="d_z: both an axis"):
        points("d_z=8", d_z=16)
    with pytest.raises(UserError, match="only 2 points"):
        drawn(grid(["d_z=8,16"]), 3, seed=0)
    with pytest.raises(UserError, match="contradict"):
        with_seeds([{"seed": "1"}], [2])
    with pytest.raises(UserError, match="same settings"):
        listed(["d_z=8", "latent_len=8"])
    with pytest.raises(UserError, match="each setting once"):
        listed(["d_z=8 d_z=9"])


def test_a_preset_of_a_point_repeats_it(tmp_path):
    config = build_config("nano", {"lr": 1e-5, "eval_dataset": 'a "b"\\c'}, {"one": "nano:qwen"})
    path = tmp_path / "p.toml"
    path.write_text(to_toml(config))
    values = tomllib.loads(path.read_text())
    assert from_dict(values) == config == build_config(str(path)) and values == to_dict(config)


# ------------------------------------------------------------------------------- folder


def test_points_are_added_to_a_sweep(tmp_path):
    open_sweep(tmp_path / "s", points("latent_len=8,16", "d_z=64"))
    grown = open_sweep(tmp_path / "s", points("d_z=64,128", "latent_len=16"))
    assert list(grown.points) == [
        f"latent_len={m},d_z={d}" for m, d in ((8, 64), (16, 64), (16, 128))
    ]
    again = read_sweep(tmp_path / "s")
    assert again == grown == open_sweep(tmp_path / "s", [])
    assert again.points["latent_len=16,d_z=128"].config.encoder.d_z == 128


def test_another_sweep_is_refused(tmp_path):
    open_sweep(tmp_path, points("latent_len=8"))
    with pytest.raises(UserError, match="sweep over latent_len, not over d_z"):
        open_sweep(tmp_path, points("d_z=8"))
    with pytest.raises(UserError, match=r"from other settings \(epochs \d+ -> 3\)"):
        open_sweep(tmp_path, points("latent_len=16", epochs=3))
    with pytest.raises(UserError, match=r"lr [.0-9]+ -> 0.1"):
        open_sweep(tmp_path, points("latent_len=8", lr=0.1))


def test_other_folders_are_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="something else than a sweep"):
        open_sweep(tmp_path, points("latent_len=8"))
    with pytest.raises(UserError, match="not a sweep folder"):
        read_sweep(tmp_path)
    for text in (
        "{",
        '{"format": 1}',
        '{"format": 1, "axes": [], "base": {"lm": 1}, "points": [{}]}',
    ):
        (tmp_path / "sweep.json").write_text(text)
        with pytest.raises(UserError, match="sweep.json"):
            read_sweep(tmp_path)
    (tmp_path / "sweep.json").write_text('{"format": 2}')
    with pytest.raises(UserError, match="format 2"):
        read_sweep(tmp_path)


# ------------------------------------------------------------------------------- queue


def run_queue(folder: Path, lrs: str, *, devices=("cpu",), rule=None):
    """(jobs, what on_change saw) of a sweep of stubs."""
    sweep = open_sweep(folder, points(f"lr={lrs}", epochs=2))
    jobs, seen = new_jobs(sweep, {}, again=False), []

    def on_change(jobs):
        seen.append([job.state for job in jobs])

    Queue(sweep, jobs, devices, rule=rule, on_change=on_change, command=STUB).run()
    return sweep, jobs, seen


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(sweep_queue, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(sweep_queue, "CHECK_SECONDS", 0.05)


def test_failures_are_tried_once_more_and_recorded(tmp_path, quick):
    sweep, jobs, _ = run_queue(tmp_path, "1,2,3")
    assert [(job.state, job.tries) for job in jobs] == [
        ("finished", 1),
        ("failed", 2),
        ("finished", 2),
    ]
    assert jobs[1].error == "exit status 2: error: told to fail" and not jobs[2].error
    assert sweep.log("lr=2.0").read_text().count("told to fail") == 2
    assert "--overwrite" in sweep.log("lr=3.0").read_text().splitlines()[2]


def test_finished_runs_are_not_repeated(tmp_path, quick):
    run_queue(tmp_path, "1")
    sweep, jobs, _ = run_queue(tmp_path, "1,3")
    assert [job.tries for job in jobs] == [0, 2]
    assert sweep.log("lr=1.0").read_text().count("flags") == 1


def test_a_worker_trains_point_after_point_until_one_fails(tmp_path, quick):
    """The LMs stay in memory; a process in which something went wrong is not trusted again."""
    sweep, jobs, _ = run_queue(tmp_path, "1,1.5,3,1.25")
    assert [job.state for job in jobs] == ["finished"] * 4
    logs = [sweep.log(job.name).read_text() for job in jobs]
    first, second, failing, last = (re.findall(r"pid (\d+)", log) for log in logs)
    assert first == second == failing[:1] and failing[1:] == last != first


def test_a_worker_that_died_between_points_is_replaced(tmp_path, quick):
    sweep = open_sweep(tmp_path, points("lr=1", epochs=2))
    queue = Queue(sweep, new_jobs(sweep, {}, again=False), ["cpu"], command=STUB)
    dead = queue.workers["cpu"] = Worker("cpu", tmp_path / "log.txt", STUB)
    dead.close(kill=True)
    queue.run()
    assert [(job.state, job.tries) for job in queue.jobs] == [("finished", 1)]


def test_one_run_per_device(tmp_path, quick):
    sweep, jobs, seen = run_queue(tmp_path, "1,3,2", devices=("0", "7"))
    assert max(states.count("running") for states in seen) == 2
    logs = [sweep.log(job.name).read_text() for job in jobs]
    used = {device for log in logs for device in re.findall(r"gpus '(\d)'", log)}
    assert used == {"0", "7"}
    assert "gpus '0'" in logs[0]


def test_hopeless_runs_are_stopped(tmp_path, quick):
    sweep, jobs, _ = run_queue(tmp_path, "1,4", rule=StopRule(ratio=0.5, at=0.5))
    assert [job.state for job in jobs] == ["finished", "stopped"] and jobs[1].tries == 1
    assert jobs[1].error == "hopeless at 50%: first token 0.100, the best run had 0.900"
    states = {job.name: {"state": job.state, "error": job.error} for job in jobs}
    assert [job.state for job in new_jobs(sweep, states, again=False)] == ["finished", "stopped"]
    assert [job.state for job in new_jobs(sweep, states, again=True)] == ["finished", "waiting"]


def test_the_rule(tmp_path, quick):
    sweep, _, _ = run_queue(tmp_path, "1")
    good = sweep.results("lr=1.0")
    assert StopRule(ratio=1.0, at=0.5).hopeless(good, [good]) == ""
    assert StopRule(ratio=1.0, at=0.5).hopeless(good, []) == ""
    assert StopRule(ratio=1.0, at=0.9).hopeless(good, [good]) == ""  # not there yet


def test_ctrl_c_saves_what_runs(tmp_path, quick):
    """SIGINT reaches the run, which ends by itself; nothing else starts."""
    sweep = open_sweep(tmp_path, points("lr=4,1", epochs=2))
    jobs = new_jobs(sweep, {}, again=False)

    def interrupt():
        deadline = time.monotonic() + 20
        while not (sweep.run_dir("lr=4.0") / "latest").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    # Where the tests themselves run in the background, SIGINT is ignored from the start.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            Queue(sweep, jobs, ["cpu"], command=STUB).run()
    finally:
        signal.signal(signal.SIGINT, before)
    assert [job.state for job in jobs] == ["interrupted", "waiting"]
    assert "told to stop" in sweep.log("lr=4.0").read_text()
    assert [job.state for job in new_jobs(sweep, {}, again=False)] == ["waiting", "waiting"]


def test_devices(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_devices("auto") == ["0", "1"] and visible_devices("cpu") == ["cpu"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-abc")
    assert visible_devices("cuda") == ["3", "GPU-abc"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert visible_devices("auto") == ["cpu"] and visible_devices("cuda") == []


# ------------------------------------------------------------------------------- tables


def test_the_csv_has_empty_cells_for_what_is_not_known(tmp_path, quick):
    sweep, jobs, _ = run_queue(tmp_path, "1,2")
    states = {job.name: {"state": job.state} for job in jobs}
    rows = list(csv.DictReader(write_csv(sweep, states).open()))
    assert [row["state"] for row in rows] == ["finished", "failed"]
    assert rows[0]["latent/qwen/f1"] == "0.5" and rows[1]["latent/qwen/f1"] == ""
    assert rows[0]["samples/s"] == "7.0" and "text/qwen/f1" not in rows[0]
    assert "latent/qwen/f1" not in csv_rows(sweep, states)[1]


def test_the_live_table(tmp_path, quick):
    import io

    from rich.console import Console

    sweep, jobs, _ = run_queue(tmp_path, "1,2")
    console = Console(file=io.StringIO(), width=120)
    console.print(table_of(sweep, [*jobs[:1], Job(name="lr=2.0")]))
    shown = console.file.getvalue()
    assert "0.500 0.500" in shown and "0.900" in shown and "waiting" in shown and "50%" in shown


def test_a_half_written_run_is_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(to_dict(build_config("nano"))))
    (tmp_path / "log.jsonl").write_text('{"step": 1, "epoch": 0.5}\n[1]\n{"step": 2, "ep')
    (tmp_path / "eval_epoch1").mkdir()
    (tmp_path / "eval_epoch1" / "metrics.json").write_text('{"a": ')
    run = read_run(tmp_path)
    assert len(run.rows) == 1 and run.metrics is None and not run.finished and not run.predictions()
    with pytest.raises(UserError, match="not a run folder"):
        read_run(tmp_path / "eval_epoch1")


# ------------------------------------------------------------------------------- command line


def sweep_cli(*argv: str) -> int:
    return cli.run(cli.COMMANDS["sweep"], list(argv))


def test_a_real_sweep_over_m_and_d_z(tmp_path, capsys):
    """2 x 2 on the nano pair: the first point alone, three more later, then rows and a page."""
    flags = ["--sweep_dir", str(tmp_path / "s"), "--device", "cpu"]
    settings = dict(
        samples=16, eval_samples=2, batch_size=8, epochs=1, log_every=1, kinds="latent",
        encoder_dim=16, encoder_heads=2, encoder_layers=1, adapter_dim=16, max_new_tokens=2,
    )  # fmt: skip
    flags += [f"--{name}={value}" for name, value in settings.items()]
    assert sweep_cli(*flags, "--grid", "latent_len=4", "d_z=8") == 0
    first = (tmp_path / "s" / "runs" / "latent_len=4,d_z=8" / "log.jsonl").stat()
    assert sweep_cli(*flags, "--grid", "latent_len=4,6", "d_z=8,16") == 0
    assert (tmp_path / "s" / "runs" / "latent_len=4,d_z=8" / "log.jsonl").stat() == first
    rows = list(csv.DictReader((tmp_path / "s" / "sweep.csv").open()))
    found = {(row["latent_len"], row["d_z"]): row for row in rows}
    assert len(found) == 4 and {row["state"] for row in rows} == {"finished"}
    assert found["4", "8"]["payload_bytes_fp16"] == "64.0"
    assert found["6", "16"]["payload_bytes_fp16"] == "192.0"
    out = capsys.readouterr().out
    assert "4 points, 1 of them done" in out and "finished latent_len=6,d_z=16" in out
    check_rows(tmp_path)
    argv = [str(tmp_path / "s"), "--out", str(tmp_path / "page.html")]
    assert cli.run(cli.COMMANDS["report"], argv) == 0
    heat_maps = list((tmp_path / "page_plots").glob("*-s--latent-f1--*.png"))
    assert len(heat_maps) == 3  # the mean, and each LM


def check_rows(folder: Path) -> None:
    """As rows: the finished points, with their axes."""
    sweep, made = folder / "s", folder / "rows.csv"
    (sweep / "runs" / "latent_len=4,d_z=16" / "eval_epoch1").rename(folder / "away")
    argv = [str(sweep), "--pair", "nano", "--set", "dev", "--command", "c", "--out", str(made)]
    assert cli.run(sweep_rows.main, argv) == 0
    points = {row["config"]["point"] for row in read_rows(made)}
    assert len(points) == 3 and "latent_len=4,d_z=16" not in points
    (folder / "away").rename(sweep / "runs" / "latent_len=4,d_z=16" / "eval_epoch1")
    assert cli.run(sweep_rows.main, argv) == 0
    rows = {(row["case"], row["metric"]): row for row in read_rows(made)}
    case = "pair=nano lm=qwen kind=latent set=dev protocol=clean latent_len=4 d_z=16"
    score = rows[f"{case} encoder=lm batch=8", "f1"]
    metrics = json.loads(
        (sweep / "runs" / "latent_len=4,d_z=16" / "eval_epoch1" / "metrics.json").read_text()
    )
    assert score["value"] == pytest.approx(metrics["latent"]["qwen"]["f1"], rel=1e-5)
    assert score["n"] == 2 and score["config"] == {"command": "c", "point": "latent_len=4,d_z=16"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "nothing to vary"),
        (["--grid", "latent_lem=8"], "did you mean latent_len?"),
        (["--grid", "d_z=8", "--list", "d_z=8"], "not both"),
        (["--grid", "d_z=8", "--seeds", "x"], "write numbers"),
        (["--grid", "d_z=8", "--stop_ratio", "2"], "--stop_ratio"),
        (["--grid", "d_z=8", "--preset", "nanno"], "unknown preset"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(tmp_path, capsys, argv, message):
    assert sweep_cli("--sweep_dir", str(tmp_path / "s"), *argv) == cli.EXIT_USER_ERROR
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not (tmp_path / "s").exists()


def test_settings_need_a_grid(tmp_path, capsys):
    open_sweep(tmp_path, points("d_z=8"))
    assert sweep_cli("--sweep_dir", str(tmp_path), "--epochs", "3") == cli.EXIT_USER_ERROR
    assert "settings go with --grid" in capsys.readouterr().err


def test_a_foreign_folder_gets_no_lock(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("x")
    assert sweep_cli("--sweep_dir", str(tmp_path), "--grid", "d_z=8") == cli.EXIT_USER_ERROR
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_dry_run_shows_the_points(tmp_path, capsys):
    argv = ["--grid", "d_z=8,16", "--seeds", "1,2", "--random", "1", "--dry_run"]
    assert sweep_cli("--sweep_dir", str(tmp_path / "s"), *argv) == 0
    assert capsys.readouterr().out.count("seed=") == 2 and not (tmp_path / "s").exists()
