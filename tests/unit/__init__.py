"""Pure tests: no service, no network, nothing that outlives a test."""
