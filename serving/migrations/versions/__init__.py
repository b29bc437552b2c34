"""Steps from one version of the tables to the next; each has its own copy of them, for good."""
