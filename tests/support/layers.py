"""Who imports whom, read from the source without running it."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "headlong"

# Layer of a module: the longest of these names that its own begins with.
_ENGINE = frozenset({"server.errors", "server.engine"})
_CORE = frozenset({"server", "server.telemetry", *_ENGINE})

ALLOWED: dict[str, frozenset[str]] = {
    "kernels": frozenset({"kernels"}),
    "cache": frozenset({"cache", "kernels"}),
    "profiling": frozenset({"profiling"}),
    "loadtest": frozenset({"loadtest", "profiling"}),
    "demo": frozenset({"demo", "profiling"}),
    "server.errors": frozenset({"server.errors"}),
    "server.engine": frozenset({"kernels", "cache", "profiling", *_ENGINE}),
    "server.telemetry": _CORE,
    "server": _CORE,
    "server.api": frozenset({"server.api", *_CORE}),
    "server.fleet": frozenset({"server.fleet", *_CORE}),
    # What puts rooms together.
    "server.app": frozenset({"server.app", "server.api", *_CORE}),
    "server.ray_app": frozenset({"server.ray_app", "server.app", "server.fleet", *_CORE}),
    "server.commands": frozenset(
        {
            "server.commands",
            "server.app",
            "server.ray_app",
            "server.api",
            "server.fleet",
            "loadtest",
            "profiling",
            "demo",
            *_CORE,
        }
    ),
    "server.cli": frozenset({"server.cli", "server.commands", "server.app", "demo", *_CORE}),
}
ROOMS = ("server", "kernels", "cache", "loadtest", "profiling", "demo")


def source_files(root: Path) -> list[Path]:
    """Every .py file of the package."""
    return sorted(file for room in ROOMS for file in (root / room).rglob("*.py"))


def violations(root: Path) -> list[str]:
    """Imports that the law forbids, as "file:line: layer imports module"."""
    found: list[str] = []
    for file in source_files(root):
        name = ".".join(file.relative_to(root).with_suffix("").parts)
        layer = _layer(name)
        for line, target in _imports(root, file, name):
            if target.split(".")[0] != PACKAGE:
                found.append(f"{_place(root, file, line)}: {target} without {PACKAGE}")
            elif _layer(target.removeprefix(f"{PACKAGE}.")) not in ALLOWED[layer]:
                found.append(f"{_place(root, file, line)}: {layer} imports {target}")
    return found


def _place(root: Path, file: Path, line: int) -> str:
    return f"{file.relative_to(root)}:{line}"


def _layer(name: str) -> str:
    inside = [layer for layer in ALLOWED if name == layer or name.startswith(f"{layer}.")]
    return max(inside, key=len, default=name)


def _imports(root: Path, file: Path, name: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of each import of ours, wherever in the file it stands."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        for target in _targets(root, node, name):
            if target.split(".")[0] in (PACKAGE, *ROOMS):
                yield getattr(node, "lineno", 0), target


def _targets(root: Path, node: ast.AST, name: str) -> Iterator[str]:
    match node:
        case ast.Import(names=names):
            yield from (alias.name for alias in names)
        case ast.ImportFrom(module=module, names=names, level=level):
            parts = module.split(".") if module else []
            if level:
                parts = [PACKAGE, *name.split(".")[:-level], *parts]
            for alias in names:
                # `from headlong.server import engine` names a module, `... import Engine` does not.
                path = root.joinpath(*parts[1:], alias.name)
                is_module = path.is_dir() or path.with_suffix(".py").is_file()
                yield ".".join([*parts, alias.name] if is_module else parts)
        case ast.Call(
            func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
            args=[ast.Constant(value=str(target)), *_],
        ):
            yield target
