"""The test suite; nothing here is shipped."""
