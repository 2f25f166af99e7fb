"""The only I/O: sends calls over redis-py connections, retries, and maps errors."""
