"""What everything stands on: run directories, the bootstrap, processes, text of numbers."""
