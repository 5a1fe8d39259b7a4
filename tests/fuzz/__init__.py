"""Fuzzing: what hostile bytes may do to the readers of blobs, schemas and streams. `make fuzz`; the short form is a test."""
