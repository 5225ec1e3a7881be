"""Jobs taken from where they stand to somewhere else: cancelled, moved, let go."""
