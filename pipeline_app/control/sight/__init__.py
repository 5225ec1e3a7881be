"""What people look at: only questions, whose cost does not grow with the run."""
