"""The report: what it reads, what it draws, and how the page behaves in a real browser."""

from __future__ import annotations

import html.parser
import json
import math
import re
import threading

import browser
import pytest
import report_runs

from lw_fast import cli
from lw_fast.config import build_config
from lw_fast.errors import UserError
from lw_fast.report.report_data import (
    accuracy_rows,
    collect,
    cost_values,
    curve,
    heat_maps,
    latent_f1,
    pareto,
    predictions,
    settings_that_differ,
)
from lw_fast.report.report_main import watch, write_report
from lw_fast.report.report_page import page, shown
from lw_fast.report.report_plots import plots
from lw_fast.sweep_folder import open_sweep
from lw_fast.sweep_points import build_points, grid

needs_chromium = pytest.mark.skipif(
    browser.CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)"
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """good, bad (NaN in the log, lower F1) and young (not evaluated)."""
    folder = tmp_path_factory.mktemp("report")
    report_runs.write_run(folder / "good", f1=0.8)
    report_runs.write_run(folder / "bad", f1=0.4, loss=math.nan, mute=True, lr=0.1)
    report_runs.write_run(folder / "young", evaluated=False)
    return {name: folder / name for name in ("good", "bad", "young")}


@pytest.fixture(scope="module")
def sweep_dir(tmp_path_factory):
    """2 x 2 points: three finished, one not begun."""
    folder = tmp_path_factory.mktemp("sweep") / "mxd"
    points = build_points(grid(["latent_len=8,16", "d_z=64,128"]), "nano", {"epochs": 2}, {})
    sweep = open_sweep(folder, points)
    for i, name in enumerate(list(sweep.points)[:3]):
        report_runs.write_run(sweep.run_dir(name), f1=0.3 + 0.2 * i, **sweep.points[name].values)
    return folder


# ------------------------------------------------------------------------------- data


def test_runs_and_sweeps_are_collected(runs, sweep_dir):
    report = collect([*runs.values(), sweep_dir])
    assert [entry.label for entry in report.entries[:3]] == ["good", "bad", "young"]
    assert [entry.state for entry in report.entries] == ["finished"] * 2 + ["100%"] + [
        "finished"
    ] * 3
    assert report.absent == ["latent_len=16,d_z=128"] and not report.finished
    assert len({entry.colour for entry in report.entries}) == 6 and report.lms == ["llama", "qwen"]


def test_many_runs_have_different_colours(runs, monkeypatch):
    from lw_fast.report import report_data

    assert len(set(report_data._palette(40))) == 40


def test_runs_of_one_name_are_told_apart(runs, tmp_path):
    other = report_runs.write_run(tmp_path / "b" / "good")
    labels = [entry.label for entry in collect([runs["good"], other, other]).entries]
    assert labels == [f"{runs['good'].parent.name}/good", "b/good"]


def test_what_is_no_run_is_told(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        collect([tmp_path / "nowhere"])
    with pytest.raises(UserError, match="not a run folder"):
        collect([tmp_path])
    open_sweep(tmp_path / "s", build_points(grid(["d_z=8"]), "nano", {}, {}))
    with pytest.raises(UserError, match="nothing to report yet"):
        collect([tmp_path / "s"])


def test_missing_is_none_and_never_zero(runs):
    young = collect([runs["young"]]).entries[0]
    assert latent_f1(young) is None and accuracy_rows(young) == []
    costs = cost_values(young)
    assert costs["latent F1"] is None and costs["peak GiB"] is None and costs["samples/s"] == 55.0
    assert "&ndash;" in shown(None) and shown(0.0) == "0.000" and shown(1.0) == "1.000"
    assert predictions(young, 10) == []


def test_accuracy_rows_hold_only_what_was_run(runs):
    rows = accuracy_rows(collect([runs["good"]]).entries[0])
    assert [(lm, kind) for lm, kind, _ in rows] == [
        (lm, kind) for lm in ("llama", "qwen") for kind in ("text", "latent")
    ]
    assert rows[1][2][:2] == [0.8, 0.4]


def test_kinds_that_nobody_told_us_of_are_shown(tmp_path):
    folder = report_runs.write_run(tmp_path / "new")
    path = folder / "eval_epoch2" / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics |= {"telepathy": metrics["text"], "seed": {"latent": metrics["latent"]}}
    path.write_text(json.dumps(metrics))
    rows = accuracy_rows(collect([folder]).entries[0])
    assert [kind for lm, kind, _ in rows if lm == "qwen"] == [
        "text", "latent", "telepathy", "latent (seed)"
    ]  # fmt: skip


def test_numbers_that_are_not_finite_become_gaps(runs):
    xs, ys = curve(collect([runs["bad"]]).entries[0], "loss")
    assert len(xs) == 8 and math.isnan(ys[2]) and ys[3] == 1.0


def test_settings_that_differ(runs):
    report = collect([runs["good"], runs["bad"]])
    lr = build_config("nano").optim.lr
    assert settings_that_differ(report.entries) == {"lr": [lr, 0.1]}


def test_heat_maps(sweep_dir):
    mean, llama, qwen = heat_maps(collect([sweep_dir]))
    assert (mean.x_name, mean.y_name, mean.x, mean.y) == ("latent_len", "d_z", [8, 16], [64, 128])
    assert mean.cells == pytest.approx({(8, 64): 0.3, (8, 128): 0.5, (16, 64): 0.7})
    assert "llama" in llama.title and "qwen" in qwen.title


def test_heat_maps_average_over_seeds(tmp_path):
    points = build_points(
        grid(["seed=1,2", "latent_len=8,16", "d_z=64,128"]), "nano", {"epochs": 2}, {}
    )
    sweep = open_sweep(tmp_path / "s", points)
    for name, f1 in zip(list(sweep.points)[::4], (0.2, 0.4), strict=True):
        report_runs.write_run(sweep.run_dir(name), f1=f1, **sweep.points[name].values)
    assert heat_maps(collect([tmp_path / "s"])) == []  # one cell: nothing varies but the seed
    for name in list(sweep.points)[1::4] + list(sweep.points)[2::4]:
        report_runs.write_run(sweep.run_dir(name), f1=0.6, **sweep.points[name].values)
    mean = heat_maps(collect([tmp_path / "s"]))[0]
    assert mean.cells[8, 64] == pytest.approx(0.3) and mean.cells[8, 128] == pytest.approx(0.6)


def test_pareto():
    points = [(8, 0.3), (16, 0.2), (32, 0.5), (8, 0.1), (64, 0.5)]
    assert pareto(points, more_x=False) == [(8, 0.3), (32, 0.5)]
    assert pareto(points, more_x=True) == [(64, 0.5)]
    assert pareto([], more_x=True) == []


def test_predictions_know_what_is_right(runs):
    rows = predictions(collect([runs["good"]]).entries[0], 3)
    assert len(rows) == 3 and rows[0]["answers"]["qwen"]["latent"] == ["Rome", True]
    assert rows[1]["answers"]["qwen"] == {
        "text": [report_runs.QUESTIONS[1][1], True],
        "latent": ["", False],
    }


# ------------------------------------------------------------------------------- plots and page


def test_every_section_has_its_figures(runs, sweep_dir):
    drawn = plots(collect([*runs.values(), sweep_dir]))
    assert {plot.section for plot in drawn} == {"curves", "diagnostics", "rates", "sweeps"}
    titles = [plot.title for plot in drawn]
    for title in ("llama: loss per answer token", "qwen: latent F1, text dashed", "samples/s"):
        assert title in titles
    assert sum("latent F1 against" in title for title in titles) == 2
    assert not any("memory" in title or title == "mfu" for title in titles)  # no run has them
    assert len({plot.name for plot in drawn}) == len(drawn)
    for plot in drawn:
        assert plot.svg.startswith("<svg") and "currentColor" in plot.svg
        assert plot.png.startswith(b"\x89PNG")
    heat = next(plot.svg for plot in drawn if "mean over LMs" in plot.title)
    assert "missing" in heat and "0.70" in heat


def test_the_same_run_gives_the_same_page(runs):
    first, again = (page(r, plots(r), max_predictions=9) for r in (collect([runs["good"]]),) * 2)
    assert first == again


def test_a_run_with_nothing_has_a_page(tmp_path):
    folder = report_runs.write_run(tmp_path / "empty", evaluated=False)
    (folder / "log.jsonl").unlink()
    report = collect([folder])
    text = page(report, plots(report), max_predictions=9)
    assert "No run has been evaluated yet." in text and "empty: no evaluation yet." in text
    assert '<section id="predictions">' not in text and "<svg" not in text
    assert not report.finished and report.entries[0].state == "0%"


def test_all_values_infinite(tmp_path):
    folder = report_runs.write_run(tmp_path / "inf")
    row = {"step": 1, "epoch": 1.0, "loss": math.inf, "samples/s": -math.inf}
    (folder / "log.jsonl").write_text(json.dumps(row) + "\n")
    titles = [plot.title for plot in plots(collect([folder]))]
    assert "total loss" not in titles and "samples/s" not in titles


class Links(html.parser.HTMLParser):
    """Everything a page refers to outside of itself, and whether its tags are balanced."""

    VOID = {"meta", "link", "input", "br"}

    def __init__(self) -> None:
        super().__init__()
        self.outside, self.open = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action") and not value.startswith(
                ("#", "data:")
            ):
                self.outside.append(value)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop() if tag not in self.VOID else None

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_self_contained(runs, sweep_dir):
    report = collect([*runs.values(), sweep_dir])
    text = page(report, plots(report), max_predictions=9)
    parser = Links()
    parser.feed(text)
    assert parser.outside == [] and parser.open == []
    assert "@import" not in text and not re.search(r"url\(\s*['\"]?(?!#)", text)
    assert "alert(1)</script>" not in text  # a gold answer cannot leave its place
    assert "abacus" in text and "latent_len = " in text and "Z collapsed" in text


def test_a_preset_of_another_version_is_shown_as_it_is(tmp_path):
    folder = report_runs.write_run(tmp_path / "old")
    config = json.loads((folder / "config.json").read_text()) | {"gone_setting": 1}
    (folder / "config.json").write_text(json.dumps(config))
    report = collect([folder])
    assert "unknown setting" in page(report, [], max_predictions=0)


# ------------------------------------------------------------------------------- command line


def report_cli(*argv: str) -> int:
    return cli.run(cli.COMMANDS["report"], list(argv))


def test_the_command_writes_the_page_and_its_plots(runs, tmp_path, capsys):
    out = tmp_path / "deep" / "page.html"
    (tmp_path / "deep" / "page_plots").mkdir(parents=True)
    (tmp_path / "deep" / "page_plots" / "mine.png").write_bytes(b"")
    (tmp_path / "deep" / "page_plots" / "99-old.png").write_bytes(b"")
    assert report_cli(str(runs["good"]), "--out", str(out)) == 0
    assert "<title>lw_fast: good</title>" in out.read_text()
    names = [path.name for path in (tmp_path / "deep" / "page_plots").iterdir()]
    assert "mine.png" in names and "99-old.png" not in names and len(names) > 8
    assert "http-equiv" not in out.read_text() and f"written to {out}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "arguments are required"),
        (["nowhere"], "no such folder: nowhere"),
        (["nowhere", "--every", "0"], "--every"),
    ],
)
def test_mistakes_are_one_line(capsys, argv, message):
    assert report_cli(*argv) == cli.EXIT_USER_ERROR
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_a_page_that_cannot_be_written(runs, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_report(collect([runs["young"]]), tmp_path / "file" / "p.html", max_predictions=0)


def test_watching_ends_with_the_run(tmp_path):
    """The page reloads itself as long as the run goes on, and is final at its end."""
    run, out = report_runs.write_run(tmp_path / "run", evaluated=False), tmp_path / "p.html"
    thread = threading.Thread(target=watch, args=([run], out, 0.05), kwargs={"max_predictions": 5})
    thread.start()
    seen = wait_for(lambda: out.exists() and out.read_text())
    assert 'http-equiv="refresh" content="1"' in seen and "no evaluation yet" in seen
    done = report_runs.write_run(tmp_path / "done")
    (done / "eval_epoch2").rename(run / "eval_epoch2")
    thread.join(timeout=30)
    assert not thread.is_alive()
    assert "http-equiv" not in out.read_text() and "pink kite" in out.read_text()


def wait_for(condition, seconds: float = 30.0):
    import time

    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError("waited in vain")


# ------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def written(runs, sweep_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "page.html"
    write_report(collect([*runs.values(), sweep_dir]), out, max_predictions=50)
    return out


LOOK = """
const drawn = [...document.querySelectorAll("figure svg")];
const plots = drawn.map((svg) => svg.getBoundingClientRect());
const style = getComputedStyle(document.body);
return {
  plots: plots.length,
  smallest: Math.min(...plots.map((box) => Math.min(box.width, box.height))),
  widest: Math.max(...plots.map((box) => box.right)),
  overflow: document.documentElement.scrollWidth - innerWidth,
  font: parseFloat(style.fontSize), ink: style.color, paper: style.backgroundColor,
  text: getComputedStyle(document.querySelector("figure svg text")).fill,
  sections: [...document.querySelectorAll("section")].map((section) => section.id),
};
"""

FILTER = """
const byId = (id) => document.getElementById(id);
const set = (id, value) => { byId(id).value = value; byId(id).dispatchEvent(new Event("input")); };
const shown = () => [...document.querySelectorAll("#cards .card strong")].map((e) => e.textContent);
const result = { all: shown() };
for (const name of ["latent_only", "text_only", "latent_right", "both_wrong"]) {
  set("filter", name);
  result[name] = shown();
}
set("filter", "all"); set("search", "CLEO");
result.search = shown(); result.count = byId("count").textContent;
set("search", ""); set("other", "1"); set("lm", "qwen");
const lines = [...document.querySelectorAll("#cards .card:first-child tr")];
result.labels = lines.map((line) => line.cells[0].textContent);
set("filter", "won"); result.won = shown();
result.hash = location.hash;
const head = [...document.querySelectorAll("#runs th")].find((e) => e.textContent === "latent F1");
const rows = () => [...head.closest("table").tBodies[0].rows];
const column = () => rows().map((row) => row.cells[head.cellIndex].textContent);
head.click(); result.down = column();
head.click(); result.up = column();
result.injected = document.querySelectorAll("#cards b, #cards script").length;
return result;
"""


@needs_chromium
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (390, True)])
def test_plots_are_visible_on_desk_and_phone(written, tmp_path, width, dark):
    seen = browser.ask(written, LOOK, tmp_path / "profile", width=width, dark=dark)
    assert seen["problems"] == [] and seen["loaded"] == []
    assert seen["plots"] > 15 and seen["smallest"] > 150 and seen["widest"] <= width
    assert seen["overflow"] <= 0 and seen["font"] >= 14
    assert seen["sections"] == [
        "runs", "accuracy", "sweeps", "curves", "diagnostics", "rates", "predictions", "settings"
    ]  # fmt: skip
    ink, paper, text = (brightness(seen[name]) for name in ("ink", "paper", "text"))
    assert (paper < 60 and ink > 180) if dark else (paper > 230 and ink < 80)
    assert text == ink  # the plots follow the page


def brightness(colour: str) -> float:
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3


@needs_chromium
def test_filters_search_and_sorting_work(written, tmp_path):
    seen = browser.ask(written, FILTER, tmp_path / "profile")
    ada, bob, cleo, dan = (question for question, *_ in report_runs.QUESTIONS)
    assert seen["problems"] == [] and seen["injected"] == 0
    assert seen["all"] == [ada, bob, cleo, dan]
    assert seen["latent_only"] == [cleo] and seen["text_only"] == [bob]
    assert seen["latent_right"] == [ada, cleo] and seen["both_wrong"] == [dan]
    assert seen["search"] == [cleo] and seen["count"] == "1 of 4 questions"
    assert seen["labels"] == ["good: qwen"] * 2 + ["bad: qwen"] * 2
    assert seen["won"] == [ada, cleo] and "other=1" in seen["hash"]
    assert seen["down"] == ["0.800", "0.700", "0.500", "0.400", "0.300", "\u2013"]
    assert seen["up"] == ["0.300", "0.400", "0.500", "0.700", "0.800", "\u2013"]


@needs_chromium
def test_the_page_of_an_empty_run_opens(tmp_path):
    run = report_runs.write_run(tmp_path / "young", evaluated=False)
    (run / "log.jsonl").unlink()
    write_report(collect([run]), tmp_path / "p.html", max_predictions=5)
    seen = browser.ask(tmp_path / "p.html", "return {};", tmp_path / "profile")
    assert seen["problems"] == []
