"""Shared by all tests. Without a GPU, Triton kernels run in Triton's interpreter on the CPU."""

import os

import torch

# Read by Triton when a kernel is defined, so it must be set before any kernel module is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# No test needs the network, and one thread per process keeps results the same everywhere.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import tiny  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """What is converted or tuned in a test session is forgotten with it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LW_FAST_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def lm_dirs(tmp_path_factory) -> dict[str, str]:
    """A random Llama (BOS, pad == eos) and a random Qwen2 (no BOS), saved as model folders."""
    folder = tmp_path_factory.mktemp("lms")
    for name in ("llama", "qwen"):
        lm = tiny.frozen_lm(name)
        lm.model.save_pretrained(folder / name)
        lm.tokenizer.save_pretrained(folder / name)
    return {name: str(folder / name) for name in ("llama", "qwen")}


@pytest.fixture(scope="session")
def qa_file(tmp_path_factory) -> Path:
    """Forty questions in the SQuAD layout."""
    return tiny.write_squad(tmp_path_factory.mktemp("data") / "qa.json", tiny.examples(40))
