"""Clips to records to batches."""
