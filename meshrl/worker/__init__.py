"""Serving: env workers and agent workers."""
