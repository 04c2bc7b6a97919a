"""The house rules as a test: layers, sizes and banned calls."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "penstock"

# Each layer may import from the layers below its own, and from its own package; siblings never meet.
LAYERS: list[set[str]] = [
    {"errors"},
    {"shapes", "checked"},
    {"core", "wire"},
    {"ports", "clock", "detached"},
    {"net", "logs", "kubernetes"},
    {"metrics"},
    {"engines", "discovery", "link", "transfer"},
    {"router", "worker"},
    {"frontend"},
    {"options"},
    {"graph", "assembly"},
    {"launcher", "bench", "operator"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# Third parties that may only be touched in one place.
KEPT_IN = {
    "vllm": ("engines/vllm/",),
    "torch": ("engines/vllm/",),
    "zmq": ("engines/vllm/",),
    "nixl": ("transfer/nixl", "engines/vllm/inside/connector"),
    "httpx2": ("discovery/etcd", "kubernetes/"),
    "lightkube": ("kubernetes/",),
    "cryptography": ("operator/",),
    "numpy": ("engines/reference/", "transfer/"),
    "tokenizers": ("frontend/text/",),
    "starlette": ("frontend/",),
    "uvicorn": ("frontend/http/", "worker/probes", "net/http_server", "operator/server"),
    "jinja2": ("frontend/text/",),
    "typer": ("cli", "bench/"),
    "rich": ("cli", "bench/", "launcher/"),
    "yaml": ("graph", "cli", "kubernetes/"),
    "prometheus_client": ("metrics", "operator/metrics"),
}

# core/ and wire/ decide: no IO, no time of their own, no randomness of their own.
PURE_BANNED_IMPORTS = {"asyncio", "socket", "threading", "time", "os", "subprocess", "ssl", "selectors"}

MAX_LINES = 500
MAX_FUNCTION_LINES = 70

MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = sorted(
    path
    for folder in ("penstock", "simulator", "tests", "benchmarks", "examples", "models")
    for path in (ROOT / folder).rglob("*.py")
)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> list[str]:
    found = []
    for branch in ast.walk(tree):
        if isinstance(branch, ast.Import):
            found += [alias.name for alias in branch.names]
        elif isinstance(branch, ast.ImportFrom):
            assert branch.level == 0, "relative import"
            found.append(branch.module or "")
            if branch.module == "penstock":
                found += [f"penstock.{alias.name}" for alias in branch.names]
    return found


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_down_only(path: Path) -> None:
    own = layer_of(path)
    if own == "__init__":
        return
    assert own in LEVEL, f"give {own} a layer"
    for module in imports(parsed(path)):
        parts = module.split(".")
        if parts[0] != "penstock" or len(parts) < 2 or parts[1] == "__version__":
            continue
        other = parts[1]
        assert other == own or LEVEL[other] < LEVEL[own], f"{own} imports {module}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_third_parties_stay_in_their_place(path: Path) -> None:
    place = str(path.relative_to(PACKAGE))
    for module in imports(parsed(path)):
        allowed = KEPT_IN.get(module.split(".")[0])
        assert allowed is None or place.startswith(allowed), f"{module} is kept in {allowed}"


@pytest.mark.parametrize("path", [p for p in MODULES if layer_of(p) in ("core", "wire")], ids=name_of)
def test_what_decides_is_pure(path: Path) -> None:
    tree = parsed(path)
    banned = {module.split(".")[0] for module in imports(tree)} & PURE_BANNED_IMPORTS
    assert not banned, f"imports {banned}"
    for branch in ast.walk(tree):
        assert not isinstance(branch, ast.Await | ast.AsyncFunctionDef | ast.AsyncFor | ast.AsyncWith)
        if isinstance(branch, ast.Call) and isinstance(branch.func, ast.Attribute):
            target = branch.func.value
            module_random = isinstance(target, ast.Name) and target.id == "random"
            assert not module_random or branch.func.attr == "Random", "randomness comes as a parameter"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_sizes(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if path.is_relative_to(PACKAGE):
        assert text.count("\n") <= MAX_LINES, "split this file"
    for branch in ast.walk(ast.parse(text)):
        if isinstance(branch, ast.FunctionDef | ast.AsyncFunctionDef):
            assert branch.end_lineno is not None
            length = branch.end_lineno - branch.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{branch.name} has {length} lines"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(parsed(path)), "no module docstring"


def test_the_structure_page_names_the_layers() -> None:
    page = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")
    block = page.partition("## Who may import whom")[2].partition("\n## ")[0]
    named = [set(line.strip().split(", ")) for line in block.splitlines() if line.startswith("    ")]
    assert named == LAYERS[::-1]


def test_the_structure_page_names_every_module_once() -> None:
    lines = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8").splitlines()
    first_cells = [line.split("|")[1] for line in lines if line.startswith("| `")]
    named = [name for cell in first_cells for name in re.findall(r"`([\w/]+\.py)`", cell)]
    # An __init__.py that only says what its package is has nothing to find in it.
    modules = [path for path in MODULES if path.name != "__init__.py" or len(parsed(path).body) > 1]
    assert sorted(named) == sorted(str(path.relative_to(PACKAGE)) for path in modules)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_error_is_swallowed(path: Path) -> None:
    for branch in ast.walk(parsed(path)):
        if not isinstance(branch, ast.ExceptHandler):
            continue
        assert branch.type is not None, f"line {branch.lineno}: bare except"
        broad = isinstance(branch.type, ast.Name) and branch.type.id in ("Exception", "BaseException")
        silent = len(branch.body) == 1 and isinstance(branch.body[0], ast.Pass)
        assert not (broad and silent), f"line {branch.lineno}: a broad except that says nothing"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_banned_words(path: Path) -> None:
    if path.name == "test_tidy.py":
        return
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"\b(FIXME|TODO|XXX)\b", text)
    assert not re.search(r"pytest\.(mark\.)?skip|skipif|importorskip", text), (
        "a skipped test hides something"
    )


def test_nothing_uses_except_star() -> None:
    """What is raised inside `except*` comes wrapped into a group before Python 3.11.4."""
    found = [
        f"{path}:{node.lineno}"
        for path in MODULES
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.TryStar)
    ]
    assert found == []
