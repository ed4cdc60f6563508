"""Print one dependency group of a pyproject.toml, a requirement a line.

pip installs dependency groups by itself only since 25.1; this keeps `make test` working with the pip that comes
with Python 3.11.
"""

import sys
import tomllib
from pathlib import Path

path, group = sys.argv[1:]
print("\n".join(tomllib.loads(Path(path).read_text())["dependency-groups"][group]))
