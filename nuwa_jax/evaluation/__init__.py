"""Metrics, the evaluation protocol and its reports."""
