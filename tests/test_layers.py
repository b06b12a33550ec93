from pathlib import Path

import pytest

from support.layers import violations

ROOT = Path(__file__).parents[1]


def test_the_package_keeps_the_import_law() -> None:
    assert violations(ROOT) == []


def _plant(root: Path, file: str, text: str) -> None:
    for name in ("kernels/layout.py", "cache/policy.py", "profiling/files.py", "demo/paths.py",
                 "server/app.py", "server/errors.py", "server/engine/engine.py"):  # fmt: skip
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    target = root / file
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("kernels/a.py", "from headlong.cache.policy import HeadPolicy"),
        ("kernels/a.py", "import headlong.server.errors"),
        ("cache/a.py", "from headlong.server.errors import ConfigError"),
        ("cache/a.py", "from headlong.profiling import files"),
        ("profiling/a.py", "from headlong.kernels.layout import PageLayout"),
        ("profiling/a.py", "from headlong.cache import policy"),
        ("profiling/a.py", "from headlong import server"),
        ("profiling/a.py", "from headlong.demo.paths import MODEL_DIR"),
        ("demo/a.py", "from headlong.server.engine.engine import Engine"),
        ("demo/a.py", "import headlong.cache.policy as policy"),
        ("server/errors.py", "from headlong.server.app import create_app"),
        ("server/engine/a.py", "from headlong.server.app import create_app"),
        ("server/engine/a.py", "from headlong.server import app"),
        ("server/engine/a.py", "from ..app import create_app"),
        ("server/engine/a.py", "from .. import app"),
        ("server/engine/a.py", "from headlong.demo.paths import MODEL_DIR"),
        ("server/a.py", "from headlong.cache.policy import HeadPolicy"),
        ("server/a.py", "from ..kernels import layout"),
        ("server/a.py", "from headlong.profiling.files import read"),
        ("server/a.py", "import headlong.server.cli"),
        ("server/a.py", "from headlong.server.app import create_app"),
        ("server/api/a.py", "from headlong.server.app import create_app"),
        ("server/api/a.py", "from headlong.cache.policy import HeadPolicy"),
        ("server/cli.py", "from headlong.kernels.layout import PageLayout"),
        ("server/cli.py", "from headlong.cache.policy import HeadPolicy"),
        # Where and how the import stands makes no difference.
        ("cache/a.py", "def f():\n    from headlong.server.app import create_app"),
        ("cache/a.py", "if TYPE_CHECKING:\n    from headlong.server.app import create_app"),
        (
            "cache/a.py",
            "try:\n    import headlong.server.app\nexcept ImportError:\n    pass",
        ),
        ("cache/a.py", "import importlib\nimportlib.import_module('headlong.server.app')"),
        ("cache/a.py", "__import__('headlong.server.app')"),
        # A room imported by its folder's name is a second copy of it.
        ("cache/a.py", "from kernels.layout import PageLayout"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path: Path, file: str, text: str) -> None:
    _plant(tmp_path, file, text)
    (found,) = violations(tmp_path)
    assert found.startswith(f"{file}:")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("kernels/a.py", "import torch\nfrom headlong.kernels.layout import PageLayout"),
        ("cache/a.py", "from headlong.kernels import layout\nfrom . import policy"),
        ("profiling/a.py", "import cachetools, demography\nfrom headlong.profiling import files"),
        ("demo/a.py", "from headlong.profiling.files import read"),
        (
            "server/engine/a.py",
            "from headlong.server.errors import X\nimport headlong.cache",
        ),
        ("server/engine/a.py", "from headlong.server import errors\nfrom ..errors import Y"),
        ("server/a.py", "from headlong.server.engine.engine import Engine\nfrom .errors import f"),
        ("server/cli.py", "from headlong.server.commands import bench\nfrom .app import f"),
        (
            "server/commands/a.py",
            "from headlong.demo.paths import A\nimport headlong.profiling.files",
        ),
    ],
)
def test_an_allowed_import_is_not_found(tmp_path: Path, file: str, text: str) -> None:
    _plant(tmp_path, file, text)
    assert violations(tmp_path) == []
