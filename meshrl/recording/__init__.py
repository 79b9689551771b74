"""Recordings: episodes in JetStream, written by workers and read by anyone."""
