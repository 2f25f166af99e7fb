"""Tests of whole runs: reads, indexes, expiry and deletion."""
