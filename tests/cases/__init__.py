"""What users of this kind of program run into: one test for every kind, on tiny models.

`python -m tests.cases` runs them all and prints a table.
"""
