"""Says before a run what it will take: memory per GPU, tokens per second, time and money. It runs without a GPU."""
