"""Callbacks for training frameworks, a module each, which imports its framework.

Both bind every BCLLayer to the optimizer that steps it, so that one optimizer step makes one pull, and log what the
layers do through the framework's own logger, under `bcl/LAYER/METRIC` (see `diagnostics`).
"""
