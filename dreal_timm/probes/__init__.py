"""Probes: how the rewards of a step are measured"""
