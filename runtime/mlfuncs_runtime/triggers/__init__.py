"""What calls endpoints besides HTTP: schedules and streams."""
