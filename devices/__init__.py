"""What is moved: the device kit and the device processes. Imports migrate.state, .memory, .bus and .errors, nothing above."""
