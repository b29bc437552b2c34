"""One script a claim: ``python -m benchmarks.NAME --json`` prints one JSON object on its last line."""
