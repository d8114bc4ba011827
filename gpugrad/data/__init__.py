"""Tables from files and frames, and the design matrices made from them. Importing this loads NumPy only."""

from gpugrad.data.preprocess import Design, Feature, Preprocessor, train_test_split
from gpugrad.data.table import Column, Table, read_table

__all__ = ["Column", "Design", "Feature", "Preprocessor", "Table", "read_table", "train_test_split"]
