"""Prints what Headlong depends on, one requirement a line, without building it.

``python docker/requirements.py pyproject.toml tracing,ray`` adds the dependencies of these extras.
The image installs them in a layer of their own, which new code leaves as it is.
"""

import sys
import tomllib
from pathlib import Path


def requirements(pyproject: Path, extras: str) -> list[str]:
    """Reads the dependencies of a project.

    Args:
        pyproject: Its pyproject.toml.
        extras: Names of optional dependencies, separated by commas; may be empty.

    Raises:
        ValueError: There is no such extra.
    """
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    found: list[str] = list(project["dependencies"])
    for extra in filter(None, (name.strip() for name in extras.split(","))):
        if extra not in project["optional-dependencies"]:
            known = ", ".join(sorted(project["optional-dependencies"]))
            raise ValueError(f"there is no extra {extra!r}; there are {known}")
        found += project["optional-dependencies"][extra]
    return found


def main() -> None:
    """Prints them."""
    pyproject, extras = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else ""
    try:
        print("\n".join(requirements(pyproject, extras)))
    except (OSError, ValueError) as error:
        sys.exit(f"requirements.py: {error}")


if __name__ == "__main__":
    main()
