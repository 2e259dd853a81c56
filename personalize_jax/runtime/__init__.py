"""Services that every room uses: errors, files, several hosts, stopping, the command line, the mesh."""
