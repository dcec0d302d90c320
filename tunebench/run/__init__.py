"""One run of a script: from its command line to its record."""
