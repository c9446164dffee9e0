"""--auto_batch: the fastest size that fits, after any number that do not."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import tiny
import torch

from lw_fast import auto_batch
from lw_fast.cli import train_main
from lw_fast.engine import World
from lw_fast.errors import UserError
from lw_fast.run_folder import read_config
from lw_fast.train import train

ONE = World(rank=0, local_rank=0, size=1, device=tiny.CPU)


@pytest.fixture
def model():
    return tiny.latent_model(batch_size=16)


@pytest.fixture
def tables(model):
    return model.tables(tiny.examples(24))


def card(monkeypatch, fits: int, seconds=lambda size: 1.0) -> list[int]:
    """A card on which `fits` examples fit and a pass of some size takes so long; real passes."""
    passes, clock, real = [], [0.0], auto_batch._one_pass

    def one_pass(config, model, tables, index):
        passes.append(len(index))
        if len(index) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        real(config, model, tables, index)
        clock[0] += seconds(len(index))

    monkeypatch.setattr(auto_batch, "_one_pass", one_pass)
    monkeypatch.setattr(auto_batch.time, "perf_counter", lambda: clock[0])
    return passes


def test_sizes_that_do_not_fit_are_survived(monkeypatch, model, tables, caplog):
    passes = card(monkeypatch, fits=4)
    before = [p.clone() for p in model.bridge.parameters()]
    with caplog.at_level(logging.INFO):
        chosen = auto_batch.choose(model.config, ONE, model, tables)
    assert chosen.optim.micro_batch_size == 4 and chosen.optim.batch_size == 16
    assert passes == [16, 8, *[4] * 5, *[2] * 5]  # 2 is half as fast: the search ends
    assert caplog.text.count("out of memory") == 2
    assert "4       4.0 samples/s  <- micro_batch_size" in caplog.text
    for old, new in zip(before, model.bridge.parameters(), strict=True):
        assert torch.equal(old, new) and new.grad is None


def test_the_fastest_need_not_be_the_largest(monkeypatch, model, tables):
    card(monkeypatch, fits=16, seconds=lambda size: size**2 if size > 4 else 6 * size)
    chosen = auto_batch.choose(model.config, ONE, model, tables)
    assert chosen.optim.micro_batch_size == 4


def test_nothing_fits(monkeypatch, model, tables):
    card(monkeypatch, fits=0)
    with pytest.raises(UserError, match="not even a micro-batch of one"):
        auto_batch.choose(model.config, ONE, model, tables)


def test_the_slowest_process_decides():
    fast, slow = auto_batch.Trial(4, 0.5, 10.0), auto_batch.Trial(4, 0.7, 9.0)
    assert auto_batch._slowest(4, [fast, slow]) == auto_batch.Trial(4, 0.7, 10.0)
    full = auto_batch.Trial(4, None, None)
    assert auto_batch._slowest(4, [fast, full]) == full


def test_the_first_pass_has_the_longest_examples(tables):
    index = auto_batch._largest(tables, 5)
    assert len(set(index.tolist())) == 5
    for length_N in (tables.sources.length_N, *(t.length_N for t in tables.answers.values())):
        assert length_N[index].max() == np.max(length_N)


def test_a_training_goes_on_with_the_size_that_was_found(monkeypatch, lm_dirs, qa_file, tmp_path):
    card(monkeypatch, fits=4)
    files = dict(dataset=str(qa_file), eval_dataset=str(qa_file), eval_samples=4, lm=lm_dirs)
    config = tiny.config(**files, batch_size=8, epochs=1)
    assert train(config, ONE, tmp_path / "run", auto_batch=True) is not None
    saved = read_config(tmp_path / "run")
    assert saved.optim.micro_batch_size == 4 and saved.optim.batch_size == 8


def test_it_contradicts_a_size(tmp_path):
    for flags in (["--micro_batch_size", "4"], ["--resume", "--run_dir", str(tmp_path)]):
        with pytest.raises(UserError, match="auto_batch contradicts"):
            train_main(["--auto_batch", *flags])
