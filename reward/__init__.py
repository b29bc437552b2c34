"""What a statement is worth to a group: welfare, preference model, scoring, and the reward a trainer calls."""
