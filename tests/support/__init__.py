"""Helpers of the tests: servers, backends, proxies and models."""
