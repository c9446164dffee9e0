"""What the documents tell a user to type exists: commands, flags, make targets, files."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from lw_fast import cli
from lw_fast.config import FIELDS, build_config, preset_names

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("ds_configs/*.md")]
    if path.name != "CHANGELOG.md"
)
PARSERS = {"train": cli.train_parser, "eval": cli.eval_parser}
LAUNCHERS = {
    "--num_gpus",
    "--num_nodes",
    "--hostfile",
    "--nproc_per_node",
    "--nnodes",
    "--standalone",
}
LAUNCHERS |= {"--master_port", "--master_addr", "--num_accelerators", "--include", "--node_rank"}
LAUNCHERS |= {"--logdir"}  # tensorboard's


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def shell_lines(text: str) -> list[str]:
    """Command lines in code blocks (indented or fenced), continued lines joined."""
    fenced = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S))
    lines = re.findall(r"^ {4}.*", text.replace("\\\n", " "), re.M)
    lines += fenced.replace("\\\n", " ").splitlines()
    commands = [line.strip().removeprefix("$ ").split("#")[0].strip() for line in lines]
    starts = r"make \w|lw-fast \w|(python|deepspeed|torchrun) .*launch/"
    return [line for line in commands if re.match(starts, line)]


COMMANDS = [(path.name, line) for path in DOCUMENTS for line in shell_lines(read(path))]


def split(line: str) -> tuple[str, list[str]]:
    """The command (`train`, `eval`, another script or `make`) and its own arguments."""
    words = shlex.split(line)
    for i, word in enumerate(words):
        if word.startswith("launch/"):
            return word.removeprefix("launch/").removesuffix(".py"), words[i + 1 :]
    return (words[1], words[2:]) if words[0] == "lw-fast" else (words[0], words[1:])


def test_the_readme_shows_the_two_commands_and_the_main_job():
    lines = [line for name, line in COMMANDS if name == "README.md"]
    assert "make demo" in lines and "make test" in lines
    assert {"train", "eval"} <= {split(line)[0] for line in lines}
    main_job = "deepspeed launch/train.py --ds_config ds_configs/zero2.json"
    assert main_job in read(ROOT / "README.md") and main_job in read(ROOT / "Makefile")
    assert "make test" in read(ROOT / ".ci" / "run")


@pytest.mark.parametrize(("name", "line"), COMMANDS)
def test_commands_parse(name, line):
    """Flags exist and take such values; settings are valid together; files of ours are there."""
    command, argv = split(line)
    if command == "make":
        targets = re.findall(r"^([a-z-]+):", read(ROOT / "Makefile"), re.M)
        assert argv and set(argv) <= set(targets)
        return
    assert (ROOT / "launch" / f"{command}.py").is_file() or command in cli.COMMANDS
    for word in argv:
        if word.startswith("ds_configs/"):
            assert (ROOT / word).is_file()
    if command not in PARSERS:
        return
    rest, lms = cli.split_lm_flags(argv)
    flags = vars(PARSERS[command]().parse_args(rest))
    if command == "train":
        overrides = {key: value for key, value in flags.items() if key in FIELDS}
        build_config(flags["preset"] or "nano", overrides, lms)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_flags_exist(path):
    """Each --flag that a document names is one of ours, or a launcher's."""
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_]+(?![\w-])", read(path)))
    ours = {option for make in PARSERS.values() for option in make()._option_string_actions}
    scripts = [
        *ROOT.glob("launch/*.py"),
        *ROOT.glob("benchmarks/*.py"),
        *ROOT.glob("lw_fast/**/*.py"),
    ]
    elsewhere = {
        flag for script in scripts for flag in re.findall(r'"(--[a-z0-9_]+)"', read(script))
    }
    assert named <= ours | elsewhere | LAUNCHERS | {"--lm"}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", read(path))
    local = [link for link in links if not re.match(r"[a-z]+:", link)]
    assert [link for link in local if not (path.parent / link).exists()] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_presets_exist(path):
    named = set(re.findall(r"--preset (\w+)\b(?![./])", read(path))) - {"NAME"}
    assert named <= set(preset_names())


def test_the_layout_names_files_that_exist():
    text = read(ROOT / "README.md").split("## Layout")[1]
    block = text.split("lw_fast/", 1)[1].split("kernels/", 1)[0]
    named = set(re.findall(r"\b[a-z_]+\b", block.split("presets/")[0]))
    assert len(named) > 20
    assert named <= {path.stem for path in (ROOT / "lw_fast").iterdir()}
