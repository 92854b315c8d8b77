"""What README and the documentation show works as it stands there, and says what the code says."""

from __future__ import annotations

import importlib
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import typer.main
from conftest import MODELS
from typer.testing import CliRunner

import eptq_onnx
from eptq_onnx import Gate, demo, runtimes
from eptq_onnx.cli import app
from eptq_onnx.cli.options import options_of
from eptq_onnx.config import PRESET_PASSES, Accuracy, Config, Preset, Reading
from eptq_onnx.config.files import SECTIONS
from eptq_onnx.config.recipes import IMAGE_RECIPES
from eptq_onnx.data import readers
from eptq_onnx.pipeline import PIPELINE
from eptq_onnx.runtimes import bench

ROOT = MODELS.parent
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
}
README = PAGES["README.md"]
OTHERS = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("CONTRIBUTING.md", "CHANGELOG.md")}
BLOCKS = [
    (name, *block)
    for name, text in PAGES.items()
    for block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
]
"""Page, language and text of every block of code."""


NAMES = [c.name or c.callback.__name__ for c in app.registered_commands if c.callback]


def _commands(text: str) -> list[str]:
    return re.findall(rf"^eptq-onnx ((?:{'|'.join(NAMES)})\b.*)$", text, re.MULTILINE)


def _marks(page: str) -> list[pytest.MarkDecorator]:
    """What README shows runs in every environment."""
    return [] if page == "README.md" else [pytest.mark.once]


RUN = [
    pytest.param(page, id=page, marks=_marks(page))
    for page in PAGES
    if any(name == page and lang in ("bash", "python") for name, lang, _ in BLOCKS)
]
"""Pages with blocks that are run, in order, in one folder: each may build on those before."""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shipped models, and the files of ``eptq-onnx demo``."""
    shutil.copytree(MODELS, tmp_path / "models", ignore=shutil.ignore_patterns("__pycache__"))
    demo.write(tmp_path)
    (tmp_path / "metric.py").unlink()  # pages show it
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "_LOADS", 1)  # each is a process
    return tmp_path


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "tools")
    import pages

    return pages


def help_of(command: str) -> str:
    """Return the help of a command; of no command, that of the program."""
    return CliRunner().invoke(app, [*command.split(), "--help"], env={"COLUMNS": "200"}).output


@pytest.fixture(scope="module")
def help_text() -> str:
    return help_of("quantize")


@pytest.mark.parametrize("page", RUN)
def test_what_a_page_shows_runs(workplace, page):
    """A snippet that begins with the name of a file is that file."""
    namespace: dict = {"__name__": page}
    blocks = [
        (lang, text, re.match(r"# (\w+)\.py$", text, re.MULTILINE))
        for name, lang, text in BLOCKS
        if name == page
    ]
    for _, text, file in blocks:
        if file:
            Path(f"{file[1]}.py").write_text(text, encoding="utf-8")
            sys.modules.pop(file[1], None)
    importlib.invalidate_caches()
    before = set(Path().rglob("*.onnx"))
    for lang, text, file in blocks:
        if lang == "python" and not file:
            exec(compile(text, page, "exec"), namespace)
        elif lang == "bash":
            _run(text)
    assert set(Path().rglob("*.onnx")) - before


def _run(text: str) -> None:
    for line in text.splitlines():
        program, *arguments = shlex.split(line)
        if program == "python":
            runpy.run_path(arguments[0])
            continue
        assert program == "eptq-onnx"
        result = CliRunner().invoke(app, arguments)
        # Which file is slower depends on the machine.
        assert result.exit_code in ((0, 1) if arguments[0] == "bench" else (0,)), result.output


def test_there_is_something_to_check_and_not_too_much():
    pages = {page for page, lang, _ in BLOCKS if lang in ("bash", "python")}
    assert {
        "README.md",
        "docs/getting-started.md",
        "docs/choosing-bits.md",
        "docs/tutorial-photos.md",
    } <= pages
    langs = [lang for page, lang, _ in BLOCKS if page == "README.md"]
    assert {"bash", "python"} <= set(langs)
    assert len(RUN) <= 16


def test_commands_stand_where_they_are_run():
    """What is only an illustration is marked as text; nothing else may show a command that no test runs."""
    for page, text in PAGES.items():
        shown = [
            (lang, command) for name, lang, block in BLOCKS if name == page for command in _commands(block)
        ]
        assert len(_commands(text)) == len(shown), page
        assert {lang for lang, _ in shown} <= {"bash", "text"}, page
    assert {lang for _, lang, _ in BLOCKS} <= {"bash", "python", "console", "text", "toml"}


SHOWN = sorted({command for _, lang, text in BLOCKS if lang == "text" for command in _commands(text)})


@pytest.mark.parametrize("command", SHOWN)
def test_commands_that_are_only_shown_have_options_that_are_taken(command):
    name, *arguments = shlex.split(command)
    found = typer.main.get_group(app).commands[name].make_context(name, arguments).params
    given = {key: value for key, value in found.items() if value not in (None, ())}
    for options in (Config, Reading, Gate):
        options(**options_of(options, given))


def test_readme_is_short():
    assert len(README.split()) <= 900


def test_presets_and_defaults_are_those_of_the_code():
    for preset, text in (
        (Preset.BALANCED, "`balanced`: up to {} float passes of"),
        (Preset.BALANCED, "up to {1} with weights below 4"),
    ):
        assert text.format(*PRESET_PASSES[preset]) in PAGES["docs/getting-started.md"]
    config = Config()
    assert (config.attention.value, config.rounding.value, config.optimizer.value) == (
        "channel",
        "straight-through",
        "adam",
    )
    for name in ("weight_bits", "activation_bits", "edge_bits"):
        assert f"| `--{name.replace('_', '-')}` | {getattr(config, name)} |" in PAGES["docs/choosing-bits.md"]


def test_the_page_of_options_holds_all_of_them(pages, help_text):
    page = pages.on_page_markdown(PAGES["docs/options.md"])
    assert "<!--" not in page
    for section in SECTIONS.values():
        assert f"Table `[{section}]`" in page
    rows = re.findall(r"^\| (`.*?) \| (.*?) \| (.*) \|$", page, re.MULTILINE)
    fields = {**Config.model_fields, **Reading.model_fields, **Accuracy.model_fields}
    assert len(rows) == len(fields) + 10, (
        "the options, the model, its samples, four outputs, a file of options, and how the command prints"
    )
    listed = re.findall(r"`(--[a-z-]+)", " ".join(flags for flags, _, _ in rows))
    assert set(listed) <= set(re.findall(r"--[a-z-]+", help_text))
    assert set(re.findall(r"^ +(?:-\w, )?(--[a-z-]+)", help_text, re.MULTILINE)) - set(listed) <= {"--help"}
    words = " ".join(re.sub(r"(?<=\w)-\s+", "-", help_text).split())  # lines break behind hyphens
    for flags, default, text in rows:
        assert text, flags
        assert default in ("required", "none", "off") or f"[default: {default}]" in words, flags


@pytest.mark.parametrize("page", [name for name in PAGES if name.startswith("docs/")])
def test_pages_say_what_the_code_says(pages, page):
    """Readers of the repository see the tables, too."""
    assert pages.written(PAGES[page]) == PAGES[page], "run: python tools/pages.py"
    assert pages.END not in pages.on_page_markdown(PAGES[page])


def test_the_page_of_options_is_left_alone_elsewhere(pages):
    assert pages.on_page_markdown(README) == README


def test_options_that_pages_name_exist():
    tools = [path.read_text(encoding="utf-8") for path in ROOT.glob("tools/*.py")]
    known = set(re.findall(r"--[a-z-]+", "".join([help_of(""), *map(help_of, NAMES), *tools])))
    for page, text in PAGES.items():
        own = re.sub(r"^npm .*$", "", text, flags=re.MULTILINE)
        named = set(re.findall(r"(?<![\w-])--[a-z]+(?:-[a-z]+)*", own))
        assert named <= known, page


def test_the_list_of_passes_is_that_of_the_pipeline(pages):
    """It is made from the code; sections of their own, which some passes have, stand in the same order."""
    page = pages.on_page_markdown(PAGES["docs/how-it-works.md"])
    listed = re.findall(r"^(\d+)\. \*\*(.+)\.\*\* (\w.+\.)$", page, re.MULTILINE)
    assert [(int(number), name.lower()) for number, name, _ in listed] == [
        (k, step.name) for k, step in enumerate(PIPELINE, 1)
    ]
    assert not any(text.startswith("See ") for _, _, text in listed)
    headings = [
        title.lower() for title in re.findall(r"^### (.+)$", page.split("## The passes")[1], re.MULTILINE)
    ]
    assert headings == [step.name for step in PIPELINE if step.name in headings]


def test_the_forms_of_data_are_those_that_are_read(pages, help_text):
    page = pages.on_page_markdown(PAGES["docs/data.md"])
    assert "<!--" not in page
    words = " ".join(help_text.split())
    for reader in readers.registered():
        assert f"- {reader.form}\n" in page
        assert (reader.form in words) == reader.on_command_line


def test_the_table_of_recipes_is_that_of_the_code():
    rows = re.findall(r"^\| `([\w-]+)` \| `(fit=.*)` \| .* \|$", PAGES["docs/data.md"], re.MULTILINE)
    assert dict(rows) == IMAGE_RECIPES


def test_the_page_of_runtimes_holds_all_of_them_and_what_the_command_takes(pages):
    page = pages.on_page_markdown(PAGES["docs/runtimes.md"])
    assert "<!--" not in page
    for name, verifier in runtimes.registered().items():
        assert f"| `{name}` | {verifier.about} | {'yes' if verifier.measures else 'no'} |" in page
    listed = set(re.findall(r"^\| `(--[a-z-]+)`(?:, `-\w`)? \|", page, re.MULTILINE))
    own = {"--data", "--runtime", "--threads", "--seconds", "--custom-ops", "--json", "--quiet"}
    assert listed == own | {f"--{name}" for name in Reading.model_fields}
    assert "| `FLOAT QUANTIZED` | required |" in page


def test_the_architecture_names_all_folders_and_files_that_stand_beside_them():
    tree = PAGES["docs/architecture.md"].split("```text")[1].split("```")[0]
    for path in (ROOT / "eptq_onnx").iterdir():
        if path.suffix == ".py" and not path.name.startswith("_"):
            assert f"  {path.name} " in tree
        if (path / "__init__.py").exists():
            assert f"  {path.name}/ " in tree
    for name in re.findall(r"^ +(\w+(?:/|\.py)) ", tree, re.MULTILINE):
        assert (ROOT / "eptq_onnx" / name).exists() or (ROOT / "eptq_onnx" / "graph" / name).exists()
    for folder in ("method", "graph"):
        words = set(re.findall(r"\w+", tree))
        assert {path.stem for path in (ROOT / "eptq_onnx" / folder).glob("[a-z]*.py")} <= words


def test_the_page_of_the_api_holds_all_public_names():
    named = re.findall(r"^::: eptq_onnx\.(\w+)$", PAGES["docs/api.md"], re.MULTILINE)
    assert sorted(named) == sorted(eptq_onnx.__all__)


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    found = re.findall(
        r"^make (\w+)|`make (\w+)`", "\n".join([*PAGES.values(), *OTHERS.values()]), re.MULTILINE
    )
    assert {"demo", "test", "sample", "slow", "docs"} <= {a or b for a, b in found}
    for target in {a or b for a, b in found}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


@pytest.mark.parametrize("page", [*PAGES, *OTHERS])
def test_links_and_files_that_are_named_exist(page):
    text = {**PAGES, **OTHERS}[page]
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        assert link.startswith("https://") or ((ROOT / page).parent / link).exists(), link
    there = re.sub(r"^`[^`]+`, a new file:$", "", text, flags=re.MULTILINE)
    for path in re.findall(r"(?:eptq_onnx|tests|tools|docs|models)/[\w./-]*\w\.(?:py|toml|md)\b", there):
        assert (ROOT / path).exists(), path


def test_the_site_has_all_pages():
    listed = re.findall(
        r"^ +- [\w ]+: ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert sorted(f"docs/{name}" for name in listed) == sorted(
        name for name in PAGES if name.startswith("docs/")
    )
