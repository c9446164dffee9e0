"""benchmarks/evaluation.py: both ways give the same answers, and every row is there."""

from __future__ import annotations

import tiny

from benchmarks import evaluation


def test_one_at_a_time_gives_the_same_answers():
    """In fp32 a batch changes no answer, so `agreement` is 1 and the rates compare."""
    model = tiny.latent_model(kinds="text,latent", max_new_tokens=6)
    found = evaluation.rows(
        model, tiny.examples(6), pair="tiny", loop_questions=3, repeats=1, command="x"
    )
    metrics = [(row["metric"], row["case"].split("impl=")[1]) for row in found]
    assert metrics == [
        ("samples/s", "ours"),
        ("samples/s", "one_at_a_time"),
        ("speedup", "ours"),
        ("agreement", "ours"),
        ("samples/s", "ours"),
    ]
    ours, loop, speedup, agreement, whole = (row["value"] for row in found)
    assert speedup == ours / loop and agreement == 1 and whole > 0
    assert found[3]["n"] == 3 * 2 * 2  # questions, kinds, LMs
    assert "scored=yes" in found[4]["case"] and "scored=no" in found[0]["case"]


def test_rows_name_no_folder():
    words = ["--ckpt", "/home/me/runs/nano", "--questions", "5"]
    assert evaluation._without_folders(words) == ["--ckpt", "nano", "--questions", "5"]
