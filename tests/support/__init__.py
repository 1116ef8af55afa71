"""What tests share: fixtures that are plain functions, importable as ``tests.support``."""
