"""Imports run downwards only, and heavy packages load where they are used."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("lw_fast", "kernels", "launch", "benchmarks", "tests")
FILES = sorted(path for name in FOLDERS for path in (ROOT / name).rglob("*.py"))
STDLIB = sys.stdlib_module_names

# What each module of lw_fast may import of lw_fast: everything further down this list, and
# nothing further up. A new module needs its line here; a folder of modules counts as one.
LAYERS = (
    "ablate demo pipeline sweep report plan",
    "sweep_queue",
    "sweep_worker",
    "cli",
    "sweep_folder",
    "sweep_points",
    "api",
    "train",
    "train_step auto_batch",
    "train_log",
    "training_run",
    "evaluate",
    "diagnostics eval_files kept_latents shared text_tuned",
    "model run_folder",
    "teacher",
    "prompts reader",
    "decode bridge forcing",
    "batches alignment placement prompt_cache",
    "encoder frozen_lm",
    "engine lm_sources",
    "latent_head adapter sequence source losses optim checkpoint meters nano progress quantised",
    "fp8 late packed_attention packing blocks chat data profiling scoring nano_facts",
    "guardrails idle",
    "config run_results",
    "errors",
)
DEPTH = {name: depth for depth, names in enumerate(LAYERS) for name in names.split()}


def imports(path: Path, *, top_level: bool = False) -> set[str]:
    """Dotted names that a file imports, anywhere in it or (top_level) as it loads."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in _loaded(tree) if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _loaded(tree: ast.AST):
    """Nodes that run when a module is imported: not those in functions or for type checkers."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _loaded(node)


def packages(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def files_of(folder: str) -> list[Path]:
    return [path for path in FILES if path.is_relative_to(ROOT / folder)]


def who_imports(package: str, folder: str = "lw_fast") -> set[str]:
    files = files_of(folder)
    return {name_of(path, folder) for path in files if package in packages(imports(path))}


def name_of(path: Path, folder: str = "lw_fast") -> str:
    """The module of a folder that a file is, or is part of."""
    return path.relative_to(ROOT / folder).parts[0].removesuffix(".py")


MODULES = {name_of(path) for path in files_of("lw_fast")} - {"__init__"}


def modules(path: Path) -> set[str]:
    """Other modules of lw_fast that a file of one imports."""
    names = {n.split(".")[1] for n in imports(path) if n.startswith("lw_fast.")}
    return (names & MODULES) - {name_of(path)}


# ------------------------------------------------------------------------------- who imports what


def test_there_is_something_to_walk():
    assert len(files_of("lw_fast")) > 20 and len(files_of("kernels")) > 3
    assert who_imports("torch") > {"train", "bridge"}


def test_only_engine_imports_deepspeed():
    assert who_imports("deepspeed") == {"engine"}


def test_only_the_lm_modules_import_transformers():
    assert who_imports("transformers") <= {
        "frozen_lm",
        "lm_sources",
        "quantised",
        "nano",
        "prompt_cache",
    }


def test_only_data_imports_datasets():
    assert who_imports("datasets") == {"data"}


@pytest.mark.parametrize("package", ["launch", "benchmarks", "tests", "conftest", "tiny"])
def test_nobody_imports_what_stands_on_top(package):
    for folder in ("lw_fast", "kernels", "launch", "benchmarks"):
        assert folder == package or who_imports(package, folder) == set()


def test_kernels_know_nothing_of_the_library():
    assert who_imports("lw_fast", "kernels") == set()


def test_some_modules_need_only_the_standard_library():
    for name in ("config", "errors", "guardrails", "scoring", "nano_facts"):
        found = packages(imports(ROOT / "lw_fast" / f"{name}.py"))
        assert found <= STDLIB | {"lw_fast"}, name


@pytest.mark.parametrize("path", files_of("lw_fast"), ids=lambda path: path.stem)
def test_imports_run_downwards(path):
    """By the layers above; so there are no cycles either."""
    name = name_of(path)
    if name == "__init__":
        assert not any(name.startswith("lw_fast.") for name in imports(path, top_level=True))
        return
    assert name in DEPTH, "a new module: say in LAYERS where it stands"
    upwards = {other for other in modules(path) if DEPTH[other] <= DEPTH[name]}
    assert upwards == set()


def test_layers_name_modules_that_exist():
    assert MODULES == DEPTH.keys()


# ------------------------------------------------------------------------------- when


HEAVY = {"transformers", "deepspeed", "datasets", "matplotlib", "tensorboard", "bitsandbytes"}


@pytest.mark.parametrize("path", files_of("lw_fast"), ids=lambda path: path.stem)
def test_heavy_packages_load_where_they_are_used(path):
    assert not packages(imports(path, top_level=True)) & HEAVY


def loaded_after(code: str) -> set[str]:
    """Top-level packages in sys.modules of a fresh process."""
    command = [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"]
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=env, cwd="/")
    return packages(set(out.stdout.split()))


def test_importing_the_library_is_instant():
    loaded = loaded_after("import lw_fast")
    assert "lw_fast" in loaded
    assert not loaded & (HEAVY | {"torch", "numpy", "triton", "rich"})


def test_help_and_mistakes_need_no_torch():
    """The command line answers before anything heavy is loaded."""
    code = (
        "from lw_fast.cli import run, train_main, eval_parser, train_parser\n"
        "train_parser().format_help(), eval_parser().format_help()\n"
        "assert run(train_main, ['--latent_len', '0']) == 2"
    )
    assert not loaded_after(code) & (HEAVY | {"torch", "numpy"})


# ------------------------------------------------------------------------------- the name `kernels`


def test_the_folder_kernels_is_not_a_package():
    """It would hide the Hugging Face package `kernels`, which transformers imports."""
    assert (ROOT / "kernels").is_dir()
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not [name for path in FILES for name in packages(imports(path)) if name == "kernels"]


def test_an_installed_kernels_package_wins(tmp_path):
    """Though our folder of that name comes first on the path."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("who = 'theirs'")
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}]; sys.path.append({str(tmp_path)!r})\n"
    code += "import kernels; assert kernels.who == 'theirs'; import lw_kernels"
    assert "lw_kernels" in loaded_after(code)
