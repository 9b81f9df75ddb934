"""What an update costs, and what its parts cost."""
