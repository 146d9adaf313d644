"""Directory pages: one level of the store, for people and, as JSON, for programs."""
