"""Replays, as people ask for them; `duties/replaying.py` carries them out."""
