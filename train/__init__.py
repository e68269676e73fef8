"""Training scripts and the parts they share."""
