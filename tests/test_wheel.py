"""The wheel: built from the sources, complete, and able to train from any folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lw_fast.cli import COMMANDS, find_ds_config

ROOT = Path(__file__).parents[1]
SOURCES = ("lw_fast", "kernels", "ds_configs")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built in a copy of the sources: a build folder from before would leak old files into it."""
    pytest.importorskip("setuptools")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    command += ["--disable-pip-version-check", "--quiet", "--wheel-dir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("lw_fast-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The wheel, unpacked."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def files_of(name: str) -> set[str]:
    """What a source folder holds."""
    found = (path for path in (ROOT / name).rglob("*") if path.is_file())
    kept = (path for path in found if "__pycache__" not in path.parts)
    return {path.relative_to(ROOT).as_posix() for path in kept}


def test_everything_is_in_it(wheel):
    expected = files_of("lw_fast") | {f"lw_fast/{name}" for name in files_of("ds_configs")}
    expected |= {name.removeprefix("kernels/") for name in files_of("kernels/lw_kernels")}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert expected - names == set() and names - expected == set()
    assert {"lw_fast/presets/nano.toml", "lw_fast/ds_configs/zero2.json"} <= names
    assert "lw_fast/assets/nano/qwen/model.safetensors" in names


def test_it_brings_the_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (entry,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "lw-fast = lw_fast.cli:main" in archive.read(entry).decode()


def lw_fast(installed: Path, cwd: Path, *argv: str) -> subprocess.CompletedProcess:
    """The installed command, in a folder that is not the repository."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= {"PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    code = "import sys; from lw_fast.cli import main; main()"
    command = [sys.executable, "-c", code, *argv]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def test_every_command_has_help(installed, tmp_path):
    for name in COMMANDS:
        done = lw_fast(installed, tmp_path, name, "--help")
        assert done.returncode == 0 and f"usage: {name}" in done.stdout, done.stderr
    assert lw_fast(installed, tmp_path).returncode == 2


def test_it_trains_and_reports_far_from_the_repository(installed, tmp_path):
    """Two steps of nano, its LMs and data from the wheel."""
    size = ["--samples", "16", "--batch_size", "8", "--epochs", "1", "--eval_samples", "2"]
    size += ["--kinds", "text,latent", "--max_new_tokens", "2", "--device", "cpu"]
    done = lw_fast(installed, tmp_path, "train", "--run_dir", "first", *size)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "first" / "eval_epoch1" / "metrics.json").exists()
    done = lw_fast(installed, tmp_path, "report", "first", "--out", "page.html")
    assert done.returncode == 0 and (tmp_path / "page.html").exists(), done.stderr
    code = "import lw_fast, lw_kernels; print(lw_fast.__file__, lw_kernels.__file__)"
    env = os.environ | {"PYTHONPATH": str(installed)}
    where = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True)
    assert where.stdout.decode().count(str(installed)) == 2


@pytest.mark.slow
def test_it_installs_into_a_clean_environment(wheel, tmp_path):
    """A venv that sees this one's packages; only the wheel itself is installed."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    site = next((venv / "lib").glob("python*/site-packages"))
    (site / "outer.pth").write_text("\n".join(path for path in sys.path if "site-packages" in path))
    pip = [venv / "bin" / "python", "-m", "pip", "install", "--no-deps", "--quiet"]
    subprocess.run([*pip, "--force-reinstall", wheel], check=True, env=env)
    command = [
        venv / "bin" / "lw-fast",
        "sweep",
        "--sweep_dir",
        "s",
        "--grid",
        "d_z=8",
        "--dry_run",
    ]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout == "d_z=8\n", done.stderr


def test_ds_configs_are_found_in_both_places(installed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("zero2", "zero2.json", "ds_configs/zero2.json"):
        assert find_ds_config(Path(name)) == ROOT / "ds_configs" / "zero2.json"
    code = "from lw_fast import cli; print(cli.find_ds_config(cli.Path('zero2')))"
    env = os.environ | {"PYTHONPATH": str(installed)}
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True)
    assert found.stdout.decode().strip() == str(installed / "lw_fast" / "ds_configs" / "zero2.json")
    (tmp_path / "zero2").write_text("mine")
    assert find_ds_config(Path("zero2")) == Path("zero2")
    for name in ("zero9", "mine/zero2.json"):
        assert find_ds_config(Path(name)) == Path(name)
