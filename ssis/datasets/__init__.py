"""Reading and making data."""
