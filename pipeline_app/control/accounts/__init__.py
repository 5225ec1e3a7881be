"""Is every job where it says it is, and what brings it back."""
