"""How the policy learns: supervised fine-tuning, and PPO against any reward function."""
