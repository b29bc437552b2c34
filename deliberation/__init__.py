"""What people say: questions, opinions, deliberations, ratings, simulated citizens. No models and no torch in it."""
