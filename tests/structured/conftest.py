import sys
from pathlib import Path

# The generators are the benchmark's.
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
