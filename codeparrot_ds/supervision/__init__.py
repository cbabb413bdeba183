"""A rank that is watched: heartbeat, guard, watchdog, control connection, and how processes end."""
