"""Registers this folder's marker, so that it can be run without the project's pytest options."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
