"""Checkpoints that many tests share."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from headlong.demo.paths import MODEL_DIR
from support.tiny_models import save_tiny_model

# Tests are many and small: more threads only wait for each other.
torch.set_num_threads(1)

# No example fails because the machine is busy.
settings.register_profile("headlong", deadline=None)
settings.load_profile("headlong")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of the embedded model, or of a random-weight one of an architecture, made once."""
    root = tmp_path_factory.mktemp("models")
    made: dict[str, Path] = {"embedded": MODEL_DIR}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = save_tiny_model(root, name)
        return made[name]

    return folder
