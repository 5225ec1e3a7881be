"""What people say of targets: holds, pauses, throttles."""
