"""Models that come with more than a module: everything here may import transformers, nothing below here does."""
