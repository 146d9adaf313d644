"""The way of a request from outside in, before Flask sees it: exchange, admission, downloads, responses."""
