"""What both frameworks' scripts share: flags, presets, checkpoints, the batch plan, the record, suites and tables.

Nothing in here imports torch or paddle.
"""
