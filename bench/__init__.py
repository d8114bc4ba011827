"""The benchmark: rows with every peer that is installed, checked for right values before they are timed."""
