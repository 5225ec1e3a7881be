"""The control plane: runs, seeding, the sweep, status, accounting. Views ask these functions, never the store."""
