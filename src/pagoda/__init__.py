"""pagoda."""
