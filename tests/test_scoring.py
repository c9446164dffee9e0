"""Scores against cases whose official SQuAD result is known, and the statistics around them."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from lw_fast.scoring import (
    Scores,
    agreement,
    answers_collapsed,
    bootstrap_interval,
    clean_prediction,
    exact_match,
    exact_match_single,
    f1,
    f1_single,
    mean,
    most_frequent,
    normalize,
    oracle,
    paired_bootstrap,
    score,
    unique_count,
)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Walt Disney Company", "walt disney company"),
        ("  a  cat, an\tapple & the end. ", "cat apple end"),
        ("U.S.A.", "usa"),
        ("theatre and another", "theatre and another"),
        ("Denver's 24-10", "denvers 2410"),
        ("\u2013 caf\u00e9 \u201cx\u201d", "\u2013 caf\u00e9 \u201cx\u201d"),  # ASCII only
        ("The", ""),
    ],
)
def test_normal_form(text, normal):
    assert normalize(text) == normal


@pytest.mark.parametrize(
    ("prediction", "golds", "em", "best_f1"),
    [
        ("the Denver Broncos!", ["Denver Broncos"], 1, 1),
        ("Broncos", ["Denver Broncos"], 0, 2 / 3),
        ("a cat sat", ["the cat sat down"], 0, 0.8),
        ("cat cat dog", ["cat dog dog"], 0, 2 / 3),  # repeated words count once per occurrence
        ("Panthers", ["Denver Broncos"], 0, 0),
        ("Santa Clara", ["Levi's Stadium", "Santa Clara, California", "Santa Clara"], 1, 1),
        ("", ["Denver"], 0, 0),
        ("", [], 1, 1),  # unanswerable: only the empty prediction is right
        ("the", [], 1, 1),
        ("Denver", [], 0, 0),
        ("Denver", ["", "Denver"], 1, 1),  # empty golds of an answerable question do not count
        ("", ["", "Denver"], 0, 0),
        ("", ["the"], 1, 1),
    ],
)
def test_known_cases(prediction, golds, em, best_f1):
    assert exact_match(prediction, golds) == em
    assert f1(prediction, golds) == pytest.approx(best_f1)


def test_single_gold_looks_at_the_first_only():
    golds = ["Levi's Stadium", "Santa Clara"]
    assert (exact_match("Santa Clara", golds), exact_match_single("Santa Clara", golds)) == (1, 0)
    assert (f1("Stadium", golds), f1_single("Stadium", golds)) == pytest.approx((2 / 3, 2 / 3))
    assert (exact_match_single("", ()), f1_single("x", ())) == (1, 0)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" Denver\nBecause it won.", "Denver"),
        ("\n\n  Denver.\n\nmore", "Denver"),
        ("Denver<|eot_id|>rest", "Denver"),
        ("Denver</s><s>", "Denver"),
        ("Denver<|im_end|>\n<|im_start|>user", "Denver"),
        ("<|eot_id|>Denver", ""),
        ("\"Denver\u2014'\t", "Denver"),
        ("- 24\u201310 -", "24\u201310"),
        ("", ""),
        (" \n ", ""),
        ("...", ""),
    ],
)
def test_cleaning(text, answer):
    assert clean_prediction(text) == answer


@pytest.mark.parametrize(
    "line", ["a b\n", "\n \n a.\n", "<|im_end|>\n", "a <|im_end|> b\n", " - \n"]
)
def test_what_follows_the_first_line_with_text_changes_nothing(line):
    """So decoding may stop there."""
    assert clean_prediction(f"{line}c [INST] <|eot_id|>\n d") == clean_prediction(line)


def test_scores_of_a_list():
    scores = score(["Denver", "x y"], [("Broncos", "Denver"), ("x",)])
    assert scores == Scores(
        em=[1, 0],
        f1=[1, pytest.approx(2 / 3)],
        em_single=[0, 0],
        f1_single=[0, pytest.approx(2 / 3)],
    )
    assert scores.means()["em"] == 0.5 and list(scores.means()) == list(Scores._fields)
    with pytest.raises(ValueError, match="shorter|longer"):
        score(["a"], [])


def test_collapse_is_visible():
    predictions = ["the the", "The!", "Denver", "the"]
    assert unique_count(predictions) == 2
    assert most_frequent(predictions) == ("", 0.75)
    assert most_frequent(["Denver"]).text == "denver"


@pytest.mark.parametrize(
    ("predictions", "golds", "alarm"),
    [
        (["the"] * 5, ["Rome"] * 5, True),
        (["the"] * 4, ["Rome"] * 4, False),  # too few to say
        (["the"] * 6 + ["Oslo"] * 24, ["Oslo"] * 30, False),  # a fifth, and no more
        (["The!"] * 7 + ["Oslo"] * 23, ["Oslo"] * 30, True),
        ([""] * 10, [()] * 8 + [("Rome",)] * 2, False),  # rightly empty
        ([""] * 10, [()] * 5 + [("Rome",)] * 5, True),
        ([f"city {i}" for i in range(10)], ["Rome"] * 10, False),
    ],
)
def test_the_alarm_is_about_one_wrong_answer(predictions, golds, alarm):
    golds = [(gold,) if isinstance(gold, str) else gold for gold in golds]
    assert answers_collapsed(predictions, golds) is alarm


def test_agreement_and_oracle():
    assert agreement(["The cat", "dog"], ["cat.", "cow"]) == 0.5
    assert oracle([1, 0, 0], [0, 0, 0.5]) == 0.5
    with pytest.raises(ValueError):
        agreement(["a"], [])


def test_nothing_has_no_score():
    with pytest.raises(ValueError):
        mean([])
    with pytest.raises(ValueError):
        score([], []).means()
    with pytest.raises(ValueError):
        bootstrap_interval([], seed=0)


def test_bootstrap_interval():
    rng = random.Random(0)
    values = [float(rng.random() < 0.3) for _ in range(500)]
    lo, hi = bootstrap_interval(values, seed=1)
    # A proportion's standard error is sqrt(p(1-p)/n) = 0.0205: the interval is about 4 of them.
    assert lo < mean(values) < hi and hi - lo == pytest.approx(4 * 0.0205, rel=0.15)
    assert (lo, hi) == bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)
    assert bootstrap_interval([0.5] * 9, seed=1) == (0.5, 0.5)


def test_bootstrap_interval_covers_the_truth_about_95_times_in_100():
    rng = random.Random(3)
    hits = 0
    for seed in range(100):
        lo, hi = bootstrap_interval([rng.random() for _ in range(60)], seed, resamples=300)
        hits += lo <= 0.5 <= hi
    assert 88 <= hits <= 100


def test_pairing_sees_what_separate_intervals_hide():
    rng = random.Random(0)
    hard = [rng.random() for _ in range(200)]
    better = [min(1.0, value + 0.02) for value in hard]
    result = paired_bootstrap(better, hard, seed=0)
    assert 0 < result.lo < result.difference < result.hi and result.p_value == 0
    assert bootstrap_interval(better, 0)[0] < bootstrap_interval(hard, 0)[1]  # these overlap
    same = paired_bootstrap(hard, hard, seed=0)
    assert same == (0, 0, 0, 1)
    reverse = paired_bootstrap(hard, better, seed=0)
    assert reverse.difference == -result.difference and reverse.p_value == 0


def test_standard_library_only():
    code = "import sys, lw_fast.scoring; print({'numpy', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
