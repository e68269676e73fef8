"""Models built on timm modules; they know nothing of dbpkern."""
