"""CUDA sources, shipped as package data. Nothing to import here."""
