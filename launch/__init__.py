"""Starting runs on other machines."""
