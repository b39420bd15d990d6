"""Random graphs on random batches against a reference that knows nothing of the library's runtime.

`python -m tests.fuzz --graphs 2000 --seed 0` runs many and says what was covered; `tests/test_fuzz.py` runs some.
"""
