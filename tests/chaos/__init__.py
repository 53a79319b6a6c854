"""Real processes killed at random moments of real trainings, and what must be true afterwards."""
