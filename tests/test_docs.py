"""Every command and every piece of Python in the documentation does what it is said to do.

A command is executed in a small world (`docs_world`), in this process; what would take a cluster,
a GPU or a download is parsed and planned instead, for a reason that is written here or beside the
command (`<!-- docs-test: parse-only, REASON -->`); a program of others is named here. A command
that is none of these fails.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import docs_world
import pytest
import typer.main
from typer.testing import CliRunner

import kdscale
from kdscale.cli import app
from kdscale.models.named import ROLES, resolve
from kdscale.sweep.prices import find_rates

ROOT = Path(__file__).parent.parent
DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [path.stem for path in DOCS]
MARK = "docs-test: parse-only, "
FENCE = re.compile(
    r"^(?:<!-- (?P<mark>[^\n]+?) -->\n+)?```(?P<lang>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)
SHELL_LANGUAGES = ("bash", "sh", "console")
# Blocks that nothing here reads; the filters in SQL are run by tests/test_tracking_runs.py.
WORDS = ("", "text", "dockerfile", "yaml", "sql")
SPAN = re.compile(r"`([^`\n]+)`")

# Bash itself takes the commands apart; every word that it would run is written down instead.
SHELL = r"""
record() { builtin printf '%s\0' "$#" "$@" >> "$RECORD"; }
command_not_found_handle() { record "$@"; }
for word in $(compgen -b); do
  case $word in builtin | *[!a-z]*) ;; *)
    builtin eval "$word() { record $word \"\$@\"; }" ;;
  esac
done
"""

# Of kdscale's own commands those that are not executed here: which, why, and what is done instead.
HEAVY = (
    (("run",), "starts Ray", "planned"),
    (("plan", "--max-gpu-hours"), "the small world's towers cost nobody knows what", "parsed"),
    (("doctor",), "starts Ray", "parsed"),
    (("walk",), "takes true-size steps", "listed"),
    (("data", "bench"), "streams through Ray", "parsed"),
    (("evaluate", "--actors"), "starts Ray", "parsed"),
    (("export", "hf"), "is opened by a fresh process, as tests/test_cli_export.py does", "parsed"),
    (("zero-shot", "--gate"), "needs all of ImageNet", "parsed"),
    (("findings",), "compares trials of several seeds", "parsed"),
    (("cluster",), "starts machines", "parsed"),
)
LIMITS = {("--max-gpu-hours", False), ("--max-cost", False), ("--spot", True)}
# What makes an execution small, where the documentation's own options would not.
SMALL = {
    "zero-shot": ["--templates", "simple"],
    "evaluate": ["--limit", "2"],
    "data prepare": ["--workers", "1"],
}
# Programs of others, and what stands for having them.
OTHERS = {
    "sudo": "Debian's packages",
    "source": "enters the environment",
    "img2dataset": "downloads",
    "export": "sets the environment",
    "ray": "starts and ends clusters",
    "mlflow": "shows runs; tests/test_tracking_runs.py reads them",
    "curl": "makes an account, as tests/test_team.py does",
}
THEIR_OPTIONS = {"--force-quick-gelu", "--node-ip-address", "--signal", "--tmux"}
THEIR_OPTIONS |= {"--allowed-hosts", "--app-name", "--host", "--serve-artifacts"}  # MLflow's


@dataclass(frozen=True)
class Block:
    """A fenced block: where it begins, its language, its text, and its mark if it has one."""

    path: Path
    line: int
    lang: str
    text: str
    mark: str | None

    @property
    def place(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}"

    @property
    def parse_only(self) -> bool:
        return self.mark is not None and self.mark.startswith(MARK)


def blocks(path: Path) -> Iterator[Block]:
    """The fenced blocks of a page; none is overlooked."""
    page = path.read_text()
    found = list(FENCE.finditer(page))
    assert 2 * len(found) == len(re.findall(r"^\s*```", page, re.M)), f"{path}: indented fence"
    for match in found:
        mark = match["mark"] if (match["mark"] or "").startswith("docs-test") else None
        assert mark is None or (mark.startswith(MARK) and len(mark) > len(MARK)), mark
        line = page[: match.start("text")].count("\n") + 1
        yield Block(path, line, match["lang"], match["text"], mark)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, write_tar: Any) -> Iterator[dict[str, str]]:
    """Makes the small world the current directory; gives the keys of its finished stages."""
    root = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("COLUMNS", "160")
        (root / "sweeps").symlink_to(ROOT / "sweeps")
        yield docs_world.make(root, write_tar)


def commands(block: Block) -> list[list[str]]:
    """Takes a block apart as a shell would."""
    text = block.text
    if block.lang == "console":
        text = "".join(line[2:] for line in text.splitlines(True) if line.startswith("$ "))
    text = re.sub(r"(?<![\w.])/data/", "data/", text)
    record = Path("record").absolute()
    record.write_bytes(b"")
    bash = shutil.which("bash")
    assert bash
    done = subprocess.run(
        [bash, "-c", SHELL + text],
        env={"PATH": "/nowhere", "RECORD": str(record)},
        capture_output=True,
        text=True,
    )
    assert not done.stderr, f"{block.place}: {done.stderr}"
    words = iter(record.read_text().split("\0")[:-1])
    return [[next(words) for _ in range(int(count))] for count in words]


def parse(words: list[str]) -> Any:
    """Lets the command line read a command up to its function; gives the parameters."""
    command: Any = typer.main.get_command(app)
    words = list(words)
    while hasattr(command, "commands"):
        assert words, "a command is missing"
        assert words[0] in command.commands, f"there is no command {words[0]!r}"
        command = command.commands[words.pop(0)]
    return command.make_context(command.name, words).params


def invoke(words: list[str]) -> str:
    """Executes a command in this process; gives what it prints."""
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 0, f"exit {found.exit_code}: {found.output[-600:]}"
    assert found.output.strip(), "it printed nothing"
    return found.output


def run_kdscale(words: list[str], keys: dict[str, str], parse_only: bool) -> str:
    """Executes one of kdscale's commands, or what stands for it; gives what was done."""
    seeing = words[0] == "evaluate" or "hf" in words
    own = keys["finetune" if seeing else "distill"]
    words = [own[:4] if word in ("KEY", "3fa9") else word for word in words]
    parse(words)
    how = next((how for parts, _, how in HEAVY if {*parts} <= {*words}), "executed")
    if parse_only or how == "parsed":
        return "parsed"
    if how == "planned":
        invoke(["plan", *without(words[1:], (options_of("run") - options_of("plan")) | LIMITS)])
    elif how == "listed":
        invoke([*words, "--json"])
    else:
        name = " ".join(words[:2]) if words[0] == "data" else words[0]
        invoke([*small_models(words), *SMALL.get(name, [])])
    return how


def options_of(name: str) -> set[tuple[str, bool]]:
    """The options of a command, each with whether it is a flag."""
    command: Any = typer.main.get_command(app)
    for part in name.split():
        command = command.commands[part]
    every = [(option, p) for p in command.params for option in (*p.opts, *p.secondary_opts)]
    return {(option, getattr(p, "is_flag", False)) for option, p in every if option[0] == "-"}


def without(words: list[str], options: set[tuple[str, bool]]) -> list[str]:
    """Leaves options out, with their values."""
    kept: list[str] = []
    flags, skip = dict(options), False
    for word in words:
        if not skip and word not in flags:
            kept.append(word)
        skip = word in flags and not flags[word]
    return kept


def small_models(words: list[str]) -> list[str]:
    """Puts a tiny pair in the place of pretrained models, whose names must be known."""
    found = list(words)
    for place in {"zero-shot": [1], "cka": [1, 2]}.get(words[0], []):
        if words[place] in ROLES or not re.fullmatch("[0-9a-f]{4,16}", words[place]):
            resolve(words[place])
            found[place] = "clip"
    return found


def run_command(words: list[str], keys: dict[str, str], parse_only: bool) -> str:
    """Executes a command or what stands for it; gives what was done."""
    program, *rest = words
    if program == "kdscale":
        return run_kdscale(rest, keys, parse_only)
    if program == "python" and rest[0].endswith(".py"):
        return run_kdscale(["run", *rest], keys, parse_only)
    if program in ("python", "sed"):
        place = sys.executable if program == "python" else shutil.which("sed")
        done = subprocess.run([str(place), *rest], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return "executed"
    if program == "make":
        assert rest, "a target is missing"
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert {*rest} <= {*targets}, f"the Makefile has {targets}"
        return "known"
    if program == "lmms_eval":
        assert "kdscale" in {point.name for point in entry_points(group="lmms_eval.models")}
        return "known"
    assert program in OTHERS, "what is this? Execute it, or name it in OTHERS"
    return "known"


@pytest.mark.parametrize("path", DOCS, ids=NAMES)
def test_commands(path: Path, world: dict[str, str]) -> None:
    """In the order of the page: a later command may read what an earlier one has written."""
    wrong: list[str] = []
    for block in blocks(path):
        if block.lang not in SHELL_LANGUAGES:
            continue
        found = commands(block)
        assert found, f"{block.place}: no command"
        for words in found:
            try:
                run_command(words, world, block.parse_only)
            except Exception as error:
                wrong.append(f"{block.place}: {' '.join(words)}\n  {error!r}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", DOCS, ids=NAMES)
def test_other_blocks(path: Path, world: dict[str, str]) -> None:
    """Sweeps are planned, other Python is executed, data are read; words are no commands."""
    for block in blocks(path):
        if block.lang in SHELL_LANGUAGES:
            continue
        if block.lang == "python":
            run_python(block)
        elif block.lang == "json":
            json.loads(block.text)
        elif block.lang == "toml":
            Path("prices.toml").write_text(block.text)
            for name in tomllib.loads(block.text)["accelerators"]:
                find_rates(name, prices=Path("prices.toml"))
        else:
            assert block.lang in WORDS, f"{block.place}: {block.lang}?"
            lines = block.text.splitlines()
            assert not [x for x in lines if x.split() and x.split()[0] in ("kdscale", "make")], (
                f"{block.place} holds commands: call it bash"
            )


def run_python(block: Block) -> None:
    """Plans a sweep, or executes the lines with kdscale's names at hand."""
    tree = ast.parse(block.text)
    if "Sweep(" in block.text and not block.parse_only:
        file = Path(f"{block.path.stem}_{block.line}.py")
        file.write_text(block.text)
        assert json.loads(invoke(["plan", str(file), "--json"]))["stages"], block.place
        return
    if block.parse_only:
        tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    public = {name: getattr(kdscale, name) for name in kdscale.__all__}
    exec(compile(tree, block.place, "exec"), {"__name__": "docs"} | public)


# What stands within lines.


def spans(path: Path) -> list[str]:
    """Everything between two single backquotes outside of blocks."""
    return SPAN.findall(FENCE.sub("", path.read_text()))


def every_option() -> set[str]:
    """All options of all commands."""
    found, left = set[str](), [(typer.main.get_command(app), "")]
    while left:
        command, name = left.pop()
        if hasattr(command, "commands"):
            left += [(c, f"{name} {n}".strip()) for n, c in command.commands.items()]  # type: ignore[attr-defined]
        else:
            found |= {option for option, _ in options_of(name)}
    return found


@pytest.mark.parametrize("path", DOCS, ids=NAMES)
def test_what_lines_name_exists(path: Path) -> None:
    """Commands and options within lines, targets of make, files, and links."""
    page, known = path.read_text(), every_option()
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    wrong = [span for span in spans(path) if not exists(span, known, targets)]
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", page)]
    wrong += [x for x in links if x and "://" not in x and not (path.parent / x).exists()]
    assert not wrong


def exists(span: str, options: set[str], targets: list[str]) -> bool:
    """Whether what a line names is there; of other words than commands and files nobody asks."""
    words = span.split()
    if words and words[0] == "make" and len(words) > 1:
        return words[1] in targets
    if words and words[0] == "kdscale" and len(words) > 1:
        name = words[1] if words[1] != "data" else " ".join(words[1:3])
        command: Any = typer.main.get_command(app)
        for part in name.split():
            if part not in getattr(command, "commands", {}):
                return False
            command = command.commands[part]
        own = {option for option, _ in options_of(name)}
        return all(word.partition("=")[0] in own for word in words if word.startswith("--"))
    if words and words[0].startswith("--"):
        return words[0].partition("=")[0] in options | THEIR_OPTIONS
    if re.fullmatch(r"(kdscale|tests|sweeps|benchmarks|docs)/[\w/.-]+", span):
        return (ROOT / span).exists()
    return True


def test_numbers_of_the_study(world: dict[str, str]) -> None:
    """What the page on reproducing says of each sweep is what its plan says."""
    text = (ROOT / "docs" / "reproducing.md").read_text()
    number = r"\*{0,2}([\d,]+)\*{0,2}"
    row = re.compile(
        rf"^\| (.+) \| {number} \| {number} \((\d+)[^)]*\)" + rf" \| {number}" * 3, re.M
    )
    found = {files: numbers for files, *numbers in row.findall(text)}
    assert len(found) == 11
    for files, numbers in found.items():
        names = re.findall(r"`(\w+\.py)`", files)
        names = names or [name[1:-1] for name in found if re.match("`(table|figure)", name)]
        options = [*(f"sweeps/{name}" for name in names), "--scale", "paper", "--no-gates"]
        plan = json.loads(invoke(["plan", *options, "--json"]))
        own = [stage["gpu_hours"] for stage in plan["stages"] if stage["kind"] == "distill"]
        teachers = plan["teacher_cache"]
        cached = sum(own) - teachers["online_gpu_hours"] + teachers["cached_gpu_hours"]
        hours = [round(x) for x in (plan["cost"]["gpu_hours"], sum(own), cached)]
        counted = [len(plan["trials"]), len(plan["stages"]), len(own), *hours]
        assert counted == [int(said.replace(",", "")) for said in numbers], files


def test_the_plan_that_is_taken_apart(world: dict[str, str]) -> None:
    text = (ROOT / "docs" / "concepts.md").read_text()
    command, said = re.findall(r"`kdscale (plan [^`]+)` says\n\n```\n(.*?)\n```", text, re.S)[0]
    assert said in invoke(command.split())


def test_errors_are_there_and_begin_as_listed() -> None:
    """Names are those of exceptions, words those of messages in the source."""
    rows = re.findall(r"^\| (`\w+`)? *\| (.*?) \|", (ROOT / "docs" / "faq.md").read_text(), re.M)
    said, errors = texts_and_errors()
    names = [name.strip("`") for name, _ in rows if name]
    assert len(names) > 30
    assert not {*names} - errors
    begun = [words for _, text in rows for words in SPAN.findall(text)]
    pieces = [piece.strip(" '.") for words in begun for piece in words.split("...")]
    assert not [piece for piece in pieces if piece not in said]


def texts_and_errors() -> tuple[str, set[str]]:
    """All texts of the package, and the names of its exceptions."""
    texts, bases = list[str](), dict[str, set[str]]()
    for file in (ROOT / "kdscale").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
            elif isinstance(node, ast.ClassDef):
                bases[node.name] = {base.id for base in node.bases if isinstance(base, ast.Name)}
    errors = {"KdscaleError"}
    while more := {name for name, above in bases.items() if above & errors} - errors:
        errors |= more
    return "\n".join(texts), errors
