"""Makes the plain restatements of the official measures, which the benchmark uses too, importable."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))  # plain_measures.py
