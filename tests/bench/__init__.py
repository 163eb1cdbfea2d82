"""What our server costs beside the same agent without persistence: `python -m tests.bench`."""
