"""What every room needs of the machine: errors, files, several hosts, stopping, the command line, the mesh."""
