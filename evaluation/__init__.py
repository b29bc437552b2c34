"""How we know that it works: measures, the comparison of policies, and the report a person reads."""
