"""Tests of payloads: codecs, limits, and exceptions as payloads."""
