"""What answers requests: one process per replica, its protocols, and the zygote that forks it."""
