"""Datasets, records, tasks and batches."""
