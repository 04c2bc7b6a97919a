"""What the pages name exists: links, headings, files of the package, flags."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.main import get_command

from penstock.cli import build_app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def _prose(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def _anchors(page: Path) -> set[str]:
    """As GitHub names headings: lower case, without punctuation, with hyphens for spaces."""
    headings = re.findall(r"^#+ (.+)$", _prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_in_pages_lead_somewhere() -> None:
    broken = []
    for page in PAGES:
        for target in LINK.findall(_prose(page)):
            if target.startswith(("http:", "https:")):
                continue
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            if not file.exists() or (anchor and anchor not in _anchors(file)):
                broken.append(f"{page.name}: {target}")
    assert broken == []


def test_modules_in_pages_exist() -> None:
    missing = []
    for page in PAGES:
        names = re.findall(r"`((?:[a-z_]+/)+(?:\w+\.py)?)`", _prose(page))
        missing += [
            f"{page.name}: {name}"
            for name in names
            if not any((base / name).exists() for base in (ROOT / "penstock", ROOT))
        ]
    assert missing == []


def test_terms_of_the_glossary_are_in_alphabetical_order() -> None:
    rows = re.findall(r"^\| (.+?) \|", _prose(ROOT / "docs" / "glossary.md"), flags=re.MULTILINE)[1:]
    terms = [row.lower() for row in rows]
    assert terms == sorted(terms)


def test_flags_of_penstock_commands_in_pages_exist() -> None:
    command = get_command(build_app(["bench"]))
    unknown = []
    for page in PAGES:
        for line in page.read_text(encoding="utf-8").splitlines():
            for name, rest in re.findall(r"penstock ([a-z-]+)((?: [^`#|]*)?)", line):
                if name not in command.commands:  # type: ignore[attr-defined]
                    continue
                options = {
                    option
                    for parameter in command.commands[name].params  # type: ignore[attr-defined]
                    for option in (*parameter.opts, *parameter.secondary_opts)
                }
                flags = re.findall(r"(?<!\S)--[a-z][a-z-]+", rest.partition(" -- ")[0])
                unknown += [f"{page.name}: penstock {name} {flag}" for flag in flags if flag not in options]
    assert unknown == []


def test_reading_path_has_about_as_many_lines_as_the_page_says() -> None:
    page = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")
    path = page.partition("<!-- reading path: begin -->")[2].partition("<!-- reading path: end -->")[0]
    files = set(re.findall(r"`((?:\w+/)*\w+\.py)`", path))
    lines = sum(len((ROOT / "penstock" / name).read_text(encoding="utf-8").splitlines()) for name in files)
    stated = re.search(r"These (\d+) files have about ([\d,]+) lines\.", page)
    assert stated is not None
    assert int(stated[1]) == len(files)
    assert int(stated[2].replace(",", "")) == pytest.approx(lines, rel=0.1)


def test_every_flag_of_a_process_has_a_row_in_the_page_of_use() -> None:
    page = (ROOT / "docs" / "use.md").read_text(encoding="utf-8")
    tables = page.partition("### `penstock frontend` and `penstock worker`")[2]
    first_cells = re.findall(r"^\| (`--.+?) \|", tables, flags=re.MULTILINE)
    described = {flag for cell in first_cells for flag in re.findall(r"`(--[a-z-]+)`", cell)}
    commands = get_command(build_app(["bench"])).commands  # type: ignore[attr-defined]
    flags = {
        option
        for name in ("frontend", "worker", "operator")
        for parameter in commands[name].params
        for option in parameter.opts
        if option.startswith("--")
    }
    assert described == flags - {"--help"}
