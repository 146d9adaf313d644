"""The copies of backend objects on local disk: where they lie, how fresh they are, and what makes room."""
