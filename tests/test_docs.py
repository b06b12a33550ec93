"""The commands, flags, files and links that the documentation names are there."""

import re
import shlex
from itertools import dropwhile
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from headlong.server.cli import app
from support.llama3 import write_config
from support.markdown import (
    PAGES,
    ROOT,
    anchors,
    blocks,
    code_spans,
    links,
    names,
    prose,
    rows,
    section,
)

TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
ALL = "\n".join(TEXTS.values())
PAGE_IDS = [str(page.relative_to(ROOT)) for page in PAGES]
COMMANDS = get_command(app).commands
DEFAULT_COMMANDS = {"bench": "run", "profile": "score"}
SHELLS = ("sh", "bash", "shell", "console")
FLAG = re.compile(r"--[a-z][a-z0-9-]*")
OTHERS = {"--read-only"}
"""Flags that stand alone in backticks and are another program's: Docker's."""
FOLDERS = "server|kernels|cache|profiling|loadtest|demo|tests|benchmarks|docker|docs"


def options(command):
    """All names of a command's options."""
    found = {name for each in command.params for name in (*each.opts, *each.secondary_opts)}
    return {name for name in found if name.startswith("-")} | {"--help"}


def leaves():
    """Every command that runs something, by its words."""
    for name, command in COMMANDS.items():
        if hasattr(command, "commands"):
            yield from ((f"{name} {inner}", each) for inner, each in command.commands.items())
        else:
            yield name, command


EVERY_OPTION = {name for _, command in leaves() for name in options(command)}


def shell_commands(text):
    """The words of each command in the blocks of a shell."""
    for block in (each for language in SHELLS for each in blocks(text, language)):
        plain = re.sub(r"(^|\s)#.*$|^\$ ", "", block.replace("\\\n", " "), flags=re.M)
        # A quoted text may go on over several lines.
        lexer = shlex.shlex(plain, posix=True, punctuation_chars="\n;&|()<>")
        lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
        words = []
        for word in (*lexer, "\n"):
            if set(word) <= set("\n;&|()<>"):
                if words:
                    yield words
                words = []
            else:
                words.append(word)


def named_commands(text):
    """The words of everything that looks like a command: in blocks, and in backticks."""
    indented = re.findall(r"^    (\S.*)$", prose(text), re.M)
    others = (line.split() for line in (*code_spans(text), *indented))
    for words in (*shell_commands(text), *others):
        # What stands before a command sets variables for it.
        call = list(dropwhile(re.compile(r"[A-Z_]+=").match, words))
        if call:
            yield call


def unknown_words(words):
    """What of a call of ``headlong`` does not exist."""
    if len(words) == 1 or words[1].startswith("-"):
        return []
    name, rest = words[1], words[2:]
    if name not in COMMANDS:
        return [name]
    command = COMMANDS[name]
    if hasattr(command, "commands"):
        inner = rest[0] if rest and rest[0] in command.commands else DEFAULT_COMMANDS[name]
        command = command.commands[inner]
    return [
        flag
        for flag in (word.partition("=")[0] for word in rest if word.startswith("-"))
        if flag not in options(command) and flag != "-"
    ]


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_every_call_of_headlong_exists(page):
    calls = [
        words for words in named_commands(TEXTS[page]) if words[0].rpartition("/")[2] == "headlong"
    ]
    wrong = {" ".join(words): unknown for words in calls if (unknown := unknown_words(words))}
    assert not wrong


def test_a_wrong_call_is_found():
    assert unknown_words(["headlong", "serve", "--prot", "1"]) == ["--prot"]
    assert unknown_words(["headlong", "serv"]) == ["serv"]
    assert unknown_words(["headlong", "profile", "demo/model", "--plot", "x.png"]) == []
    assert unknown_words(["headlong", "profile", "show", "--method", "x"]) == ["--method"]


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_every_flag_in_backticks_exists(page):
    flags = {FLAG.match(span)[0] for span in code_spans(TEXTS[page]) if FLAG.match(span)}
    scripts = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("docker/*.sh"))
    assert not flags - EVERY_OPTION - OTHERS - set(FLAG.findall(scripts))


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_every_flag_of_a_benchmark_exists(page):
    for words in named_commands(TEXTS[page]):
        scripts = [word for word in words if re.fullmatch(r"benchmarks/[a-z_]+\.py", word)]
        for script in scripts:
            source = (ROOT / script).read_text(encoding="utf-8")
            for flag in filter(FLAG.fullmatch, words):
                assert f'"{flag}"' in source, (script, flag)


def test_every_flag_of_serve_is_described():
    told = {flag for span in code_spans(ALL) for flag in FLAG.findall(span)}
    assert not options(COMMANDS["serve"]) - told - {"--help"}


@pytest.mark.parametrize("name", [name for name, _ in leaves()])
def test_every_command_is_described(name):
    first, _, second = name.partition(" ")
    short = DEFAULT_COMMANDS.get(first) == second
    words = first if short or not second else f"{first}.*{second}"
    assert re.search(rf"\b{words}\b", ALL)


def test_every_variable_is_a_setting():
    known = {f"HEADLONG_{name.strip('-').replace('-', '_').upper()}" for name in EVERY_OPTION}
    assert not set(re.findall(r"\bHEADLONG_[A-Z_]+[A-Z]\b", ALL)) - known


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_every_link_leads_somewhere(page):
    for target in links(TEXTS[page]):
        if re.match(r"https?:|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        if anchor:
            assert anchor in anchors(there.read_text(encoding="utf-8")), target


def _exists(path: str) -> bool:
    if any(part.isupper() for part in Path(path).with_suffix("").parts):
        return True  # a placeholder
    if "*" in path:
        return any(ROOT.glob(path)) or any(ROOT.glob(f"{path}.py"))
    return (ROOT / path).exists() or (ROOT / f"{path}.py").exists()


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_every_file_is_there(page):
    text = re.sub(r"\]\([^)]*\)|https?://\S+", "", TEXTS[page])
    paths = re.findall(rf"(?<![\w/.$-])(?:{FOLDERS})/[\w./*{{}}-]*", text)
    wrong = [path for each in paths if not _exists(path := each.rstrip(".-"))]
    assert not wrong


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_every_target_of_make_is_there(page):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.M))
    for words in named_commands(TEXTS[page]):
        if words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= targets, words


def test_every_benchmark_is_described():
    scripts = [
        path.stem
        for path in (ROOT / "benchmarks").glob("*.py")
        if "__main__" in path.read_text(encoding="utf-8")
    ]
    text = TEXTS[ROOT / "docs" / "benchmarks.md"]
    assert scripts
    assert not [name for name in scripts if f"`{name}`" not in prose(text)]


def test_the_plan_that_is_shown_is_printed(tmp_path):
    text = TEXTS[ROOT / "docs" / "operating.md"]
    words = next(words for words in shell_commands(text) if words[:2] == ["headlong", "plan"])
    words[2] = str(write_config(tmp_path))
    plain = CliRunner().invoke(app, words[1:]).stdout
    printed = {line.rstrip() for line in plain.splitlines()}
    shown = next(each for each in blocks(text, "") if each.startswith("weights"))
    assert {line.rstrip() for line in shown.splitlines()} <= printed
    (flags,) = (span for span in code_spans(text) if span.startswith("--kv-cache-dtype int4"))
    projected = CliRunner().invoke(app, [*words[1:], *flags.split()]).stdout
    (tokens,) = re.findall(r"would hold ([\d ]+) tokens", text)
    assert re.search(rf"^longest context, tokens +{tokens} ", projected, re.M)


def test_every_metric_that_is_named_is_listed():
    listed = {
        name
        for cells in rows(TEXTS[ROOT / "docs" / "observability.md"])
        for name in names(cells[0])
    }
    ending = re.compile(r"[a-z0-9_]+_(?:total|seconds|perc|nats|agreement|running|waiting)\b")
    named = [
        found[0]
        for page in ("operating.md", "benchmarks.md", "profile-your-model.md", "docker.md")
        for span in code_spans(TEXTS[ROOT / "docs" / page])
        if (found := ending.match(span))
    ]
    assert named
    assert not set(named) - listed


def test_every_complaint_that_is_explained_is_one():
    sources = "".join(
        path.read_text(encoding="utf-8")
        for folder in ("profiling", "server")
        for path in (ROOT / folder).rglob("*.py")
    )
    sources = re.sub(r'"\s*\n\s*f?"', "", sources)
    page = TEXTS[ROOT / "docs" / "profile-your-model.md"]
    told = [names(cells[0]) for cells in rows(section(page, "7. What goes wrong"))]
    messages = [message for (message,) in filter(None, told)]
    assert len(messages) > 5
    for message in messages:
        # What differs from case to case: numbers, names in quotes, and what is left out.
        piece = max(re.split(r"'…'|'\w+'|…|\d+|\(\w+\)|: ", message), key=len)
        assert piece in sources, message
