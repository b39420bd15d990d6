"""What several test files need: tiny models, oracles, where things lie."""
