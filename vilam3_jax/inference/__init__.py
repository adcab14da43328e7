"""Generation, the agent loop and chat."""
