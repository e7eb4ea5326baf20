"""Shared by all tests. Its presence puts this directory on the import path, so that tests can import `checkpoints`."""
