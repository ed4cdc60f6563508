"""The checker of annotated shapes and types in tests: `pytest --jaxtyping-packages=tomoscope,tests.check`.

An int passes for a float, as the language's own rule has it (PEP 484).
"""

from __future__ import annotations

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
