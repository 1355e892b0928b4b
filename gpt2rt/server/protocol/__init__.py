"""What requests look like, one file for each family of endpoints."""
