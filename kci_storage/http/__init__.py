"""HTTP as its RFCs have it, in pure functions: conditions, ranges, multipart bodies, media types, problems."""
