"""Guardrails decide by data alone; a pipeline applies them to a run and writes down why."""

from __future__ import annotations

import json

import pytest
import tiny

from lw_fast import cli
from lw_fast.batches import AnswerTable
from lw_fast.config import build_config, load_guardrails, preset_names, to_dict, to_flat
from lw_fast.engine import World
from lw_fast.errors import UserError
from lw_fast.guardrails import LIVE, METRICS, Guard, read_guardrails
from lw_fast.pipeline import latent_scores, run_pipeline
from lw_fast.run_folder import read_config

ONE = World(rank=0, local_rank=0, size=1, device=tiny.CPU)
BOS = {"name": "no BOS", "below": 0.1, "change": {"train_append_bos_after_prefix": "no"}}
FIRST = {"name": "first token", "below": 0.1, "change": {"first_token_ce_weight": 1.0}}
START = {"train_append_bos_after_prefix": "yes", "first_token_ce_weight": 0.5, "prefix_gain": 1.0}


def scores(top1: float, f1: float = 0.0) -> dict[str, float]:
    return dict.fromkeys(METRICS, 0.0) | {"first_token_top1": top1, "f1": f1}


def play(table: dict, epochs: list[dict]) -> tuple[list[str], list[dict]]:
    """Decisions and the settings after each, for a series of epoch scores."""
    guard, settings, texts, states = Guard(read_guardrails(table)), dict(START), [], []
    for epoch in epochs:
        decision = guard.decide(epoch, settings)
        settings = settings | dict(decision.change)
        texts.append(decision.text)
        states.append({k: v for k, v in settings.items() if v != START[k]})
    return texts, states


# ------------------------------------------------------------------------------- decisions


def test_nothing_happens_to_a_run_that_does_well():
    texts, states = play({"rules": [BOS, FIRST]}, [scores(0.2), scores(0.3)])
    assert texts == ["go on", "go on"] and states == [{}, {}]


def test_one_change_at_a_time_taken_back_if_nothing_improves():
    texts, states = play({"rules": [BOS, FIRST]}, [scores(0.05)] * 6)
    assert texts == [
        "try: no BOS",
        "go on with: no BOS",
        "take back: no BOS; try: first token",
        "go on with: first token",
        "take back: first token",
        "go on",
    ]
    bos, first = BOS["change"], FIRST["change"]
    assert states == [bos, bos, first, first, {}, {}]


@pytest.mark.parametrize("better", [scores(0.08), scores(0.05, f1=0.1)])
def test_a_change_that_helps_is_kept(better):
    texts, states = play({"rules": [BOS, FIRST]}, [scores(0.05), better, better])
    assert texts[1] == "keep: no BOS" and states[1] == BOS["change"]
    assert texts[2] == "try: first token"  # still below 0.1
    assert states[2] == BOS["change"] | FIRST["change"]


def test_a_tiny_gain_passes_for_noise():
    texts, _ = play({"rules": [BOS | {"patience": 1}]}, [scores(0.05), scores(0.06)])
    assert texts[1] == "take back: no BOS"
    tolerant = BOS | {"patience": 1, "min_gain": 0.005}
    texts, _ = play({"rules": [tolerant]}, [scores(0.05), scores(0.06)])
    assert texts[1] == "keep: no BOS"


def test_flat_compares_with_the_epochs_before():
    rule = {"name": "gain", "flat": 0.01, "after": 2, "change": {"prefix_gain": 1.1}}
    texts, _ = play({"rules": [rule]}, [scores(0.05), scores(0.05), scores(0.059)])
    assert texts == ["go on", "go on", "try: gain"]
    texts, _ = play({"rules": [rule]}, [scores(0.05), scores(0.05), scores(0.07)])
    assert texts[-1] == "go on"


@pytest.mark.parametrize(
    ("values", "fires"),
    [([0.05, 0.05], True), ([0.05, 0.09], False), ([0.2, 0.2], False), ([0.05], False)],
)
def test_below_and_flat_must_both_hold(values, fires):
    rule = FIRST | {"flat": 0.01}
    texts, _ = play({"rules": [rule]}, [scores(value) for value in values])
    assert (texts[-1] == "try: first token") is fires


def stage(letter: str, epochs: list[dict]) -> list[dict]:
    """What the rules of a shipped stage change, epoch by epoch."""
    name = f"seed_stage_{letter}"
    guard, settings = Guard(read_guardrails(load_guardrails(name))), to_flat(build_config(name))
    states = []
    for epoch in epochs:
        change = dict(guard.decide(epoch, settings).change)
        settings |= change
        states.append(change)
    return states


def test_stage_a_follows_the_experiments_plan():
    """BOS goes after epoch 1; still flat two epochs later it is back and the first token weighs
    1.0; then that goes back too."""
    no_bos = {"train_append_bos_after_prefix": "no", "append_bos_after_prefix": "no"}
    bos = dict.fromkeys(no_bos, "yes")
    weight = {"first_token_ce_weight": 1.0}
    flat = stage("a", [scores(0.05)] * 6)
    assert flat == [no_bos, {}, bos | weight, {}, {"first_token_ce_weight": 0.5}, {}]
    assert stage("a", [scores(0.1)] * 3) == [{}, {}, {}]
    helped = stage("a", [scores(0.05), scores(0.08), scores(0.08), scores(0.08)])
    assert helped == [no_bos, {}, weight, {}]  # no BOS is kept
    by_f1 = stage("a", [scores(0.05), scores(0.05, f1=0.02), scores(0.12)])
    assert by_f1 == [no_bos, {}, {}]


def test_stage_b_samples_the_first_token_and_then_sweeps_the_gain():
    nucleus = {"first_token_top_p": 0.9, "first_token_temperature": 0.7}
    greedy = {"first_token_top_p": 1.0, "first_token_temperature": 0.0}
    flat = stage("b", [scores(0.05)] * 9)
    assert flat[:5] == [{}, {}, nucleus, {}, greedy | {"prefix_gain": 1.1}]
    gains = [change["prefix_gain"] for change in flat if "prefix_gain" in change]
    assert gains == [1.1, 1.2, 1.25, 1.15]
    assert stage("b", [scores(0.05), scores(0.08), scores(0.11)]) == [{}, {}, {}]


@pytest.mark.parametrize("letter", ["a", "b"])
def test_the_stages_expect_a_first_token_and_a_rising_f1(letter):
    guardrails = read_guardrails(load_guardrails(f"seed_stage_{letter}"))
    met = {e.name: e.met([scores(0.16, 0.1), scores(0.2, 0.2)]) for e in guardrails.expectations}
    assert list(met.values()) == [True, False, True]
    met = [e.met([scores(0.31, 0.2), scores(0.2, 0.1)]) for e in guardrails.expectations]
    assert met == [True, True, False]


def test_after_and_stop_after():
    texts, _ = play({"rules": [BOS | {"after": 2}], "stop_after": 3}, [scores(0.0)] * 3)
    assert texts == ["go on", "try: no BOS", "stop"]


def test_expectations():
    table = {
        "expectations": [
            {"name": "a", "at_least": 0.15, "after": 2},
            {"name": "b", "metric": "f1", "rising": True},
        ]
    }
    a, b = read_guardrails(table).expectations
    epochs = [scores(0.2, 0.1), scores(0.1, 0.2), scores(0.15, 0.2)]
    assert [a.met(epochs[:n]) for n in (1, 2, 3)] == [None, False, True]
    assert [b.met(epochs[:n]) for n in (1, 2, 3)] == [None, True, False]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"rules": [{"name": "x", "change": {"prefix_gain": 1.1}}]}, "needs below, flat or both"),
        ({"rules": [BOS | {"change": {"latent_len": 8}}]}, "latent_len cannot change during a run"),
        ({"rules": [BOS | {"change": {"prefix_gian": 8}}]}, "prefix_gian is no setting"),
        ({"rules": [BOS | {"change": 3}]}, "change must be a table"),
        ({"rules": [BOS | {"metric": "f2"}]}, "metric must be one of em, f1"),
        ({"rules": [BOS | {"below_": 1}]}, "Rule got an unexpected keyword argument 'below_'"),
        ({"rules": [{"below": 1.0}]}, "Rule missing"),
        ({"stop": 1}, "Guardrails got an unexpected keyword argument 'stop'"),
        ({"expectations": [{"name": "x"}]}, "needs one of at_least and rising"),
    ],
)
def test_bad_guardrails(table, message):
    with pytest.raises(UserError, match=message):
        read_guardrails(table)


@pytest.mark.parametrize("name", preset_names())
def test_shipped_guardrails_are_valid(name):
    guardrails = read_guardrails(load_guardrails(name))
    assert bool(guardrails.rules) == name.startswith("seed_stage")
    for rule in guardrails.rules:
        assert rule.change.keys() <= LIVE
        build_config(name, rule.change)


# ------------------------------------------------------------------------------- runs


@pytest.fixture
def settings(lm_dirs, qa_file):
    return run_settings(lm_dirs, qa_file)


def run_settings(lm_dirs, qa_file):
    """Four epochs of four steps."""
    return dict(
        dataset=str(qa_file), eval_dataset=str(qa_file), samples=32, eval_samples=6, lm=lm_dirs,
        eval_every=1, epochs=4, kinds="latent", train_append_bos_after_prefix="yes",
    )  # fmt: skip


def test_a_pipeline_changes_the_run_and_says_why(tmp_path, settings, monkeypatch):
    """BOS goes after the first epoch: the answers are tokenised anew, the checkpoints know."""
    built = []
    init = AnswerTable.__init__
    monkeypatch.setattr(
        AnswerTable,
        "__init__",
        lambda self, lm, answers, config: built.append(config) or init(self, lm, answers, config),
    )
    table = {
        "rules": [BOS | {"below": 2.0}],
        "expectations": [{"name": "miracle", "at_least": 2.0}],
        "stop_after": 3,
    }
    guard = run_pipeline(tiny.config(**settings), ONE, tmp_path / "run", read_guardrails(table))
    assert len(guard.history) == 3
    assert not (tmp_path / "run" / "epoch4").exists()
    policies = [
        read_config(tmp_path / "run" / f"epoch{n}").sequence.train_append_bos_after_prefix
        for n in (1, 2)
    ]
    assert policies == ["yes", "no"]
    assert built[0].sequence.train_append_bos_after_prefix == "yes"
    assert built[2].sequence.train_append_bos_after_prefix == "no"
    text = (tmp_path / "run" / "experiment.md").read_text()
    assert "| 1 | try: no BOS | train_append_bos_after_prefix = no | first_token_top1" in text
    assert "| 3 | stop |  | epoch 3 is the last |" in text
    assert "| miracle | no |" in text
    assert "| train_append_bos_after_prefix | yes |" in text
    metrics = json.loads((tmp_path / "run" / "eval_epoch2" / "metrics.json").read_text())
    shown = f"{metrics['latent']['qwen']['nll_token']:.3f}"
    assert any(line.startswith("| 2 | qwen | 6 |") and shown in line for line in text.splitlines())


class Killed(BaseException):
    """Nothing in the library catches it."""


def kill_at(monkeypatch, name: str, call: int):
    """Dies in the given call (from 1) of a function that the training loop uses."""
    from lw_fast import train as module

    work, calls = getattr(module, name), []

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return work(*args, **kwargs)

    monkeypatch.setattr(module, name, dying)
    return calls


def trail(run_dir):
    """What a pipeline leaves behind, apart from times."""
    timeless = ("time", "seconds_per_step")
    log = [json.loads(line) for line in (run_dir / "log.jsonl").open()]
    return {
        "log": [
            {k: v for k, v in row.items() if k not in timeless and not k.endswith("/s")}
            for row in log
        ],
        "decisions": (run_dir / "experiment.md").read_text(),
        "rules": json.loads((run_dir / "guardrails.json").read_text()),
        "settings": [to_dict(read_config(path)) for path in sorted(run_dir.glob("epoch[0-9]"))],
        "predictions": [p.read_bytes() for p in sorted(run_dir.glob("eval_*/predictions.jsonl"))],
    }


LEARNING = {
    "rules": [BOS | {"below": 2.0, "patience": 1}, FIRST | {"below": 2.0, "patience": 1}],
    "expectations": [{"name": "miracle", "at_least": 2.0}],
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, lm_dirs, qa_file):
    config = tiny.config(**run_settings(lm_dirs, qa_file))
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    run_pipeline(config, ONE, run_dir, read_guardrails(LEARNING))
    return trail(run_dir)


@pytest.mark.parametrize(
    ("function", "call"),
    [
        ("train_step", 11),  # in the third epoch, with a change on trial
        ("train_step", 13),  # at its end: on trial, evaluated, decided
        ("evaluate", 1),
        ("evaluate", 3),  # of an epoch whose checkpoint is there
        ("evaluate", 4),  # the last
        ("train_step", 6),
    ],
)
def test_a_killed_pipeline_goes_on_where_it_was(
    tmp_path, settings, monkeypatch, uninterrupted, function, call
):
    """The same settings, scores, decisions and log as without the kill, and no epoch twice."""
    config, rules, run_dir = tiny.config(**settings), read_guardrails(LEARNING), tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, function, call)
        run_pipeline(config, ONE, run_dir, rules)
    before = len(list(run_dir.glob("eval_epoch*/metrics.json")))
    with monkeypatch.context() as patch:
        evaluations = kill_at(patch, "evaluate", 99)
        steps = kill_at(patch, "train_step", 99)
        flags = ["--run_dir", str(run_dir), "--resume", "--device", "cpu"]
        assert cli.run(cli.COMMANDS["pipeline"], flags) == 0
    assert trail(run_dir) == uninterrupted
    assert before + len(evaluations) == 4
    assert len(steps) == (16 - (call - 1) // 4 * 4 if function == "train_step" else 16 - 4 * call)


def test_a_pipeline_that_is_over_has_nothing_to_resume(tmp_path, settings, capsys):
    config, run_dir = tiny.config(**settings), tmp_path / "run"
    run_pipeline(config, ONE, run_dir, read_guardrails({"stop_after": 2}))
    flags = ["--run_dir", str(run_dir), "--resume", "--device", "cpu"]
    assert cli.run(cli.COMMANDS["pipeline"], flags) == 2
    assert "was ended after epoch 2" in capsys.readouterr().err
    assert not (run_dir / "epoch3").exists()


def test_a_stopped_pipeline_says_how_to_go_on(tmp_path, settings, monkeypatch, capsys):
    """SIGTERM: saved, one line, the exit status of an interruption."""
    from lw_fast import train as module

    config, run_dir = tiny.config(**settings), tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, "train_step", 6)
        run_pipeline(config, ONE, run_dir, read_guardrails(LEARNING))
    step = module.train_step

    def stopped_step(run):
        run.stop_requested = True
        return step(run)

    monkeypatch.setattr(module, "train_step", stopped_step)
    flags = ["--run_dir", str(run_dir), "--resume", "--device", "cpu"]
    assert cli.run(cli.COMMANDS["pipeline"], flags) == cli.EXIT_INTERRUPTED
    assert "stopped after step 5; --resume continues" in capsys.readouterr().err
    assert (run_dir / "step5").is_dir()


def test_resuming_needs_the_rules_and_every_score(tmp_path, settings, monkeypatch, capsys):
    config, run_dir = tiny.config(**settings), tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, "train_step", 10)
        run_pipeline(config, ONE, run_dir, read_guardrails(LEARNING))
    flags = ["--run_dir", str(run_dir), "--resume", "--device", "cpu"]

    def complaint(*more: str) -> str:
        assert cli.run(cli.COMMANDS["pipeline"], [*flags, *more]) == 2
        return capsys.readouterr().err

    assert "leave --preset out" in complaint("--preset", "nano")
    assert "--resume and --init_from contradict" in complaint("--init_from", str(run_dir))
    (run_dir / "eval_epoch1" / "metrics.json").unlink()
    assert "lacks the evaluation of an epoch" in complaint()
    (run_dir / "guardrails.json").write_text("{")
    assert "guardrails.json is damaged" in complaint()
    (run_dir / "guardrails.json").unlink()
    assert "is not the run of a pipeline" in complaint()


def test_without_rules_a_pipeline_is_a_training_run(tmp_path, settings):
    from lw_fast.train import train

    settings["epochs"] = 2
    run_pipeline(tiny.config(**settings), ONE, tmp_path / "a", read_guardrails({}))
    train(tiny.config(**settings), ONE, tmp_path / "b")
    a, b = ((tmp_path / n / "eval_epoch2" / "predictions.jsonl").read_bytes() for n in ("a", "b"))
    assert a == b


def test_scores_of_the_seed_protocol():
    latent = {"llama": {"f1": 1.0}}
    assert latent_scores({"seed": {"latent": latent}}) == latent
    assert latent_scores({"latent": {}, "seed": {"latent": latent}}) == {}


@pytest.mark.parametrize("changes", [{"eval_every": 2}, {"kinds": "text"}])
def test_a_pipeline_needs_scores_of_every_epoch(tmp_path, settings, changes):
    config = tiny.config(**settings | changes)
    with pytest.raises(UserError, match="needs eval_every=1 and latent"):
        run_pipeline(config, ONE, tmp_path / "run", read_guardrails({}))


def test_a_value_that_is_wrong_is_found_at_the_start(tmp_path, settings):
    table = {"rules": [BOS | {"change": {"first_token_top_p": 0.5}}]}
    with pytest.raises(UserError, match="needs first_token_temperature"):
        run_pipeline(tiny.config(**settings), ONE, tmp_path / "run", read_guardrails(table))
    assert not (tmp_path / "run").exists()


def test_it_is_a_command():
    assert "pipeline" in cli.COMMANDS
