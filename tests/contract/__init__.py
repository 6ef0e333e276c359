"""One contract for every model family: a table of families, a table of ways of calling, and the same tests over all."""
