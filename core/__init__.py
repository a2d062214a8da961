"""The parts every backend and the harness share; nothing in here knows a backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flash2.core.contract import Backend

# (name, or None for the default; device type) -> Backend. The package's root puts the shelf's answer here.
find_backend: Callable[[str | None, str], Backend]
