"""Tracked runs: executing, recording, looking back, sweeping."""
