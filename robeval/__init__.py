"""Robustness evaluation and certification of image classifiers in PyTorch.

Importing this package loads nothing heavy: public names are resolved on first use.
"""

__version__ = "0.1.0"
