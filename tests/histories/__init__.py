"""Random histories of one machine and two hosts, over real processes: a short form with the tests, `make chaos` for hours."""
