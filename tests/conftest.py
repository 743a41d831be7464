"""What every test has: no tuning log but its own, so that `auto` picks the same with and without logs here."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def without_logs(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default places of tuning logs, ./tuning_logs and the shipped ones, are empty."""
    from gemmify.tuning import use

    nowhere = Path(tmp_path_factory.getbasetemp()) / "no-logs"
    monkeypatch.setattr(use, "LOCAL", nowhere / "local")
    monkeypatch.setattr(use, "SHIPPED", nowhere / "shipped")
