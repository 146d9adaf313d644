"""Archives: unpacked while they arrive, looked at as a whole, then stored, many files at a time."""
