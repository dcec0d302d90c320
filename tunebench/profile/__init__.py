"""Reads the traces of --profile: one reader for both frameworks."""
