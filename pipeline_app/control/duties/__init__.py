"""What makes everything go on by itself: the sweep and the pacing, each led by one worker at a time."""
