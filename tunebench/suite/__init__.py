"""Suites: files that name runs, and the program that runs them."""
