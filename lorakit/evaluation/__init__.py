"""Metrics of an adapter and its base, gates on them, and reports for people and for CI."""
