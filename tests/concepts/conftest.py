"""The material that nobody here wrote, as the tests of data find it."""

from __future__ import annotations

from tests.data.conftest import material

__all__ = ["material"]
