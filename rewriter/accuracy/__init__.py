"""Metrics, splits, ledger, certificate."""
