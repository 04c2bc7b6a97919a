"""The house rules as tests. Each names all that break its rule at once, by file and line."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "penstock"

# Each layer may import from the layers below its own, and from its own package; siblings never meet.
LAYERS: list[set[str]] = [
    {"errors"},
    {"shapes", "checked"},
    {"core", "wire"},
    {"ports", "clock", "detached"},
    {"net", "logs", "kubernetes"},
    {"metrics", "tracing"},
    {"engines", "discovery", "link", "transfer"},
    {"router", "worker"},
    {"frontend"},
    {"options"},
    {"graph", "assembly"},
    {"launcher", "bench", "operator"},
    {"simulate"},
    {"plan"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# The modules of the package's root. Every other module has a place in a package of its layer.
ROOT_MODULES = {
    "__init__",
    "__main__",
    "assembly",
    "checked",
    "clock",
    "detached",
    "errors",
    "metrics",
    "ports",
    "shapes",
    "tracing",
}

# Third parties that may only be touched in one place.
KEPT_IN = {
    "vllm": ("engines/vllm/",),
    "torch": ("engines/vllm/",),
    "zmq": ("engines/vllm/",),
    "nixl": ("transfer/nixl", "engines/vllm/inside/connector"),
    "httpx2": ("discovery/etcd", "kubernetes/"),
    "lightkube": ("kubernetes/",),
    "cryptography": ("operator/",),
    "numpy": ("engines/active", "engines/reference/", "transfer/", "core/cost_columns"),
    "tokenizers": ("frontend/text/",),
    "starlette": ("frontend/",),
    "uvicorn": ("frontend/http/", "worker/probes", "net/http_server", "operator/server"),
    "jinja2": ("frontend/text/",),
    "typer": ("cli", "bench/", "simulate/command", "simulate/load_flags", "plan/"),
    "rich": ("cli", "bench/", "launcher/", "simulate/command", "plan/"),
    "yaml": ("graph", "cli", "kubernetes/"),
    "opentelemetry": ("tracing",),
    "matplotlib": ("simulate/plot",),
    "prometheus_client": ("metrics", "operator/metrics", "worker/metrics", "engines/vllm/metrics"),
}

# core/ and wire/ decide: no IO, no time of their own, no randomness of their own.
PURE_BANNED_IMPORTS = {"asyncio", "socket", "threading", "time", "os", "subprocess", "ssl", "selectors"}

MAX_LINES = 500
MAX_FUNCTION_LINES = 70

# Class names in several files, and in how many: two versions of one manifest describe the same things, and
# a port is named as what fulfils it. Whoever shares a name for another reason gives both precise ones.
SHARED_CLASS_NAMES = {
    "PodMetadata": 2,
    "Restart": 2,
    "Ticket": 2,
}


@dataclass(frozen=True)
class Source:
    """A file of Python, parsed once for all rules."""

    path: Path
    text: str
    tree: ast.Module
    nodes: list[ast.AST]

    @property
    def place(self) -> str:
        """Where it is in the package, such as `core/costs.py`."""
        return str(self.path.relative_to(PACKAGE))

    @property
    def layer(self) -> str:
        return self.place.split("/")[0].removesuffix(".py")

    def at(self, node: ast.AST | None = None) -> str:
        """This file, or a line of it, as an editor opens it."""
        line = getattr(node, "lineno", None)
        return f"{self.path.relative_to(ROOT)}{f':{line}' if line else ''}"

    def imports(self) -> Iterator[tuple[ast.AST, str]]:
        for node in self.nodes:
            if isinstance(node, ast.Import):
                yield from ((node, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield node, "." * node.level + (node.module or "")
                if node.module == "penstock":
                    yield from ((node, f"penstock.{alias.name}") for alias in node.names)


def read(path: Path) -> Source:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    return Source(path, text, tree, list(ast.walk(tree)))


@cache
def sources() -> list[Source]:
    """All Python of the repository. Read on first use, and not by whoever only collects tests."""
    folders = ("penstock", "simulator", "tests", "checks", "benchmarks", "examples", "models")
    return [read(path) for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def modules() -> list[Source]:
    """What is in the package."""
    return [source for source in sources() if source.path.is_relative_to(PACKAGE)]


def nothing(found: list[str], rule: str) -> None:
    assert not found, f"{rule}:\n" + "\n".join(found)


def structure_page() -> str:
    return (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")


def test_imports_go_down_only() -> None:
    found = []
    for source in modules():
        own = LEVEL.get(source.layer, len(LAYERS))
        for node, module in source.imports():
            root, _, rest = module.partition(".")
            other = rest.split(".")[0]
            if module.startswith("."):
                found.append(f"{source.at(node)} has a relative import")
            elif root == "penstock" and other != source.layer and LEVEL.get(other, -1) >= own:
                found.append(f"{source.at(node)} imports {module}")
    nothing(found, "a layer may import only from the layers below its own")


def test_every_module_has_a_layer_and_the_root_holds_only_its_own() -> None:
    nothing(
        [source.at() for source in modules() if source.layer not in LEVEL and source.layer != "__init__"],
        "give each of these a layer",
    )
    root = {source.layer for source in modules() if "/" not in source.place}
    assert root == ROOT_MODULES, "the package's root holds other modules than ROOT_MODULES"


def test_third_parties_are_imported_in_their_places_only() -> None:
    found = []
    for source in modules():
        for node, module in source.imports():
            allowed = KEPT_IN.get(module.split(".")[0])
            if allowed is not None and not source.place.startswith(allowed):
                found.append(f"{source.at(node)} imports {module}, which only {', '.join(allowed)} may")
    nothing(found, "each of these third parties has its places")


def test_core_and_wire_are_pure() -> None:
    pure = [source for source in modules() if source.layer in ("core", "wire")]
    found = [
        f"{source.at(node)} imports {module}"
        for source in pure
        for node, module in source.imports()
        if module.split(".")[0] in PURE_BANNED_IMPORTS
    ]
    for source in pure:
        for node in source.nodes:
            match node:
                case ast.Await() | ast.AsyncFunctionDef() | ast.AsyncFor() | ast.AsyncWith():
                    found.append(f"{source.at(node)} is async")
                case ast.Attribute(ast.Name("random"), attr=name) if name != "Random":
                    found.append(f"{source.at(node)} uses random.{name}: take a random.Random instead")
    nothing(found, "core/ and wire/ do no IO and have neither time nor randomness of their own")


def test_modules_and_functions_are_short() -> None:
    found = [
        f"{source.at()} has {lines} lines"
        for source in modules()
        if (lines := source.text.count("\n")) > MAX_LINES
    ]
    for source in sources():
        for node in source.nodes:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    found.append(f"{source.at(node)} {node.name} has {length} lines")
    nothing(found, f"at most {MAX_LINES} lines a module, {MAX_FUNCTION_LINES} a function")


def test_every_module_has_a_docstring() -> None:
    nothing([source.at() for source in modules() if not ast.get_docstring(source.tree)], "no docstring")


def test_every_class_name_means_one_thing() -> None:
    places = {
        (node.name, source.place)
        for source in modules()
        for node in source.nodes
        if isinstance(node, ast.ClassDef)
    }
    found = [
        f"{name}: {', '.join(sorted(place for other, place in places if other == name))}"
        for name, number in sorted(Counter(name for name, _ in places).items())
        if number != SHARED_CLASS_NAMES.get(name, 1)
    ]
    nothing(found, "one name for several classes: give each a precise one")


def test_the_structure_page_names_the_layers() -> None:
    block = structure_page().partition("## Who may import whom")[2].partition("\n## ")[0]
    named = [set(line.strip().split(", ")) for line in block.splitlines() if line.startswith("    ")]
    assert named == LAYERS[::-1]


def test_the_structure_page_names_every_module_once() -> None:
    first_cells = [line.split("|")[1] for line in structure_page().splitlines() if line.startswith("| `")]
    named = Counter(name for cell in first_cells for name in re.findall(r"`([\w/]+\.py)`", cell))
    # An __init__.py that only says what its package is has nothing to find in it.
    there = {it.place for it in modules() if it.path.name != "__init__.py" or len(it.tree.body) > 1}
    nothing([f"{it} has no row" for it in sorted(there - named.keys())], "docs/structure.md")
    nothing([f"{it} does not exist" for it in sorted(named.keys() - there)], "docs/structure.md")
    nothing([f"{it} has {number} rows" for it, number in named.items() if number > 1], "docs/structure.md")


def test_no_error_is_swallowed() -> None:
    found = []
    for source in modules():
        for node in source.nodes:
            if not isinstance(node, ast.ExceptHandler):
                continue
            if node.type is None:
                found.append(f"{source.at(node)} is a bare except")
                continue
            broad = ast.unparse(node.type) in ("Exception", "BaseException")
            if broad and len(node.body) == 1 and isinstance(node.body[0], ast.Pass):
                found.append(f"{source.at(node)} is a broad except that says nothing")
    nothing(found, "errors must be handled, or go on")


def test_nothing_uses_except_star() -> None:
    """What is raised inside `except*` comes wrapped into a group before Python 3.11.4."""
    found = [it.at(node) for it in modules() for node in it.nodes if isinstance(node, ast.TryStar)]
    nothing(found, "except*")


def test_nothing_is_left_to_do_and_no_test_is_skipped() -> None:
    banned = re.compile(r"\b(FIXME|TODO|XXX)\b|pytest\.(mark\.)?skip|skipif|importorskip")
    found = [
        f"{source.path.relative_to(ROOT)}:{number} {line.strip()}"
        for source in sources()
        if source.path != Path(__file__)
        for number, line in enumerate(source.text.splitlines(), 1)
        if banned.search(line)
    ]
    nothing(found, "do it now; a skipped test hides something")


# Private members of others that are used all the same, by file. The list only gets shorter.
USED_PRIVATE_MEMBERS = {
    "penstock/engines/vllm/differences.py": {
        "_call_utility_async",
        "_grammar_from_parser",
    },  # vLLM offers them in public since 0.32
    "penstock/engines/vllm/inside/generators.py": {
        "_bookkeeping_sync",
        "_sample",
    },  # replaces parts of vLLM
    "penstock/engines/vllm/sampling.py": {"_bad_words_token_ids"},  # vLLM tokenizes them itself otherwise
    "simulator/loop.py": {"_context", "_run"},  # asyncio offers its event loops nothing else
}

# Documented, whatever their names look like.
PUBLIC_IN_SPITE_OF_THEIR_NAMES = {"os._exit", "_asdict", "_fields", "_make", "_replace"}


def private_members_defined(source: Source) -> set[str]:
    """What the classes of a module give to their objects: methods, fields, and what is assigned to self."""
    found = set()
    for branch in source.nodes:
        if isinstance(branch, ast.ClassDef):
            for inner in branch.body:
                if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef):
                    found.add(inner.name)
                targets = (
                    inner.targets if isinstance(inner, ast.Assign) else [getattr(inner, "target", None)]
                )
                found.update(target.id for target in targets if isinstance(target, ast.Name))
        elif (
            isinstance(branch, ast.Attribute) and isinstance(branch.ctx, ast.Store) and is_own(branch.value)
        ):
            found.add(branch.attr)
    return found


def is_own(value: ast.expr) -> bool:
    """Whether an expression is `self`, `cls` or `super()`."""
    if isinstance(value, ast.Call):
        return isinstance(value.func, ast.Name) and value.func.id == "super"
    return isinstance(value, ast.Name) and value.id in ("self", "cls")


def private_members_used(source: Source) -> set[tuple[str, int]]:
    """Private attributes of objects whose class is in another module, and private names that are imported.
    Names decide: an attribute that a class of this module has as well is taken for that one."""
    own, found = private_members_defined(source), set()
    for branch in source.nodes:
        if isinstance(branch, ast.Attribute) and not is_own(branch.value) and branch.attr not in own:
            if not {branch.attr, ast.unparse(branch)} & PUBLIC_IN_SPITE_OF_THEIR_NAMES:
                found.add((branch.attr, branch.lineno))
        elif isinstance(branch, ast.ImportFrom) and (branch.module or "").startswith(
            ("penstock", "simulator")
        ):
            found.update((alias.name, branch.lineno) for alias in branch.names)
    return {(name, line) for name, line in found if name.startswith("_") and not name.startswith("__")}


def test_nobody_uses_private_members_of_another_module() -> None:
    used = {
        source.at(): private_members_used(source)
        for source in sources()
        if source.at().startswith(("penstock/", "simulator/"))
    }
    wrong = [
        f"{path}:{line}: {name}"
        for path, its in used.items()
        for name, line in sorted(its)
        if name not in USED_PRIVATE_MEMBERS.get(path, set())
    ]
    nothing(wrong, "offer a public attribute, or statistics()")
    not_used = {
        path: left
        for path, names in USED_PRIVATE_MEMBERS.items()
        if (left := names - {name for name, _ in used.get(path, set())})
    }
    assert not_used == {}, "delete these from USED_PRIVATE_MEMBERS"
