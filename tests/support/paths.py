"""Files of the repository that tests use. Processes that tests start import it: conftest would load
PyTorch in each of them.
"""

from pathlib import Path

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "engines" / "demo"
SAMPLES = ROOT / "demo" / "samples"
