"""Run a network again as it ran before, with the same batch statistics and random masks, and leave no trace"""
