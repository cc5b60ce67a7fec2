"""Prints the requirements of pyproject.toml and of the named extras, so that an image can install
them before the code is copied: `python requirements.py cpu export`.
"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
print(*project["dependencies"], *(need for name in sys.argv[1:] for need in extras[name]), sep="\n")
